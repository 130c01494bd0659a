"""Rule task. Queries of a task, and what is held out of them."""

from iprox.stages.task import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
