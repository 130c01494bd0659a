"""Experiments beside a study: those of the papers, and its runs judged by retraining."""

from iprox.plan.faithfulness import check_judged, plan_faithfulness
from iprox.plan.plan import synthetic_node

SYNTHETIC = synthetic_node()
JUDGED, FAITHFULNESS = plan_faithfulness(PLAN)


def judged(wildcards):
    """Input function: the table, once every run of the study is one that can be judged."""
    check_judged(PLAN)
    return made(FAITHFULNESS)


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
    input:
        judged,
