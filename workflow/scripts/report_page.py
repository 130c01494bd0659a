"""Rule report_page. Tables, figures and the page that shows a study."""

from iprox.stages.report import make
from iprox.store.runner import run_rule

run_rule(snakemake, make)
