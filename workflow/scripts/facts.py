"""Rule facts. Which pre-training texts answers come from, by each method."""

from iprox.stages.facts import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
