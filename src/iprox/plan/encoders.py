"""What stages of text encoders take: operations, memory and disk."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from iprox.plan.nodes import Node

if TYPE_CHECKING:
    from iprox.plan.estimate import Estimator, Need

STEP_TOKENS = 200
"""Tokens of a text in a training block when nothing has been counted."""

COPIES = 5
"""Tensors of the weights' size in training: gradients, both Adam moments, the best epoch's."""


ACTIVATIONS = 7
"""Bytes of activations of a token in training, in units of the products per unit of width: about 20
numbers of four bytes per unit of width and block, which has 12 products per unit squared."""


class EncoderSizes(NamedTuple):
    """Sizes of an encoder."""

    parameters: int
    products: int  # parameters that every token is multiplied with
    dim: int


KNOWN = {"minilm-l6": EncoderSizes(22_713_216, 10_646_784, 384)}
"""Encoders that come in packages."""

ASSUMED = EncoderSizes(150_000_000, 110_000_000, 768)
"""An encoder of usual size, where its own is not known."""


def sizes_of(node: Node) -> EncoderSizes:
    """Sizes of the encoder that a stage is, or is made with."""
    while node.stage != "backbone":
        role = "backbone" if node.stage == "encoder" else "encoder"
        node = node.parents[role]
    return KNOWN.get(node.params["encoder"]["model"], ASSUMED)


def encoder_need(estimator: Estimator, node: Node) -> Need:
    """What a stage of an encoder takes."""
    from iprox.plan.estimate import Need

    sizes = sizes_of(node)
    memory = estimator.process + 4 * sizes.parameters
    if node.stage == "backbone":
        return Need(memory=2 * memory, disk=4 * sizes.parameters)
    if node.stage == "encoder":
        tokens = _taught_tokens(estimator, node)
        return Need(
            flops=6 * sizes.products * tokens,
            memory=memory + COPIES * 4 * sizes.parameters + _activations(sizes, node),
            disk=4 * sizes.parameters,
            tokens=tokens,
        )
    if node.stage == "embeddings":
        n = estimator.volumes.pool(node.parents["pool"])
        row_bytes = 2 * sizes.dim + 60
    else:
        task = node.parents["task"].params["task"]
        n, row_bytes = task["queries"] or estimator.volumes.kind_queries(task["kind"]), 0
    tokens = n * min(STEP_TOKENS, node.params["encoder"]["max_length"])
    flops = 2 * sizes.products * tokens
    return Need(flops=flops, memory=memory, disk=n * row_bytes, tokens=tokens)


def _activations(sizes: EncoderSizes, node: Node) -> float:
    """Bytes that one training block keeps for its backward pass."""
    section = node.params["encoder"]
    tokens = (section["queries"] + section["candidates"]) * section["max_length"]
    return ACTIVATIONS * sizes.products / sizes.dim * tokens


def _taught_tokens(estimator: Estimator, node: Node) -> float:
    """Tokens that pass an encoder, forward and backward, while it is taught."""
    section = node.params["encoder"]
    labelled = estimator.split_texts(node.parents["teach"]).n * (1 - section["validation"])
    tasks = [p.params["task"] for role, p in node.parents.items() if role.startswith("task/")]
    queries = sum(t["queries"] or estimator.volumes.kind_queries(t["kind"]) for t in tasks)
    steps = max(
        math.ceil(labelled / section["candidates"]),
        math.ceil(queries * (1 - section["heldout"]) / section["queries"]),
    )
    each = min(STEP_TOKENS, section["max_length"])
    return section["epochs"] * steps * (section["queries"] + section["candidates"]) * each
