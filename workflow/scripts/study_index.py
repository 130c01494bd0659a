"""Rule study_index. Links from every run to its stages, the resolved study, a table of runs."""

from iprox.logs import log_to
from iprox.plan.index import write_index
from iprox.plan.plan import plan_study
from iprox.study.load import parse_study

with log_to(snakemake.log[0], "study_index"):
    write_index(plan_study(parse_study(snakemake.config)))
