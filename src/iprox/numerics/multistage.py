"""Influence of pre-training examples on a model that was fine-tuned afterwards.

With fine-tuning as ``argmin L_f(theta) + a/2 |theta - theta_p|^2``, the fine-tuned weights move
with the pre-trained ones as ``a (H_f + a I)^-1``, and these with the weight of an example z as
``-H_p^-1 g_p(z)`` (multi-stage influence functions,
arXiv:2505.05017):

    influence of z on m  =  a  grad m(theta_f)^T (H_f + a I)^-1 H_p^-1 g_p(z)

with the sign of this project: positive when z lowers the loss m. Both solves are taken on the
query's side, which is exact because they are symmetric; z is scored by one inner product of its
gradient at the *pre-trained* model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from iprox.errors import NumericsError
from iprox.numerics.kfac import Damping, LayerCurvature


class LaterStage(NamedTuple):
    """A stage of training that began at the weights of the one before.

    Attributes:
        curvature: Curvature of one layer at the end of the stage, for its own loss.
        proximity: a, how strongly its weights are held to those it began with.
    """

    curvature: LayerCurvature
    proximity: float


def proximity_of(learning_rates: Iterable[float]) -> float:
    """The proximity term that gradient descent stopped early amounts to: one over the sum of steps.

    Args:
        learning_rates: Learning rate of every step of the stage.

    Raises:
        NumericsError: They do not add up to a finite number above 0.
    """
    total = math.fsum(learning_rates)
    if not 0 < total < math.inf:
        raise NumericsError(
            "a stage of training without steps has no proximity term",
            value=f"learning rates that add up to {total}",
            allowed="a finite number above 0",
        )
    return 1 / total


def through_stages(
    gradients: Tensor, later: Sequence[LaterStage], first: LayerCurvature, damping: Damping
) -> Tensor:
    """What pre-training examples' gradients of one layer are multiplied with.

    Args:
        gradients: Gradients of what is measured at the last model, (queries, out, in).
        later: The stages after pre-training, newest first; none gives the ordinary influence.
        first: Curvature of this layer at the pre-trained model.
        damping: Damping of the pre-trained model's curvature.

    Returns:
        (queries, out, in).

    Raises:
        NumericsError: A proximity is not above 0, or a curvature cannot be inverted.
    """
    for curvature, proximity in later:
        if not 0 < proximity < math.inf:
            raise NumericsError(
                "fine-tuning needs a proximity term to depend on where it began",
                where=f"layer {first.name}",
                value=proximity,
                allowed="a finite number above 0",
            )
        gradients = proximity * curvature.solve(gradients, Damping(proximity, "absolute"))
    return first.solve(gradients, damping)
