"""Rule features_shard. Dots with every query and norms, for one part of the pool."""

from iprox.stages.features import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
