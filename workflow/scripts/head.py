"""Rule head. A linear function of embeddings learns a teacher's scores for one task."""

from iprox.stages.head import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
