"""Rule small. A tiny model trained on part of the pool, and on all candidates from there."""

from iprox.stages.small import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
