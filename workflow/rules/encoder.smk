"""A text encoder, what it is taught, and its embeddings of a pool."""


rule backbone:
    # A text encoder as it was published.
    input:
        raw_files("backbone"),
    output:
        files("backbone"),
        manifest=manifest("backbone"),
    log:
        "results/logs/backbone/{id}.log",
    benchmark:
        "results/benchmarks/backbone/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=mem("backbone"),
        runtime=runtime("backbone"),
    params:
        code=code("backbone"),
        parents=parents("backbone"),
        spec=spec("backbone"),
    script:
        "../scripts/backbone.py"


rule query_sketches:
    # A sketch of every single query's gradient: the teacher's side of the queries.
    input:
        model=parent("query_sketches", "model"),
        task=parent("query_sketches", "task"),
    output:
        files("query_sketches"),
        manifest=manifest("query_sketches"),
    log:
        "results/logs/query_sketches/{id}.log",
    benchmark:
        "results/benchmarks/query_sketches/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("query_sketches"),
        mem_mb=mem("query_sketches"),
        runtime=runtime("query_sketches"),
    params:
        code=code("query_sketches"),
        parents=parents("query_sketches"),
        spec=spec("query_sketches"),
    script:
        "../scripts/query_sketches.py"


rule encoder:
    # The encoder learns the teacher's scores.
    input:
        all_parents("encoder"),
    output:
        files("encoder"),
        manifest=manifest("encoder"),
    log:
        "results/logs/encoder/{id}.log",
    benchmark:
        "results/benchmarks/encoder/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("encoder"),
        mem_mb=mem("encoder"),
        runtime=runtime("encoder"),
    params:
        code=code("encoder"),
        parents=parents("encoder"),
        spec=spec("encoder"),
    script:
        "../scripts/encoder.py"


rule embeddings_shard:
    # Embeddings of one part of the pool.
    input:
        encoder=parent("embeddings", "encoder"),
        pool=parent("embeddings", "pool"),
    output:
        "results/embeddings/{id}/shard-{shard}.zarr/zarr.json",
        manifest="results/embeddings/{id}/shard-{shard}.manifest.json",
    log:
        "results/logs/embeddings/{id}/{shard}.log",
    benchmark:
        "results/benchmarks/embeddings/{id}/{shard}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("embeddings"),
        mem_mb=mem("embeddings"),
        runtime=runtime("embeddings"),
    params:
        code=code("embeddings", "embeddings_shard"),
        parents=parents("embeddings"),
        shards=shards("embeddings"),
        spec=spec("embeddings"),
    script:
        "../scripts/embeddings_shard.py"


rule embeddings:
    # One manifest over all shards.
    input:
        shard_manifests("embeddings"),
    output:
        manifest=manifest("embeddings"),
    log:
        "results/logs/embeddings/{id}.log",
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=small_mem,
        runtime=small_runtime,
    params:
        spec=spec("embeddings"),
    script:
        "../scripts/embeddings.py"


rule query_embeddings:
    # Embeddings of a task's queries.
    input:
        encoder=parent("query_embeddings", "encoder"),
        task=parent("query_embeddings", "task"),
    output:
        files("query_embeddings"),
        manifest=manifest("query_embeddings"),
    log:
        "results/logs/query_embeddings/{id}.log",
    benchmark:
        "results/benchmarks/query_embeddings/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("query_embeddings"),
        mem_mb=mem("query_embeddings"),
        runtime=runtime("query_embeddings"),
    params:
        code=code("query_embeddings"),
        parents=parents("query_embeddings"),
        spec=spec("query_embeddings"),
    script:
        "../scripts/query_embeddings.py"


rule head:
    # A linear function of embeddings learns a teacher's scores for one task.
    input:
        all_parents("head"),
    output:
        files("head"),
        manifest=manifest("head"),
    log:
        "results/logs/head/{id}.log",
    benchmark:
        "results/benchmarks/head/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=mem("head"),
        runtime=runtime("head"),
    params:
        code=code("head"),
        parents=parents("head"),
        spec=spec("head"),
    script:
        "../scripts/head.py"
