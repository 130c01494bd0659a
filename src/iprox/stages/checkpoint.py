"""Stage ``checkpoint``: the target at the end of an earlier epoch of its warm-up."""

from __future__ import annotations

import torch

from iprox.models.device import dtype_of
from iprox.models.load import load_model, load_tokenizer
from iprox.store.job import Job, Metrics
from iprox.training.sft import epoch_folder, save


def make(job: Job) -> Metrics:
    """Write the model of the epoch ``job.params["checkpoint"]["epoch"]`` as a folder of its own.

    TracIn sums influence over checkpoints of the training (arXiv:2002.08484); everything that is
    done at the end of the warm-up is done at each of them.

    Returns:
        The epoch and the number of parameters.

    Raises:
        ModelError: The warm-up kept no weights of that epoch.
    """
    warmup, epoch = job.parents["warmup"], job.params["checkpoint"]["epoch"]
    model = load_model(epoch_folder(warmup, epoch), torch.float32)
    save(model, load_tokenizer(warmup), job.out, dtype_of(job.params["compute"]["dtype"]))
    return {"epoch": epoch, "parameters": sum(p.numel() for p in model.parameters())}
