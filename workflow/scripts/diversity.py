"""Rule diversity. How a selection lies among sketches of the pool and the queries."""

from iprox.stages.diversity import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
