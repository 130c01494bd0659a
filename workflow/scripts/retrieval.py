"""Rule retrieval. Their quality beside their cost, over seeds."""

from iprox.stages.retrieval import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
