"""What a study starts from: the pool, the tasks, the target model, and the splits."""


rule pool:
    # Candidate examples, whatever their source, in one table.
    input:
        raw=raw_files("pool"),
    output:
        files("pool"),
        manifest=manifest("pool"),
    log:
        "results/logs/pool/{id}.log",
    benchmark:
        "results/benchmarks/pool/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=mem("pool"),
        runtime=runtime("pool"),
    params:
        code=code("pool"),
        parents=parents("pool"),
        spec=spec("pool"),
    script:
        "../scripts/pool.py"


rule task:
    # Queries of a task, and what is held out of them.
    input:
        raw=raw_files("task"),
    output:
        files("task"),
        manifest=manifest("task"),
    log:
        "results/logs/task/{id}.log",
    benchmark:
        "results/benchmarks/task/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=mem("task"),
        runtime=runtime("task"),
    params:
        code=code("task"),
        parents=parents("task"),
        spec=spec("task"),
    script:
        "../scripts/task.py"


rule target:
    # The target model as an ordinary model folder.
    input:
        raw=raw_files("target"),
    output:
        files("target"),
        manifest=manifest("target"),
    log:
        "results/logs/target/{id}.log",
    benchmark:
        "results/benchmarks/target/{id}.tsv"
    # On the longest path of a study: what waits for it is most of the work.
    priority: 10
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=mem("target"),
        runtime=runtime("target"),
    params:
        code=code("target"),
        parents=parents("target"),
        spec=spec("target"),
    script:
        "../scripts/target.py"


rule split:
    # The ids of one named subset of the pool.
    input:
        pool=parent("split", "pool"),
    output:
        files("split"),
        manifest=manifest("split"),
    log:
        "results/logs/split/{id}.log",
    benchmark:
        "results/benchmarks/split/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=mem("split"),
        runtime=runtime("split"),
    params:
        code=code("split"),
        parents=parents("split"),
        spec=spec("split"),
    script:
        "../scripts/split.py"
