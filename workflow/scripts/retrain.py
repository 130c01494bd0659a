"""Rule retrain. The tiny model trained on random subsets, and its loss on every query."""

from iprox.stages.retrain import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
