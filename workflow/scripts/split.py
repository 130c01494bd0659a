"""Rule split. The ids of one named subset of the pool."""

from iprox.stages.split import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
