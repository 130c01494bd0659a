"""Rule evaluation. What a model can do on a task."""

from iprox.stages.evaluation import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
