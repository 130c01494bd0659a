"""Rule selection. The best examples for each task."""

from iprox.stages.selection import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
