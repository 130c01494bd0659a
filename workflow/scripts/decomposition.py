"""Rule decomposition. The leading directions of every layer, for all ranks at once."""

from iprox.stages.decomposition import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
