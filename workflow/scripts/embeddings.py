"""Rule embeddings. One manifest over all shards."""

from iprox.store.runner import gather_rule

gather_rule(snakemake)
