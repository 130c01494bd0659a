"""Stage ``checkpoint``: the target at the end of an earlier epoch of its warm-up."""

from __future__ import annotations

import shutil

import torch

from iprox.models.device import dtype_of
from iprox.models.load import load_model, load_tokenizer
from iprox.models.moments import ADAPTERS, MOMENTS
from iprox.store.job import Job, Metrics
from iprox.training.sft import epoch_folder, save


def make(job: Job) -> Metrics:
    """Write the model of the epoch ``job.params["checkpoint"]["epoch"]`` as a folder of its own.

    Adam's moments and the low-rank updates of that time are beside it when the warm-up kept them.

    TracIn sums influence over checkpoints of the training (arXiv:2002.08484); everything that is
    done at the end of the warm-up is done at each of them.

    Returns:
        The epoch and the number of parameters.

    Raises:
        ModelError: The warm-up kept no weights of that epoch.
    """
    warmup, epoch = job.parents["warmup"], job.params["checkpoint"]["epoch"]
    kept = epoch_folder(warmup, epoch)
    model = load_model(kept, torch.float32)
    save(model, load_tokenizer(warmup), job.out, dtype_of(job.params["compute"]["dtype"]))
    for name in (MOMENTS, ADAPTERS):
        if (kept / name).is_file():
            shutil.copyfile(kept / name, job.out / name)
    return {"epoch": epoch, "parameters": sum(p.numel() for p in model.parameters())}
