"""Rule direction. Query gradients as the run's estimator changes them."""

from iprox.stages.direction import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
