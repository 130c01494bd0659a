"""Rule curvature. Eigenbases of the summed second moments."""

from iprox.stages.curvature import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
