"""Inputs and output gradients of linear layers, handed over one layer at a time.

During the backward pass each layer's output gradient arrives; the visitor then sees the pair
(inputs X, output gradients D) of that layer and the pair is dropped. No weight ever gets a
``.grad``, and layers that read the same tensor (q, k, v; gate, up) share one X.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from iprox.engine.head import token_losses
from iprox.engine.loss import (
    IGNORE,
    Batch,
    example_losses,
    hidden_states,
    input_embeddings,
    reduced,
)
from iprox.engine.packed import Packed, packed_states
from iprox.errors import ModelError, NumericsError

Visitor = Callable[[str, Tensor, Tensor], None]
"""Called as visitor(layer, X (examples, tokens, in), D (examples, tokens, out))."""

PackedVisitor = Callable[[str, Tensor, Tensor, list[int]], None]
"""Called as visitor(layer, X (tokens, in), D (tokens, out), rows of each example in turn)."""


class _Calls:
    """The calls of one layer in one pass, until the gradient of the last of them is there."""

    def __init__(self) -> None:
        self.expected = 0
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def complete(self, inputs: Tensor, grads: Tensor) -> tuple[Tensor, Tensor] | None:
        """Add one call's pair; all pairs joined along the tokens when it was the last."""
        self.pairs.append((inputs, grads))
        if len(self.pairs) < self.expected:
            return None
        pairs, self.pairs, self.expected = self.pairs, [], 0
        if len(pairs) == 1:
            return pairs[0]
        return torch.cat([x for x, _ in pairs], dim=1), torch.cat([d for _, d in pairs], dim=1)


@contextmanager
def watch(layers: Mapping[str, nn.Linear], visit: Visitor) -> Iterator[list[Tensor]]:
    """Within this context, every backward pass calls ``visit`` once for each of ``layers``.

    The gradient of a module that a model calls several times in a pass is the sum over the
    calls, so its rows of all calls are joined along the tokens before they are handed over.

    Yields:
        Outputs that a backward pass can stop at. When neither weights nor embeddings require
        gradients, the outputs of the first watched layers become the leaves of the graph, and
        nothing is computed for what lies before them.

    Raises:
        ModelError: On leaving: the output of some call had no influence on the loss, so that
            the layer's rows never became complete.
    """
    calls = {name: _Calls() for name in layers}
    leaves: list[Tensor] = []

    def forward_hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def on_gradient(inputs: Tensor, grads: Tensor) -> None:
            rows = calls[name].complete(inputs, grads)
            if rows is not None:
                visit(name, *rows)

        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            inputs = args[0].detach()
            calls[name].expected += 1
            if not output.requires_grad:
                output = output.detach().requires_grad_()
                leaves.append(output)
            output.register_hook(lambda grads: on_gradient(inputs, grads.detach()))
            return output

        return hook

    handles = [module.register_forward_hook(forward_hook(name)) for name, module in layers.items()]
    try:
        yield leaves
    finally:
        for handle in handles:
            handle.remove()
    unfinished = [name for name, layer_calls in calls.items() if layer_calls.expected]
    if unfinished:
        raise ModelError(
            "the output of a layer has no influence on the loss in one of its calls",
            where=unfinished[0],
            fix="exclude this layer in proxy.layers, or use an architecture that calls it for "
            "the next token's logits",
        )


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that are both alive are the same memory seen the same way."""
    return (
        a.data_ptr() == b.data_ptr()
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.dtype == b.dtype
        and a.device == b.device
    )


def input_sites(model: Any, layers: Mapping[str, nn.Linear], batch: Batch) -> dict[str, str]:
    """Which layers read the same tensor: layer -> the first layer that reads its input.

    Args:
        model: A causal LM.
        layers: Layers to look at, in model order.
        batch: Any small batch; it is passed through the model once.

    Raises:
        ModelError: A layer is not called in a pass.
    """
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def remember(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, args[0])  # kept alive, so that no other takes its memory

        return remember

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            hidden_states(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    sites: dict[str, str] = {}
    for name in layers:
        if name not in seen:
            raise ModelError("a layer is not called in a forward pass", where=name)
        owner = (o for o in dict.fromkeys(sites.values()) if same_tensor(seen[o], seen[name]))
        sites[name] = next(owner, name)
    return sites


def backward_pass(
    model: Any,
    layers: Mapping[str, nn.Linear],
    batch: Batch,
    visit: Visitor,
    reduction: str = "token_mean",
    example_ids: Sequence[str] | None = None,
    *,
    skip_nonfinite: bool = False,
) -> Tensor:
    """One forward and one backward pass over a batch with frozen weights.

    Args:
        model: A causal LM whose parameters do not require gradients.
        layers: Layers to visit.
        batch: Examples, right-padded. Output gradients at padding are exactly zero.
        visit: Receives each layer's inputs and output gradients of the *sum* of the examples'
            losses, so that the rows of an example are its own gradient.
        reduction: Loss of an example: ``token_mean`` or ``token_sum``.
        example_ids: Names of the examples, for messages.
        skip_nonfinite: Go on when the loss of an example is not finite; its rows mean nothing.

    Returns:
        Loss of every example, (examples,).

    Raises:
        ModelError: A layer's output has no influence on the loss.
        NumericsError: A loss is not finite.
    """
    embeds = input_embeddings(model, batch)
    with watch(layers, visit), torch.enable_grad():
        losses = example_losses(model, batch, reduction, embeds)
        if not skip_nonfinite:
            check_finite(losses, example_ids)
        torch.autograd.backward(losses.sum(), inputs=[embeds])
    return losses.detach()


def packed_pass(
    model: Any,
    layers: Mapping[str, nn.Linear],
    packed: Packed,
    visit: PackedVisitor,
    reduction: str = "token_mean",
    check: Callable[[Tensor], None] | None = None,
    relabel: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """One forward and one backward pass over examples without padding, with frozen weights.

    Computes what any exact method has to, and nothing else: the head only at supervised
    positions, no gradient before the first watched layer, no token of padding, attention only
    inside examples.

    Args:
        model: A causal LM whose parameters do not require gradients.
        layers: Layers to visit.
        packed: The examples.
        visit: Receives each layer's inputs and output gradients of the *sum* of the examples'
            losses, so that the rows of an example are its own gradient. Layers that read the
            same tensor receive the same ``X``.
        reduction: Loss of an example: ``token_mean`` or ``token_sum``.
        check: Sees the losses (examples,) before the backward pass, and may raise.
        relabel: Sees the last hidden states (supervised tokens, hidden) and gives the tokens
            (supervised tokens,) whose loss is taken instead of that of the labels.

    Returns:
        Loss of every example, (examples,).

    Raises:
        ModelError: A layer's output has no influence on the loss, or the model's attention
            cannot be packed.
    """
    lengths, total = packed.lengths, len(packed.input_ids)

    def unpadded(name: str, inputs: Tensor, output_grads: Tensor) -> None:
        calls = inputs.shape[1] // total
        x, d = inputs[0], output_grads[0]
        if calls > 1:
            x, d = _by_example(x, lengths, calls), _by_example(d, lengths, calls)
        visit(name, x, d, [n * calls for n in lengths])

    supervised = packed.targets != IGNORE
    with frozen(model), watch(layers, unpadded) as leaves, torch.enable_grad():
        states = packed_states(model, packed)[supervised]
        targets = packed.targets[supervised] if relabel is None else relabel(states.detach())
        per_token = token_losses(model, states, targets)
        losses = reduced(per_token, packed.owners[supervised], len(lengths), reduction)
        if check is not None:
            check(losses.detach())
        torch.autograd.backward(losses.sum(), inputs=leaves)
    return losses.detach()


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within this context no weight of the model requires a gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _by_example(rows: Tensor, lengths: list[int], calls: int) -> Tensor:
    """Rows of several calls of a layer, reordered so that each example's are together."""
    parts = [call.split(lengths) for call in rows.chunk(calls)]
    return torch.cat([part[i] for i in range(len(lengths)) for part in parts])


def check_finite(losses: Tensor, example_ids: Sequence[str] | None = None) -> None:
    """Raise ``NumericsError`` naming the first example of the batch whose loss is not finite."""
    bad = (~torch.isfinite(losses.detach())).nonzero().flatten().tolist()
    if bad:
        raise NumericsError(
            "the loss of an example is not finite",
            where=example_name(bad[0], example_ids),
            value=float(losses.detach()[bad[0]]),
            allowed="a finite number",
            fix="look for broken text, or for weights or a precision that overflow",
        )


def example_name(place: int, example_ids: Sequence[str] | None) -> str:
    """How a message names an example of a batch: by its id, or else by its place."""
    return f"place {place} in the batch" if example_ids is None else f"example {example_ids[place]}"
