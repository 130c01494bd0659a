"""Rule backbone. A text encoder as it was published."""

from iprox.stages.backbone import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
