"""Rule extraction. The blocks of the target that matter most, as a model of their own."""

from iprox.stages.extraction import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
