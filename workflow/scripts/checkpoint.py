"""Rule checkpoint. The target at the end of an earlier epoch of its warm-up."""

from iprox.stages.checkpoint import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
