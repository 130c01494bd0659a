"""Rule encoder. The encoder learns the teacher's scores."""

from iprox.stages.encoder import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
