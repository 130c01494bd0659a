"""Rule probe. Layer inputs and output gradients at chosen tokens."""

from iprox.stages.probe import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
