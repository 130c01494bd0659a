"""Rule eigenvalues_shard. Squared gradients of one part of the fisher split."""

from iprox.stages.eigenvalues import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
