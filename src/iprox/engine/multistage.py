"""Gradients at a fine-tuned model of another objective, over the layers it shares with its origin.

A fine-tuned model may have another head, a classifier say, and be measured by another loss than
next tokens. What it shares with the pre-trained model is the layers of its blocks: gradients and
curvature are taken for these, at the fine-tuned model for its objective, and
:func:`iprox.numerics.multistage.through_stages` turns them into what the candidates' gradients at
the pre-trained model are scored against (a :class:`iprox.engine.scoring.Scorer` as ever).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from iprox.engine.capture import PackedVisitor, check_finite, frozen, watch
from iprox.errors import ModelError
from iprox.numerics.ghost import widen


class GradientSum:
    """A visitor that sums weight gradients over all examples.

    Attributes:
        sums: Layer -> (out, in), in at least float32.
    """

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        self.sums = {
            name: widen(layer.weight[:0]).new_zeros(layer.weight.shape)
            for name, layer in layers.items()
        }

    def __call__(self, name: str, x: Tensor, d: Tensor, rows: list[int]) -> None:
        """Add a batch's rows of one layer."""
        self.sums[name].addmm_(widen(d).mT, widen(x))


def shared_layers(
    fine_tuned: Mapping[str, nn.Linear], pretrained: Mapping[str, nn.Linear]
) -> list[str]:
    """Names of the layers that two models have in common, in the order of the first.

    Raises:
        ModelError: There are none, or one has another shape in the other model.
    """
    names = [name for name in fine_tuned if name in pretrained]
    if not names:
        raise ModelError(
            "the fine-tuned and the pre-trained model share no layer",
            value=f"{len(fine_tuned)} and {len(pretrained)} layers",
            fix="give two stages of one model: the names of their blocks' layers must be equal",
        )
    for name in names:
        shapes = [tuple(layers[name].weight.shape) for layers in (fine_tuned, pretrained)]
        if shapes[0] != shapes[1]:
            raise ModelError(
                "a layer has another shape in the pre-trained model",
                where=name,
                value=shapes[1],
                allowed=shapes[0],
            )
    return names


def objective_pass(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    objective: Callable[[], Tensor],
    lengths: Sequence[int],
    visit: PackedVisitor,
    example_ids: Sequence[str] | None = None,
) -> Tensor:
    """One forward and one backward pass under any objective, with frozen weights.

    Args:
        model: The model that the objective calls.
        layers: Layers to visit.
        objective: Passes a right-padded batch through the model and returns a loss for each
            example, (examples,); the loss of one must not depend on the others.
        lengths: Tokens of each example, without padding.
        visit: Receives each layer's rows of the examples' tokens one behind the other, as in
            :func:`iprox.engine.capture.packed_pass`.
        example_ids: Names of the examples, for messages.

    Returns:
        The losses, (examples,).

    Raises:
        ModelError: A layer's output has no influence on the objective.
        NumericsError: A loss is not finite.
    """

    def unpadded(name: str, inputs: Tensor, output_grads: Tensor) -> None:
        width = inputs.shape[1]
        places = torch.arange(width, device=inputs.device)
        real = places[None, :] < torch.tensor(lengths, device=inputs.device)[:, None]
        visit(name, inputs[real], output_grads[real], list(lengths))

    with frozen(model), watch(layers, unpadded) as leaves, torch.enable_grad():
        losses = objective()
        check_finite(losses, example_ids)
        torch.autograd.backward(losses.sum(), inputs=leaves)
    return losses.detach()
