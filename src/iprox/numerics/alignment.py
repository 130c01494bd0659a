"""How far a proxy's gradients are from the target's: distances, their derivatives, the anchor.

For a layer with dense weight gradient G (out, in) in the target and factors L (out, rank),
R (rank, in) in the proxy, whose own gradients are u_L and u_R, the alignment loss of IProX
(arXiv:2602.17835, Eq. 6) is the mean over layers of

    d(u_L, G Rᵀ) + d(u_R, Lᵀ G),      d(u, v) = 1 - cos(u, v) of the flattened matrices.

G Rᵀ and Lᵀ G are what the factors' gradients would be if the proxy's dense gradient were the
target's. With the target layer's inputs X (tokens, in) and output gradients D (tokens, out),
G = Dᵀ X, and G itself (out, in) is never formed: G Rᵀ = Dᵀ (X Rᵀ) and Lᵀ G = (D L)ᵀ X.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from iprox.numerics.ghost import widen

ELEMENTS_PER_SLICE = 1 << 25
"""Numbers held at once while the examples' dense gradients are compared."""


class Observed(NamedTuple):
    """What a target layer saw in a batch, over all its tokens."""

    inputs: Tensor  # X (tokens, in)
    output_grads: Tensor  # D (tokens, out)


class FactorPair(NamedTuple):
    """Something with the shapes of a layer's two factors: themselves, or gradients of them."""

    left: Tensor  # (out, rank)
    right: Tensor  # (rank, in)


class AlignmentTerms(NamedTuple):
    """The alignment loss and what it is made of."""

    loss: Tensor  # scalar
    cosines: Tensor  # (layers, 2): left, right; NaN where a gradient is zero
    n_zero: int  # distances left out because a gradient is zero


def cosine_distance(u: Tensor, v: Tensor) -> Tensor:
    """1 - cos(u, v) of two flattened tensors of one shape, in [0, 2]; differentiable in both.

    Computed as ‖u/‖u‖ - v/‖v‖‖² / 2, which does not cancel when the two nearly agree. No epsilon
    is added: each tensor is divided by its largest entry first, so neither tiny gradients nor
    their squares underflow. A zero tensor has no direction: the distance and its derivatives
    are then 0.
    """
    u_unit, u_live = _unit(u)
    v_unit, v_live = _unit(v)
    return (u_unit - v_unit).square().sum() / 2 * (u_live & v_live)


def cosine_distance_derivatives(u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives of :func:`cosine_distance` with respect to u and v, in closed form.

    With û = u/‖u‖: dd/du = (cos · û - v̂) / ‖u‖, and the same with u and v exchanged.
    """
    u_unit, u_live = _unit(u)
    v_unit, v_live = _unit(v)
    cosine = (u_unit * v_unit).sum()
    live = u_live & v_live
    du = (cosine * u_unit - v_unit) * live / _norm(u)
    dv = (cosine * v_unit - u_unit) * live / _norm(v)
    return du, dv


def pair_derivatives(proxy: FactorPair, target: FactorPair) -> tuple[FactorPair, FactorPair]:
    """Derivatives of one layer's two distances by the proxy's and by the target's gradients."""
    left = cosine_distance_derivatives(proxy.left, target.left)
    right = cosine_distance_derivatives(proxy.right, target.right)
    return FactorPair(left[0], right[0]), FactorPair(left[1], right[1])


def project(observed: Observed, factors: FactorPair) -> FactorPair:
    """The target's gradient carried over to the factors: (G Rᵀ, Lᵀ G) (IProX, Eq. 6).

    The map is linear in (L, R) and its own adjoint, so it also takes derivatives by its results
    to derivatives by the factors.

    Args:
        observed: Inputs and output gradients of the target's layer.
        factors: L and R; the result is differentiable in them.
    """
    inputs, output_grads = (t.to(factors.left.dtype) for t in observed)
    return FactorPair(
        output_grads.T @ (inputs @ factors.right.T),
        (output_grads @ factors.left).T @ inputs,
    )


def alignment_loss(
    proxy: Sequence[FactorPair], target: Iterable[FactorPair], distance_weight: float = 1.0
) -> AlignmentTerms:
    """Mean over layers of both gradient distances (IProX, arXiv:2602.17835, Eq. 6).

    Args:
        proxy: Gradients of each layer's factors.
        target: The target's projected gradients, in the same order.
        distance_weight: Factor on the sum of a layer's two distances.

    Returns:
        Loss, in [0, 4 distance_weight], differentiable in both arguments, and its parts.
    """
    distances, live = [], []
    for ours, theirs in zip(proxy, target, strict=True):
        for u, v in zip(ours, theirs, strict=True):
            distances.append(cosine_distance(u, v))
            live.append(_is_live(u) & _is_live(v))
    distance, lives = torch.stack(distances), torch.stack(live)
    cosines = torch.where(lives, 1 - distance.detach(), torch.nan)
    loss = distance_weight * distance.sum() / len(proxy)
    return AlignmentTerms(loss, cosines.reshape(-1, 2), int((~lives).sum()))


def mean_terms(layers: Sequence[AlignmentTerms]) -> AlignmentTerms:
    """The terms of all layers, from those of each by itself."""
    loss = torch.stack([one.loss for one in layers]).mean()
    cosines = torch.cat([one.cosines for one in layers])
    return AlignmentTerms(loss, cosines, sum(one.n_zero for one in layers))


def anchor(teacher: Tensor, student: Tensor, owner: Tensor, tau: float = 1.0) -> Tensor:
    """Distance of the proxy's predictions from the target's (IProX, arXiv:2602.17835, Eq. 7).

    tau² KL(softmax(teacher / tau) ‖ softmax(student / tau)): the mean over an example's tokens,
    then over examples.

    Args:
        teacher: Logits of the target, (tokens, vocabulary).
        student: Logits of the proxy, likewise; the result is differentiable in them.
        owner: Place in the batch of the example each token belongs to, (tokens,).
        tau: Temperature.

    Returns:
        Scalar, at least 0 up to rounding.
    """
    expected = F.log_softmax(teacher.to(student.dtype) / tau, dim=-1)
    found = F.log_softmax(student / tau, dim=-1)
    token_kl = (expected.exp() * (expected - found)).sum(-1)
    counts = owner.bincount().to(token_kl.dtype)
    weights = 1 / (counts[owner] * (counts > 0).sum())
    return tau**2 * (token_kl * weights).sum()


def example_gram(inputs: Tensor, output_grads: Tensor) -> Tensor:
    """Inner products of the examples' gradients of one weight.

    Entry (i, j) is <Gᵢ, Gⱼ> with Gᵢ = Dᵢᵀ Xᵢ. Short examples are compared token by token,
    Σ (D Dᵀ) ∘ (X Xᵀ), the ghost form; long ones through slices of Gᵢ, whichever costs less.

    Args:
        inputs: (examples, tokens, in).
        output_grads: (examples, tokens, out), zero at padding.

    Returns:
        (examples, examples), in float32 or better.
    """
    inputs, output_grads = widen(inputs), widen(output_grads)
    n_examples, tokens, in_dim = inputs.shape
    out_dim = output_grads.shape[2]
    if n_examples * tokens * (in_dim + out_dim) < in_dim * out_dim:
        return _ghost_gram(inputs, output_grads)
    gram = inputs.new_zeros(n_examples, n_examples)
    rows = max(1, ELEMENTS_PER_SLICE // (n_examples * in_dim))
    for slice_grads in output_grads.split(rows, dim=2):
        grads = (slice_grads.transpose(1, 2) @ inputs).flatten(1)  # (examples, rows * in)
        gram += grads @ grads.T
    return gram


def gram_agreement(ours: Tensor, theirs: Tensor) -> float:
    """Spearman correlation of two sets of pairwise cosines; NaN when one has no order.

    Args:
        ours: Inner products (examples, examples); its diagonal holds the squared norms.
        theirs: Those of the same examples in another model.
    """
    from scipy import stats

    rows, columns = np.triu_indices(len(ours), k=1)
    left, right = (_gram_cosines(gram).cpu().numpy()[rows, columns] for gram in (ours, theirs))
    if not (len(left) > 1 and np.ptp(left) > 0 and np.ptp(right) > 0):
        return float("nan")
    return float(stats.spearmanr(left, right).statistic)


def _gram_cosines(gram: Tensor) -> Tensor:
    """Cosines (examples, examples); 0 with an example whose gradient is zero."""
    norms = gram.diagonal().sqrt()
    scale = torch.where(norms > 0, 1 / norms, 0)
    return gram * scale * scale[:, None]


def _ghost_gram(inputs: Tensor, output_grads: Tensor) -> Tensor:
    n_examples, tokens, _ = inputs.shape
    x, d = inputs.flatten(0, 1), output_grads.flatten(0, 1)
    rows = [
        ((d_i @ d.T) * (x_i @ x.T)).reshape(tokens, n_examples, tokens).sum((0, 2))
        for x_i, d_i in zip(inputs, output_grads, strict=True)
    ]
    return torch.stack(rows)


def _is_live(tensor: Tensor) -> Tensor:
    """Whether a tensor has a direction: some entry is not zero. A NaN counts as one."""
    return (tensor.detach() != 0).any()


def _unit(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor divided by its norm, and whether it has one; zeros stay zeros."""
    live = _is_live(tensor)
    peak = tensor.detach().abs().amax()
    scaled = tensor / torch.where(live, peak, 1)
    norm = torch.linalg.vector_norm(scaled)
    return scaled / torch.where(live, norm, 1), live


def _norm(tensor: Tensor) -> Tensor:
    """Norm of a tensor without underflow; 1 for zeros, so that one may divide by it."""
    live = _is_live(tensor)
    peak = torch.where(live, tensor.abs().amax(), 1)
    return torch.where(live, torch.linalg.vector_norm(tensor / peak) * peak, 1)
