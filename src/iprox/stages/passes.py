"""What every stage that passes texts through a model needs: the model, batches, free memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from iprox.data.batches import collate, token_batches
from iprox.data.chat import Encoded, pad_id
from iprox.engine.capture import input_sites
from iprox.engine.compiled import compile_between_layers
from iprox.engine.loss import IGNORE, Batch
from iprox.engine.scoring import batch_tokens
from iprox.models.classifier import class_ids
from iprox.models.device import dtype_of, pick_device
from iprox.models.layers import scored_linears
from iprox.models.load import load_model, load_tokenizer
from iprox.models.lowrank import LowRankBackward
from iprox.store.job import Job
from iprox.study.schema import LayersSection


class Reader(NamedTuple):
    """A frozen model, its tokenizer, and the linear layers that count.

    Attributes:
        model: A causal LM, or a classifier.
        tokenizer: Its tokenizer.
        layers: Layers that count.
        device: Where it is.
    """

    model: Any
    tokenizer: Any
    layers: dict[str, nn.Linear]
    device: torch.device

    @property
    def labels(self) -> dict[str, int] | None:
        """Label -> its number, of a classifier; None of a causal LM."""
        return class_ids(self.model)

    def batches(self, encoded: Sequence[Encoded]) -> Iterator[tuple[list[int], Batch]]:
        """Batches of similar length on the model's device, each with its examples' indices."""
        lengths = [len(e) for e in encoded]
        for indices in token_batches(lengths, batch_tokens(self.device)):
            tensors = collate([encoded[i] for i in indices], pad_id(self.tokenizer))
            batch = Batch(*tensors).to(self.device)
            if self.labels is not None:  # the last place is the label's, and holds no token
                batch = batch._replace(lengths=batch.lengths - 1)
            yield indices, batch


def open_reader(job: Job, role: str) -> Reader:
    """Load the parent model ``role`` in the precision and with the attention of the job.

    Raises:
        ModelError: The model cannot be loaded or compiled, or a layer pattern does not fit it.
    """
    reader = open_model(job, role)
    if job.params["compute"].get("compile", False):
        compile_between_layers(reader.model)
    layers = scored_linears(reader.model, job.section(LayersSection, "layers"))
    return reader._replace(layers=layers)


def open_model(job: Job, role: str) -> Reader:
    """Load the parent model ``role`` for forward passes, in which no layer counts.

    Raises:
        ModelError: The model cannot be loaded.
    """
    compute, device = job.params["compute"], pick_device()
    folder = job.parents[role]
    model = load_model(folder, dtype_of(compute["dtype"]), compute["attention"], device)
    return Reader(model, load_tokenizer(folder), {}, device)


def model_sizes(reader: Reader) -> dict[str, int]:
    """Parameters of the model, tied ones counted once, and weights of its scored layers.

    Factors that only the backward pass goes through count too.
    """
    thin = [m for m in reader.model.modules() if isinstance(m, LowRankBackward)]
    return {
        "parameters": sum(p.numel() for p in reader.model.parameters())
        + sum(m.left.numel() + m.right.numel() for m in thin),
        "scored_parameters": sum(layer.weight.numel() for layer in reader.layers.values()),
    }


def free_bytes(device: torch.device) -> int:
    """Memory that can still be taken on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)


def fingerprint(layers: Mapping[str, nn.Linear]) -> str:
    """A digest that tells models with layers of these names and shapes apart: of first rows."""
    digest = hashlib.sha256()
    for name, layer in layers.items():
        row = layer.weight[0].detach().double().cpu().numpy()
        digest.update(f"{name} {tuple(layer.weight.shape)}".encode() + row.tobytes())
    return digest.hexdigest()[:16]


def find_sites(reader: Reader) -> dict[str, str]:
    """Layer -> the first layer that reads its input, found by passing two tokens."""
    ids = torch.zeros(1, 2, dtype=torch.long)
    batch = Batch(ids, torch.full_like(ids, IGNORE), torch.tensor([2])).to(reader.device)
    return input_sites(reader.model, reader.layers, batch)


def layer_groups(
    sizes: Mapping[str, float], sites: Mapping[str, str], budget: float
) -> Iterator[list[str]]:
    """Layers in groups of at most ``budget`` bytes, a pass each; at least one layer in each.

    Args:
        sizes: Layer -> bytes it needs, in model order.
        sites: Layer -> the first layer that reads its input; layers of a site stay together.
        budget: Bytes there are.
    """
    group: list[str] = []
    used = 0.0
    for name, size in sizes.items():
        if group and used + size > budget and sites[name] == name:
            yield group
            group, used = [], 0
        group.append(name)
        used += size
    yield group


def column_blocks(n_columns: int, column_bytes: float, budget: float) -> Iterator[range]:
    """Columns in blocks that fit into ``budget`` bytes, at least one in each."""
    size = max(1, int(budget // column_bytes))
    for start in range(0, n_columns, size):
        yield range(start, min(start + size, n_columns))
