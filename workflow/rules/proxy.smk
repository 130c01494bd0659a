"""From the target to a small model that scores in its place."""


rule warmup:
    # The target after a short fine-tuning: influence is measured here.
    input:
        target=parent("warmup", "target"),
        split=parent("warmup", "split"),
        pool=parent("warmup", "pool"),
    output:
        files("warmup"),
        manifest=manifest("warmup"),
    log:
        "results/logs/warmup/{id}.log",
    benchmark:
        "results/benchmarks/warmup/{id}.tsv"
    # On the longest path of a study: what waits for it is most of the work.
    priority: 10
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=PLAN.study.config.train_gpus,
        gpu_mem_mb=gpu_mem("warmup"),
        mem_mb=mem("warmup"),
        runtime=runtime("warmup"),
    params:
        code=code("warmup"),
        parents=parents("warmup"),
        spec=spec("warmup"),
    script:
        "../scripts/warmup.py"


rule checkpoint:
    # The target at the end of an earlier epoch of its warm-up, where influence is summed over them.
    input:
        warmup=parent("checkpoint", "warmup"),
    output:
        files("checkpoint"),
        manifest=manifest("checkpoint"),
    log:
        "results/logs/checkpoint/{id}.log",
    benchmark:
        "results/benchmarks/checkpoint/{id}.tsv"
    # On the longest path of a study: what waits for it is most of the work.
    priority: 10
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=mem("checkpoint"),
        runtime=runtime("checkpoint"),
    params:
        code=code("checkpoint"),
        parents=parents("checkpoint"),
        spec=spec("checkpoint"),
    script:
        "../scripts/checkpoint.py"


rule probe:
    # Layer inputs and output gradients at chosen tokens.
    input:
        warmup=parent("probe", "warmup"),
        split=parent("probe", "split"),
        pool=parent("probe", "pool"),
        queries=all_parents("probe", "query/"),
    output:
        files("probe"),
        manifest=manifest("probe"),
    log:
        "results/logs/probe/{id}.log",
    benchmark:
        "results/benchmarks/probe/{id}.tsv"
    # On the longest path of a study: what waits for it is most of the work.
    priority: 10
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("probe"),
        mem_mb=mem("probe"),
        runtime=runtime("probe"),
    params:
        code=code("probe"),
        parents=parents("probe"),
        spec=spec("probe"),
    script:
        "../scripts/probe.py"


rule decomposition:
    # The leading directions of every layer, for all ranks at once.
    input:
        warmup=parent("decomposition", "warmup"),
        probe=parent("decomposition", "probe"),
    output:
        files("decomposition"),
        manifest=manifest("decomposition"),
    log:
        "results/logs/decomposition/{id}.log",
    benchmark:
        "results/benchmarks/decomposition/{id}.tsv"
    # On the longest path of a study: what waits for it is most of the work.
    priority: 10
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("decomposition"),
        mem_mb=mem("decomposition"),
        runtime=runtime("decomposition"),
    params:
        code=code("decomposition"),
        parents=parents("decomposition"),
        spec=spec("decomposition"),
    script:
        "../scripts/decomposition.py"


rule sparsity:
    # The smallest proxy that is faithful enough, where the study asks for it.
    input:
        decomposition=parent("sparsity", "decomposition"),
        pool=parent("sparsity", "pool"),
        target=parent("sparsity", "target"),
        tasks=all_parents("sparsity", "task/"),
        warmup=parent("sparsity", "warmup"),
    output:
        files("sparsity"),
        manifest=manifest("sparsity"),
    log:
        "results/logs/sparsity/{id}.log",
    benchmark:
        "results/benchmarks/sparsity/{id}.tsv"
    # On the longest path of a study: what waits for it is most of the work.
    priority: 10
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("sparsity"),
        mem_mb=mem("sparsity"),
        runtime=runtime("sparsity"),
    params:
        code=code("sparsity"),
        parents=parents("sparsity"),
        spec=spec("sparsity"),
    script:
        "../scripts/sparsity.py"


rule factors:
    # The two factors of every layer at one sparsity.
    input:
        decomposition=parent("factors", "decomposition"),
        sparsity=parent("factors", "sparsity"),
    output:
        files("factors"),
        manifest=manifest("factors"),
    log:
        "results/logs/factors/{id}.log",
    benchmark:
        "results/benchmarks/factors/{id}.tsv"
    # On the longest path of a study: what waits for it is most of the work.
    priority: 10
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=mem("factors"),
        runtime=runtime("factors"),
    params:
        code=code("factors"),
        parents=parents("factors"),
        spec=spec("factors"),
    script:
        "../scripts/factors.py"


rule proxy:
    # The factors put together, and aligned with the target's gradients.
    input:
        factors=parent("proxy", "factors"),
        warmup=parent("proxy", "warmup"),
        split=parent("proxy", "split"),
        pool=parent("proxy", "pool"),
    output:
        files("proxy"),
        manifest=manifest("proxy"),
    log:
        "results/logs/proxy/{id}.log",
    benchmark:
        "results/benchmarks/proxy/{id}.tsv"
    # On the longest path of a study: what waits for it is most of the work.
    priority: 10
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("proxy"),
        mem_mb=mem("proxy"),
        runtime=runtime("proxy"),
    params:
        code=code("proxy"),
        parents=parents("proxy"),
        spec=spec("proxy"),
    script:
        "../scripts/proxy.py"


rule extraction:
    # The blocks of the target that matter most, as a model of their own.
    input:
        warmup=parent("extraction", "warmup"),
        split=parent("extraction", "split"),
        pool=parent("extraction", "pool"),
    output:
        files("extraction"),
        manifest=manifest("extraction"),
    log:
        "results/logs/extraction/{id}.log",
    benchmark:
        "results/benchmarks/extraction/{id}.tsv"
    # On the longest path of a study: what waits for it is most of the work.
    priority: 10
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("extraction"),
        mem_mb=mem("extraction"),
        runtime=runtime("extraction"),
    params:
        code=code("extraction"),
        parents=parents("extraction"),
        spec=spec("extraction"),
    script:
        "../scripts/extraction.py"
