"""What each rule asks of the machine, by the formula in `iprox.plan.resources`.

A profile may override any of it (`set-resources`, `set-threads`). Memory and time grow with each
attempt, so that a job killed for want of either is retried with more (`retries` is in the
profiles).
"""

from iprox.plan import scorers
from iprox.plan.resources import Requests, has_gpu

REQUESTS = Requests(DATA_DIR, train_gpus=PLAN.study.config.train_gpus)
JOB_MB = 300  # on a cluster Snakemake itself runs inside each job, beside the stage
CLUSTER_THREADS = 4


def on_gpu():
    """Whether jobs with a model run on GPUs: as capped, else on a cluster, else if there is one."""
    cap = workflow.global_resources.get("gpu")
    if isinstance(cap, int):
        return cap > 0
    return workflow.non_local_exec or has_gpu()


def request(stage, wildcards, attempt):
    """What one job of a stage asks for at this attempt."""
    return REQUESTS.of(PLAN.node(stage, wildcards.id), on_gpu()).times(attempt)


def mem(stage):
    """Main memory in MB."""
    return lambda wildcards, attempt: request(stage, wildcards, attempt).mem_mb + (
        JOB_MB if workflow.non_local_exec else 0
    )


def gpu_mem(stage):
    """Memory of the GPU in MB; for a partition or a GPU type to be chosen by."""
    return lambda wildcards, attempt: request(stage, wildcards, attempt).gpu_mem_mb


def runtime(stage):
    """Minutes until the scheduler gives up."""
    return lambda wildcards, attempt: request(stage, wildcards, attempt).runtime


def small_mem(wildcards, attempt):
    """Main memory in MB of a job that gathers, or computes on made-up data."""
    return 1000 * attempt


def tiny_model_mem(wildcards, attempt):
    """Main memory in MB of a job that trains or reads a tiny model."""
    return 2000 * attempt


def small_runtime(wildcards, attempt):
    """Minutes of such a job."""
    return 60 * attempt


def passes_model(wildcards):
    """Whether a ranking passes texts through a model."""
    return scorers.passes_model(PLAN.node("ranking", wildcards.id))


def model_threads():
    """Threads of a job that runs a model.

    On one machine two such jobs share the cores given to the workflow: on a CPU two jobs with
    half the threads each finish sooner than one after the other. A cluster's job has its own.
    """
    cores = (
        workflow.resource_settings.cores
    )  # None on a cluster, where nothing says how many
    if workflow.remote_exec:
        return cores or 1
    return max(1, cores // 2) if cores else CLUSTER_THREADS
