"""Rule proxy. The factors put together, and aligned with the target's gradients."""

from iprox.stages.proxy import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
