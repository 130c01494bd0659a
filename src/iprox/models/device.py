"""Device, precision and threads, decided in this one place."""

from __future__ import annotations

import fcntl
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from iprox.errors import ModelError
from iprox.numerics import matmul

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def pick_device() -> torch.device:
    """CUDA when this process sees a GPU, else the CPU.

    ``CUDA_VISIBLE_DEVICES`` decides which: a scheduler sets it, and an empty value means CPU.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def claim_gpus(wanted: int, count: int, folder: Path | None = None) -> list[int]:
    """Take GPUs that no other job of this machine has, and make them the only visible ones.

    Snakemake counts GPUs and hands out none. Each is a lock file, held until this process ends
    however it ends; when too few are free, this takes none and waits. Nothing happens where a
    scheduler has chosen already, or where there is no choice.

    Args:
        wanted: GPUs of the job.
        count: GPUs of the machine.
        folder: Where the lock files are; that for temporary files if absent.

    Returns:
        The numbers of the GPUs; none when nothing had to be claimed.

    Raises:
        ModelError: The machine has fewer GPUs than the job wants.
    """
    if "CUDA_VISIBLE_DEVICES" in os.environ or count == 0:
        return []
    if wanted > count:
        raise ModelError(
            "a job wants more GPUs than this machine has",
            where="train_gpus",
            value=wanted,
            allowed=f"at most {count}",
        )
    if count == 1:
        return []
    locks = [(folder or Path(tempfile.gettempdir())) / f"iprox-gpu-{i}.lock" for i in range(count)]
    while True:
        taken = {n: lock for n, path in enumerate(locks) if (lock := _try_lock(path)) is not None}
        for number in list(taken)[wanted if len(taken) >= wanted else 0 :]:
            os.close(taken.pop(number))
        if taken:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, taken))
            return list(taken)
        time.sleep(1.0)


def _try_lock(path: Path) -> int | None:
    """The descriptor of a lock file that is now held, or None when another process has it."""
    descriptor = _open_lock(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _open_lock(path: Path) -> int:
    """Open a lock file, which may be another user's; to lock it, reading is enough.

    An existing one is not asked for as if it were to be created: in a folder for temporary files
    Linux refuses that to all but its owner (`fs.protected_regular`).
    """
    how = os.O_RDONLY | os.O_CLOEXEC
    with suppress(FileExistsError):
        descriptor = os.open(path, how | os.O_CREAT | os.O_EXCL)
        os.fchmod(descriptor, 0o444)  # whatever this user's umask
        return descriptor
    return os.open(path, how)


def set_threads(threads: int) -> None:
    """Use this many CPU threads in every library of this process, and the fastest exact products.

    See :mod:`iprox.numerics.matmul` for what that means on which processor.
    """
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    torch.set_num_threads(threads)
    matmul.use_fastest()


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype of a config value.

    Raises:
        ModelError: The name is not one of float32, bfloat16, float64.
    """
    try:
        return DTYPES[name]
    except KeyError:
        raise ModelError("unknown precision", value=name, allowed=", ".join(DTYPES)) from None


def make_deterministic(seed: int) -> None:
    """Seed torch and ask for kernels that give the same bytes each time."""
    torch.manual_seed(seed)
    torch.use_deterministic_algorithms(True, warn_only=True)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
