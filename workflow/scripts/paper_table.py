"""Rule paper_table. A paper's table with the study's numbers beside the printed ones."""

from iprox.stages.paper_table import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
