"""Rule query_embeddings. Embeddings of a task's queries."""

from iprox.stages.query_embeddings import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
