"""What a ranking is good for: the selection, the model it trains, and the report."""


rule selection:
    # The best examples for each task, or for all together.
    input:
        all_parents("selection"),
    output:
        files("selection"),
        manifest=manifest("selection"),
    log:
        "results/logs/selection/{id}.log",
    benchmark:
        "results/benchmarks/selection/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=mem("selection"),
        runtime=runtime("selection"),
    params:
        code=code("selection"),
        parents=parents("selection"),
        spec=spec("selection"),
    script:
        "../scripts/selection.py"


rule diversity:
    # How a selection lies among sketches of the pool and the queries.
    input:
        all_parents("diversity"),
    output:
        files("diversity"),
        manifest=manifest("diversity"),
    log:
        "results/logs/diversity/{id}.log",
    benchmark:
        "results/benchmarks/diversity/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=mem("diversity"),
        runtime=runtime("diversity"),
    params:
        code=code("diversity"),
        parents=parents("diversity"),
        spec=spec("diversity"),
    script:
        "../scripts/diversity.py"


rule finetune:
    # The target fine-tuned on a selection.
    input:
        model=parent("finetune", "model"),
        selection=parent("finetune", "selection"),
    output:
        files("finetune"),
        manifest=manifest("finetune"),
    log:
        "results/logs/finetune/{id}.log",
    benchmark:
        "results/benchmarks/finetune/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=PLAN.study.config.train_gpus,
        gpu_mem_mb=gpu_mem("finetune"),
        mem_mb=mem("finetune"),
        runtime=runtime("finetune"),
    params:
        code=code("finetune"),
        parents=parents("finetune"),
        spec=spec("finetune"),
    script:
        "../scripts/finetune.py"


rule evaluation:
    # What a model can do on a task.
    input:
        model=parent("evaluation", "model"),
        task=parent("evaluation", "task"),
    output:
        files("evaluation"),
        manifest=manifest("evaluation"),
    log:
        "results/logs/evaluation/{id}.log",
    benchmark:
        "results/benchmarks/evaluation/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: model_threads()
    resources:
        gpu=1,
        gpu_mem_mb=gpu_mem("evaluation"),
        mem_mb=mem("evaluation"),
        runtime=runtime("evaluation"),
    params:
        code=code("evaluation"),
        parents=parents("evaluation"),
        spec=spec("evaluation"),
    script:
        "../scripts/evaluation.py"


rule report_page:
    # Tables, figures and the page that shows a study.
    input:
        all_parents("report"),
    output:
        files("report"),
        manifest=manifest("report"),
    log:
        "results/logs/report/{id}.log",
    benchmark:
        "results/benchmarks/report/{id}.tsv"
    conda:
        "../../envs/iprox.yaml"
    threads: 1
    resources:
        mem_mb=mem("report"),
        runtime=runtime("report"),
    params:
        code=code("report", "report_page"),
        parents=parents("report"),
        spec=spec("report"),
    script:
        "../scripts/report_page.py"


rule report:
    input:
        made(PLAN.report),


rule study_index:
    # Where a person looks: results/studies/<study>/<run>/<stage> are links to the stages.
    output:
        runs=f"results/studies/{PLAN.name}/runs.parquet",
    log:
        f"results/logs/study_index/{PLAN.name}.log",
    conda:
        "../../envs/iprox.yaml"
    params:
        code=code_hash("iprox.plan.index", SCRIPTS / "study_index.py"),
        plan=PLAN.digest,
        tables=[node.id for node in TABLES.values()],
    script:
        "../scripts/study_index.py"
