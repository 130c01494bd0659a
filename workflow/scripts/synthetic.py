"""Rule synthetic. Low-rank layers in a small network: loss and influence kept."""

from iprox.stages.synthetic import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
