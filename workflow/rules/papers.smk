"""Experiments of the papers that need no study."""

from iprox.plan.plan import synthetic_node

SYNTHETIC = synthetic_node()


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
