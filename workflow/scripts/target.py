"""Rule target. The target model as an ordinary model folder."""

from iprox.stages.target import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
