"""Rule finetune. The target fine-tuned on a selection."""

from iprox.stages.finetune import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
