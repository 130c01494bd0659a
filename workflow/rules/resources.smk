"""What each rule asks of the machine. A profile may override any of it.

Memory and time grow with each attempt, so that a job killed for want of either is retried
with more (`retries` is in the profiles).
"""

MEM_MB = {
    "pool": 2000,
    "task": 1000,
    "target": 2000,
    "split": 1000,
    "warmup": 3000,
    "probe": 2500,
    "decomposition": 1500,
    "sparsity": 3500,
    "factors": 1300,
    "extraction": 2500,
    "proxy": 5500,
    "covariance": 4500,
    "curvature": 2500,
    "eigenvalues": 5500,
    "query": 2400,
    "direction": 4500,
    "features": 2800,
    "query_sketches": 2800,
    "backbone": 1500,
    "encoder": 3500,
    "embeddings": 2000,
    "query_embeddings": 2000,
    "ranking": 1500,
    "fidelity": 1000,
    "selection": 1000,
    "finetune": 3500,
    "evaluation": 1800,
    "report": 1000,
    "synthetic": 1000,
}
GPU_MEM_MB = 16000
RUNTIME_MIN = {
    "warmup": 120,
    "proxy": 120,
    "covariance": 240,
    "curvature": 120,
    "eigenvalues": 240,
    "features": 240,
    "encoder": 240,
    "embeddings": 240,
    "finetune": 240,
    "evaluation": 240,
}


def mem(stage):
    """Main memory in MB."""
    return lambda wildcards, attempt: MEM_MB[stage] * attempt


def gpu_mem(stage):
    """Memory of the GPU in MB."""
    return lambda wildcards, attempt: GPU_MEM_MB * attempt


def runtime(stage):
    """Minutes until the scheduler gives up."""
    return lambda wildcards, attempt: RUNTIME_MIN.get(stage, 60) * attempt


def model_threads():
    """Threads of a job that runs a model: two such jobs share the cores given to the workflow.

    On a CPU two jobs with half the threads each finish sooner than one after the other.
    """
    return max(1, (workflow.cores or 2) // 2)
