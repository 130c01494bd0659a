"""Rule query_sketches. A sketch of every single query's gradient."""

from iprox.stages.query_sketches import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
