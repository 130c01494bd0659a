"""The matrix products of a loaded model, for counting operations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from torch import nn

from iprox.models.classifier import output_layer
from iprox.models.lowrank import LowRankBackward, LowRankLinear
from iprox.numerics.flops import SECOND_READERS, Linear, Load, Network


class Text(Protocol):
    """What is counted of an encoded example."""

    @property
    def supervised(self) -> int:
        """Tokens with a loss."""
        ...

    def __len__(self) -> int: ...


def network_of(model: Any, scored: Mapping[str, nn.Linear] | None = None) -> Network:
    """Shapes of a model's matrix products.

    Args:
        model: A causal LM, dense or with factors in place of weights, or a classifier.
        scored: Linear layers whose weight gradients count; none when absent.
    """
    counted = {id(layer) for layer in (scored or {}).values()}
    factors = {
        id(side)
        for module in model.modules()
        if isinstance(module, LowRankLinear)
        for side in (module.left, module.right)
    }
    linears = Counter(
        Linear(
            module.out_features,
            module.in_features,
            scored=id(module) in counted,
            factor=id(module) in factors,
            own_input=not name.removesuffix(".right").endswith(SECOND_READERS),
            backward_rank=module.rank if isinstance(module, LowRankBackward) else 0,
        )
        for name, module in model.base_model.named_modules()
        if isinstance(module, nn.Linear)
    )
    config = model.config
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    attention = heads * head_dim * config.num_hidden_layers
    return Network(dict(linears), attention, output_layer(model).weight.numel())


def load_of(encoded: Iterable[Text]) -> Load:
    """Token counts of encoded examples that have a loss; the others are not passed."""
    kept = [e for e in encoded if e.supervised]
    return Load.of(map(len, kept), sum(e.supervised for e in kept))
