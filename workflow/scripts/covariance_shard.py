"""Rule covariance_shard. Second moments over one part of the fisher split."""

from iprox.stages.covariance import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
