"""Rule query. The average query gradient of a task."""

from iprox.stages.query import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
