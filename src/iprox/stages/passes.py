"""What every stage that passes texts through a model needs: the model, batches, free memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from iprox.data.batches import collate, token_batches
from iprox.data.chat import Encoded, pad_id
from iprox.engine.loss import Batch
from iprox.engine.scoring import batch_tokens
from iprox.models.device import dtype_of, pick_device
from iprox.models.layers import scored_linears
from iprox.models.load import load_model, load_tokenizer
from iprox.store.job import Job
from iprox.study.schema import LayersSection


class Reader(NamedTuple):
    """A frozen model, its tokenizer, and the linear layers that count."""

    model: Any
    tokenizer: Any
    layers: dict[str, nn.Linear]
    device: torch.device

    def batches(self, encoded: Sequence[Encoded]) -> Iterator[tuple[list[int], Batch]]:
        """Batches of similar length on the model's device, each with its examples' indices."""
        lengths = [len(e) for e in encoded]
        for indices in token_batches(lengths, batch_tokens(self.device)):
            tensors = collate([encoded[i] for i in indices], pad_id(self.tokenizer))
            yield indices, Batch(*tensors).to(self.device)


def open_reader(job: Job, role: str) -> Reader:
    """Load the parent model ``role`` in the precision and with the attention of the job.

    Raises:
        ModelError: The model cannot be loaded, or a layer pattern does not fit it.
    """
    compute, device = job.params["compute"], pick_device()
    folder = job.parents[role]
    model = load_model(folder, dtype_of(compute["dtype"]), compute["attention"], device)
    layers = scored_linears(model, job.section(LayersSection, "layers"))
    return Reader(model, load_tokenizer(folder), layers, device)


def model_sizes(reader: Reader) -> dict[str, int]:
    """Parameters of the model, tied ones counted once, and weights of its scored layers."""
    return {
        "parameters": sum(p.numel() for p in reader.model.parameters()),
        "scored_parameters": sum(layer.weight.numel() for layer in reader.layers.values()),
    }


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
