"""Rule warmup. The target after a short fine-tuning: influence is measured here."""

from iprox.stages.warmup import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
