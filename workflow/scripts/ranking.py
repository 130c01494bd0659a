"""Rule ranking. Scores, sorted."""

from iprox.stages.ranking import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
