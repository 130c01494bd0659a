"""Rule embeddings_shard. Embeddings of one part of the pool."""

from iprox.stages.embeddings import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
