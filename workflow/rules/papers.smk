"""Experiments and tables of the papers, and a study's runs judged by retraining."""

from iprox.plan.facts import plan_facts
from iprox.plan.faithfulness import check_judged, plan_faithfulness
from iprox.plan.plan import synthetic_node

SYNTHETIC = synthetic_node()
TRACED, RETRIEVAL = plan_facts(PLAN)
JUDGED, FAITHFULNESS = plan_faithfulness(PLAN)


rule paper_table:
    # A paper's table with the study's numbers beside the printed ones.
    input:
        all_parents("paper_table", plan=TABULATED),
    output:
        files("paper_table"),
        manifest=manifest("paper_table"),
    log:
        "results/logs/paper_table/{id}.log",
    benchmark:
        "results/benchmarks/paper_table/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=small_mem,
        runtime=small_runtime,
    params:
        code=code("paper_table"),
        parents=parents("paper_table", TABULATED),
        spec=spec("paper_table", TABULATED),
    script:
        "../scripts/paper_table.py"


for table in TABLES:

    # `snakemake t2` and the like, each from the runs that stand in it.
    rule:
        name:
            table
        input:
            rules.study_index.output,
            made(TABLES[table]),


rule synthetic:
    # Low-rank layers in a small network: loss and influence kept (arXiv:2602.17835, Figure 3).
    output:
        files("synthetic"),
        manifest=manifest("synthetic"),
    log:
        "results/logs/synthetic/{id}.log",
    benchmark:
        "results/benchmarks/synthetic/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=small_mem,
        runtime=small_runtime,
    params:
        code=code("synthetic"),
        parents={},
        spec=SYNTHETIC.spec,
    script:
        "../scripts/synthetic.py"


rule f3:
    input:
        made(SYNTHETIC),


rule small:
    # A tiny model trained on part of the pool, and on all candidates from there.
    input:
        all_parents("small", plan=JUDGED),
    output:
        files("small"),
        manifest=manifest("small"),
    log:
        "results/logs/small/{id}.log",
    benchmark:
        "results/benchmarks/small/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=tiny_model_mem,
        runtime=small_runtime,
    params:
        code=code("small"),
        parents=parents("small", JUDGED),
        spec=spec("small", JUDGED),
    script:
        "../scripts/small.py"


rule retrain:
    # The same training on random subsets of the candidates (arXiv:2303.14186, Eq. 2).
    input:
        all_parents("retrain", plan=JUDGED),
    output:
        files("retrain"),
        manifest=manifest("retrain"),
    log:
        "results/logs/retrain/{id}.log",
    benchmark:
        "results/benchmarks/retrain/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=tiny_model_mem,
        runtime=small_runtime,
    params:
        code=code("retrain"),
        parents=parents("retrain", JUDGED),
        spec=spec("retrain", JUDGED),
    script:
        "../scripts/retrain.py"


rule faithfulness_table:
    # How well the scores of every run predict what retraining measured.
    input:
        all_parents("faithfulness", plan=JUDGED),
    output:
        files("faithfulness"),
        manifest=manifest("faithfulness"),
    log:
        "results/logs/faithfulness/{id}.log",
    benchmark:
        "results/benchmarks/faithfulness/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=tiny_model_mem,
        runtime=small_runtime,
    params:
        code=code("faithfulness"),
        parents=parents("faithfulness", JUDGED),
        spec=spec("faithfulness", JUDGED),
    script:
        "../scripts/faithfulness.py"


rule faithfulness:
    # The table, once every run of the study is one that can be judged.
    input:
        lambda wildcards: check_judged(PLAN) or made(FAITHFULNESS),


rule facts:
    # Which pre-training texts answers come from, by each method (arXiv:2505.05017).
    input:
        all_parents("facts", plan=TRACED),
    output:
        files("facts"),
        manifest=manifest("facts"),
    log:
        "results/logs/facts/{id}.log",
    benchmark:
        "results/benchmarks/facts/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        gpu=1,
        mem_mb=tiny_model_mem,
        runtime=small_runtime,
    params:
        code=code("facts"),
        parents=parents("facts", TRACED),
        spec=spec("facts", TRACED),
    script:
        "../scripts/facts.py"


rule retrieval:
    # Their quality beside their cost, over seeds.
    input:
        all_parents("retrieval", plan=TRACED),
    output:
        files("retrieval"),
        manifest=manifest("retrieval"),
    log:
        "results/logs/retrieval/{id}.log",
    benchmark:
        "results/benchmarks/retrieval/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=small_mem,
        runtime=small_runtime,
    params:
        code=code("retrieval"),
        parents=parents("retrieval", TRACED),
        spec=spec("retrieval", TRACED),
    script:
        "../scripts/retrieval.py"


rule m1:
    # Quality beside cost (arXiv:2505.05017); in the same table as
    input:
        made(RETRIEVAL),


rule m2:
    # the retrieval of facts.
    input:
        made(RETRIEVAL),
