"""Rule faithfulness_table. How well the scores of every run predict retraining."""

from iprox.stages.faithfulness import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
