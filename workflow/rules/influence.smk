"""From a scoring model to a ranking of the pool."""


rule query:
    # The average query gradient of a task.
    input:
        model=parent("query", "model"),
        task=parent("query", "task"),
    output:
        files("query"),
        manifest=manifest("query"),
    log:
        "results/logs/query/{id}.log",
    benchmark:
        "results/benchmarks/query/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("query"),
        mem_mb=mem("query"),
        runtime=runtime("query"),
    params:
        code=code("query"),
        parents=parents("query"),
        spec=spec("query"),
    script:
        "../scripts/query.py"


rule features_shard:
    # Dots with every query and norms, or sketches, for one part of the pool: where the time goes.
    input:
        model=parent("features", "model"),
        moments=parent("features", "moments"),
        pool=parent("features", "pool"),
        split=parent("features", "split"),
        queries=all_parents("features", "query/"),
        prefilter=parent("features", "prefilter"),
        curvature=parent("features", "curvature"),
        eigenvalues=parent("features", "eigenvalues"),
    output:
        "results/features/{id}/shard-{shard}.zarr/zarr.json",
        manifest="results/features/{id}/shard-{shard}.manifest.json",
    log:
        "results/logs/features/{id}/{shard}.log",
    benchmark:
        "results/benchmarks/features/{id}/{shard}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("features"),
        mem_mb=mem("features"),
        runtime=runtime("features"),
    params:
        code=code("features", "features_shard"),
        parents=parents("features"),
        shards=shards("features"),
        spec=spec("features"),
    script:
        "../scripts/features_shard.py"


rule features:
    # One manifest over all shards.
    input:
        shard_manifests("features"),
    output:
        manifest=manifest("features"),
    log:
        "results/logs/features/{id}.log",
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=small_mem,
        runtime=small_runtime,
    params:
        spec=spec("features"),
    script:
        "../scripts/features.py"


rule ranking:
    # Scores, sorted; all there is to do for a scorer that needs no gradients.
    input:
        all_parents("ranking"),
    output:
        files("ranking"),
        manifest=manifest("ranking"),
    log:
        "results/logs/ranking/{id}.log",
    benchmark:
        "results/benchmarks/ranking/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: lambda wildcards: model_threads() if passes_model(wildcards) else 1
    resources:
        gpu=lambda wildcards: int(passes_model(wildcards)),
        gpu_mem_mb=gpu_mem("ranking"),
        mem_mb=mem("ranking"),
        runtime=runtime("ranking"),
    params:
        code=ranking_code,
        parents=parents("ranking"),
        spec=spec("ranking"),
    script:
        "../scripts/ranking.py"


rule fidelity:
    # How well a proxy's scores agree with the target's.
    input:
        all_parents("fidelity"),
    output:
        files("fidelity"),
        manifest=manifest("fidelity"),
    log:
        "results/logs/fidelity/{id}.log",
    benchmark:
        "results/benchmarks/fidelity/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=mem("fidelity"),
        runtime=runtime("fidelity"),
    params:
        code=code("fidelity"),
        parents=parents("fidelity"),
        spec=spec("fidelity"),
    script:
        "../scripts/fidelity.py"
