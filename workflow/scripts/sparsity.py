"""Rule sparsity. The smallest proxy that is faithful enough."""

from iprox.stages.sparsity import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
