"""Rule pool. Candidate examples, whatever their source, in one table."""

from iprox.stages.pool import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
