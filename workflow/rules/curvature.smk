"""From a scoring model to directions: query gradients times an inverse curvature."""


rule covariance_shard:
    # Second moments of inputs and output gradients over one part of the fisher split.
    input:
        model=parent("covariance", "model"),
        pool=parent("covariance", "pool"),
        split=parent("covariance", "split"),
    output:
        "results/covariance/{id}/shard-{shard}.zarr/zarr.json",
        manifest="results/covariance/{id}/shard-{shard}.manifest.json",
    log:
        "results/logs/covariance/{id}/{shard}.log",
    benchmark:
        "results/benchmarks/covariance/{id}/{shard}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("covariance"),
        mem_mb=mem("covariance"),
        runtime=runtime("covariance"),
    params:
        code=code("covariance", "covariance_shard"),
        parents=parents("covariance"),
        shards=shards("covariance"),
        spec=spec("covariance"),
    script:
        "../scripts/covariance_shard.py"


rule covariance:
    # One manifest over all shards.
    input:
        shard_manifests("covariance"),
    output:
        manifest=manifest("covariance"),
    log:
        "results/logs/covariance/{id}.log",
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=small_mem,
        runtime=small_runtime,
    params:
        spec=spec("covariance"),
    script:
        "../scripts/covariance.py"


rule curvature:
    # Their eigenbases; all that K-FAC needs.
    input:
        covariance=parent("curvature", "covariance"),
    output:
        files("curvature"),
        manifest=manifest("curvature"),
    log:
        "results/logs/curvature/{id}.log",
    benchmark:
        "results/benchmarks/curvature/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        mem_mb=mem("curvature"),
        runtime=runtime("curvature"),
    params:
        code=code("curvature"),
        parents=parents("curvature"),
        spec=spec("curvature"),
    script:
        "../scripts/curvature.py"


rule eigenvalues_shard:
    # EK-FAC's eigenvalues, measured on one part of the fisher split.
    input:
        model=parent("eigenvalues", "model"),
        pool=parent("eigenvalues", "pool"),
        split=parent("eigenvalues", "split"),
        curvature=parent("eigenvalues", "curvature"),
    output:
        "results/eigenvalues/{id}/shard-{shard}.zarr/zarr.json",
        manifest="results/eigenvalues/{id}/shard-{shard}.manifest.json",
    log:
        "results/logs/eigenvalues/{id}/{shard}.log",
    benchmark:
        "results/benchmarks/eigenvalues/{id}/{shard}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("eigenvalues"),
        mem_mb=mem("eigenvalues"),
        runtime=runtime("eigenvalues"),
    params:
        code=code("eigenvalues", "eigenvalues_shard"),
        parents=parents("eigenvalues"),
        shards=shards("eigenvalues"),
        spec=spec("eigenvalues"),
    script:
        "../scripts/eigenvalues_shard.py"


rule eigenvalues:
    # One manifest over all shards.
    input:
        shard_manifests("eigenvalues"),
    output:
        manifest=manifest("eigenvalues"),
    log:
        "results/logs/eigenvalues/{id}.log",
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=small_mem,
        runtime=small_runtime,
    params:
        spec=spec("eigenvalues"),
    script:
        "../scripts/eigenvalues.py"


rule direction:
    # The query gradients of a task times the inverse curvature: what the pool is scored against.
    input:
        all_parents("direction"),
    output:
        files("direction"),
        manifest=manifest("direction"),
    log:
        "results/logs/direction/{id}.log",
    benchmark:
        "results/benchmarks/direction/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("direction"),
        mem_mb=mem("direction"),
        runtime=runtime("direction"),
    params:
        code=estimator_code,
        parents=parents("direction"),
        spec=spec("direction"),
    script:
        "../scripts/direction.py"
