"""Which linear layers of a decoder are replaced and scored.

Those of every decoder block: attention's q, k, v, o and the feed-forward network's gate, up,
down. Token embedding, head, norms and biases are never replaced (IProX, arXiv:2602.17835).
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping

from torch import nn

from iprox.errors import ModelError
from iprox.models.lowrank import LowRankLinear
from iprox.study.schema import LayersSection

BLOCK_LINEAR = re.compile(
    r"(^|.*\.)layers\.\d+\.(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)$"
)
FACTORS = ("right", "left")


def select(names: Iterable[str], section: LayersSection) -> list[str]:
    """Names of block linears that the config includes and does not exclude, in model order.

    Raises:
        ModelError: A pattern matches no layer, or nothing is left.
    """
    candidates = [n for n in names if BLOCK_LINEAR.match(n)]
    if not candidates:
        raise ModelError(
            "the model has no decoder blocks of a known shape",
            allowed="layers.<i>.self_attn.{q,k,v,o}_proj and layers.<i>.mlp.{gate,up,down}_proj",
            fix="use a Llama, Qwen2, Qwen3 or Gemma3 style model",
        )
    for pattern in (*section.include, *section.exclude):
        if not any(_matches(name, pattern) for name in candidates):
            raise ModelError(
                "a layer pattern matches nothing",
                where="proxy.layers",
                value=pattern,
                allowed=f"names such as {', '.join(candidates[:7])}, to {candidates[-1]}",
                fix="correct the pattern; * stands for any text",
            )
    kept = [
        name
        for name in candidates
        if any(_matches(name, p) for p in section.include)
        and not any(_matches(name, p) for p in section.exclude)
    ]
    if not kept:
        raise ModelError(
            "the layer patterns leave no layer",
            where="proxy.layers",
            value={"include": section.include, "exclude": section.exclude},
            allowed=f"patterns that leave at least one of {len(candidates)} layers",
            fix="exclude fewer layers",
        )
    return kept


def linear_names_from_shapes(
    shapes: Mapping[str, tuple[int, ...]], section: LayersSection
) -> list[str]:
    """The same, from the names and shapes of a checkpoint's tensors.

    Args:
        shapes: Tensor name (``....q_proj.weight``) -> shape.
        section: The config's patterns.

    Raises:
        ModelError: As :func:`select`.
    """
    names = [
        n.removesuffix(".weight")
        for n, s in shapes.items()
        if n.endswith(".weight") and len(s) == 2
    ]
    return select(sorted(names, key=_natural), section)


def block_linears(model: nn.Module, section: LayersSection) -> dict[str, nn.Linear]:
    """Dense linear layers of a target model that the config selects, in model order.

    Raises:
        ModelError: As :func:`select`.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    return {name: linears[name] for name in select(linears, section)}


def replaced_layer(name: str) -> str:
    """The layer of the dense model that a scored linear is, or is a factor of."""
    return name.removesuffix(".left").removesuffix(".right")


def scored_linears(model: nn.Module, section: LayersSection) -> dict[str, nn.Linear]:
    """Linear layers whose weight gradients make up an example's gradient feature.

    Dense layers count as they are; of a factorised layer both factors count, under the names
    ``<layer>.right`` and ``<layer>.left``.

    Raises:
        ModelError: As :func:`select`.
    """
    modules = dict(model.named_modules())
    layers = {n for n, m in modules.items() if isinstance(m, (nn.Linear, LowRankLinear))}
    chosen = select((n for n in modules if n in layers), section)
    scored: dict[str, nn.Linear] = {}
    for name in chosen:
        module = modules[name]
        if isinstance(module, LowRankLinear):
            scored |= {f"{name}.{factor}": getattr(module, factor) for factor in FACTORS}
        else:
            assert isinstance(module, nn.Linear)
            scored[name] = module
    return scored


def _matches(name: str, pattern: str) -> bool:
    """Whether a pattern matches a whole layer name or its end."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"*.{pattern}")


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sort key that puts block 2 before block 10 and, inside a block, q k v o gate up down."""
    order = {
        n: i
        for i, n in enumerate("q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split())
    }
    parts = name.split(".")
    return [(0, int(p)) if p.isdigit() else (1, f"{order[p]}" if p in order else p) for p in parts]
