"""Rule factors. The two factors of every layer at one sparsity."""

from iprox.stages.factors import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
