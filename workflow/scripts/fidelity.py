"""Rule fidelity. How well a proxy's scores agree with the target's."""

from iprox.stages.fidelity import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
