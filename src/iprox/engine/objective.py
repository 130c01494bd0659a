"""The alignment objective of a batch and its gradient by the proxy's factors.

The alignment loss compares *gradients* of the proxy, so its own gradient contains a product of
the Hessian of the proxy's loss with a vector (IProX, arXiv:2602.17835, Eq. 6). Three ways
give it: differentiating twice (``double_backward``), the derivative of the gradient along the
vector (``jvp``), and the difference of two gradients on either side (``central_diff``), which
needs first-order memory only and works with every attention kernel.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iprox.engine.capture import watch
from iprox.engine.loss import (
    IGNORE,
    Batch,
    attention_mask,
    head,
    hidden_states,
    input_embeddings,
    supervised_positions,
)
from iprox.models.lowrank import LowRankLinear
from iprox.numerics.alignment import (
    AlignmentTerms,
    FactorPair,
    Observed,
    alignment_loss,
    anchor,
    mean_terms,
    pair_derivatives,
    project,
)
from iprox.study.schema import AlignSection

RELATIVE_STEP = 1e-4
"""Length of the step of ``central_diff``, as a share of the norm of all factors.

In float32 a proxy of 135 M parameters errs by 2 % at this step, by 46 % at 1e-3 (curvature) and
by 5 % at 3e-6 (rounding).
"""

TWICE = ("sdpa", "eager")
"""Attention implementations that have, or can be asked for, a kernel with second derivatives."""


class TargetView:
    """What the target shows of one batch: all that alignment needs of it.

    The inputs and output gradients of its layers take as much memory as the activations of a
    training step. They are computed when they are asked for, handed on a layer at a time, and
    never kept; the weight gradients are never formed.

    Args:
        target: The frozen target.
        layers: Its layers that are factorised in the proxy.
        batch: Examples; the loss is the token mean over all its supervised tokens.
        align: Says where logits are anchored.
    """

    def __init__(
        self, target: Any, layers: Mapping[str, nn.Linear], batch: Batch, align: AlignSection
    ) -> None:
        self._target, self._layers, self._batch = target, layers, batch
        self._positions = _anchored(batch, align)
        self._seen: tuple[float, Tensor] | None = None

    @property
    def loss(self) -> float:
        """Loss of the batch."""
        return self._forward()[0]

    @property
    def logits(self) -> Tensor:
        """Logits (positions, vocabulary) where the anchor holds."""
        return self._forward()[1]

    @property
    def layers(self) -> dict[str, Observed]:
        """All layers at once, by one forward and one backward pass."""
        found: dict[str, Observed] = {}
        self.each_layer(found.__setitem__)
        return found

    def each_layer(self, use: Callable[[str, Observed], None]) -> None:
        """One forward and one backward pass, with a call for every layer, the last ones first."""

        def visit(name: str, inputs: Tensor, output_grads: Tensor) -> None:
            use(name, Observed(inputs.flatten(0, 1), output_grads.flatten(0, 1)))

        embeds = input_embeddings(self._target, self._batch)
        with watch(self._layers, visit), torch.enable_grad():
            loss, logits = _forward(self._target, self._batch, self._positions, embeds)
            self._seen = float(loss.detach()), logits.detach()
            torch.autograd.backward(loss, inputs=[embeds])

    @torch.no_grad()
    def _forward(self) -> tuple[float, Tensor]:
        if self._seen is None:
            loss, logits = _forward(self._target, self._batch, self._positions)
            self._seen = float(loss), logits
        return self._seen


class Objective(NamedTuple):
    """The objective on one batch, as plain numbers."""

    loss_ga: float
    kl: float
    objective: float
    proxy_loss: float
    target_loss: float
    cosines: Tensor  # (layers, 2): left, right; NaN where a gradient is zero
    n_zero: int

    @property
    def is_finite(self) -> bool:
        """Whether no loss is infinite or undefined."""
        return bool(torch.isfinite(torch.tensor([self.objective, self.proxy_loss])).all())


class Factorised:
    """A proxy and those of its layers that are factors, in model order.

    Args:
        model: The proxy; everything but the factors' weights is frozen.
        align: What is minimised, and how its gradient is computed.
    """

    def __init__(self, model: Any, align: AlignSection) -> None:
        self.model, self.align = model, align
        modules = {n: m for n, m in model.named_modules() if isinstance(m, LowRankLinear)}
        self.layers: dict[str, LowRankLinear] = modules
        if align.hvp != "central_diff" and model.config._attn_implementation not in TWICE:
            model.set_attn_implementation("sdpa")
        model.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Trained weights: left and right of every layer in turn."""
        sides = (side for layer in self.layers.values() for side in (layer.left, layer.right))
        return [cast(nn.Parameter, side.weight) for side in sides]

    @property
    def factors(self) -> list[FactorPair]:
        """The factors of every layer as they stand."""
        return _pairs(self.parameters)

    def copy(self) -> dict[str, FactorPair]:
        """A copy of the factors, by layer."""
        pairs = (FactorPair(*(t.detach().clone() for t in pair)) for pair in self.factors)
        return dict(zip(self.layers, pairs, strict=True))

    @torch.no_grad()
    def put(self, factors: Mapping[str, FactorPair]) -> None:
        """Set the factors."""
        for name, layer in self.layers.items():
            layer.left.weight.copy_(factors[name].left)
            layer.right.weight.copy_(factors[name].right)


def evaluate(proxy: Factorised, batch: Batch, target: TargetView) -> Objective:
    """The objective on one batch, without its gradient."""
    with torch.enable_grad():
        loss, logits = _forward(proxy.model, batch, _anchored(batch, proxy.align))
        own = _pairs(torch.autograd.grad(loss, proxy.parameters))
    loss, logits = loss.detach(), logits.detach()  # the graph goes before the target's comes
    terms = _distance(proxy, own, target)
    with torch.no_grad():
        kl = _anchor(proxy, batch, target, logits)
    return _summary(proxy, terms, kl, loss, target)


def gradient(proxy: Factorised, batch: Batch, target: TargetView) -> tuple[Objective, list[Tensor]]:
    """The objective on one batch and its gradient by ``proxy.parameters``.

    Args:
        proxy: The proxy; ``align.hvp`` says how second-order terms are computed.
        batch: The same batch the target has seen.
        target: Of the same batch.
    """
    if proxy.align.hvp == "double_backward":
        return _double_backward(proxy, batch, target)
    found, direction, total = _first_order(proxy, batch, target)
    add_hessian_vector(total, proxy, batch, direction)
    return found, total


def hessian_vector(proxy: Factorised, batch: Batch, direction: Sequence[Tensor]) -> list[Tensor]:
    """Hessian of the proxy's loss over all factors, times ``direction``."""
    product = [torch.zeros_like(p) for p in proxy.parameters]
    add_hessian_vector(product, proxy, batch, direction)
    return product


def add_hessian_vector(
    total: Sequence[Tensor], proxy: Factorised, batch: Batch, direction: Sequence[Tensor]
) -> None:
    """Add the product of :func:`hessian_vector` in place, so that it is never held by itself."""
    if proxy.align.hvp == "jvp":
        for one, product in zip(total, _jvp(proxy, batch, direction), strict=True):
            one.add_(product)
    else:
        _add_central_difference(total, proxy, batch, direction)


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Within this context, scaled dot-product attention has second derivatives.

    Flash and memory-efficient kernels have only a first one.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.MATH):
        yield


@contextmanager
def forward_derivatives() -> Iterator[None]:
    """Within this context, a model can be differentiated forward."""
    with differentiable_attention(), warnings.catch_warnings():
        # torch's own forward derivatives are still compiled by its deprecated torch.jit
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        yield


def _double_backward(
    proxy: Factorised, batch: Batch, target: TargetView
) -> tuple[Objective, list[Tensor]]:
    parameters = proxy.parameters
    with differentiable_attention(), torch.enable_grad():
        loss, logits = _forward(proxy.model, batch, _anchored(batch, proxy.align))
        own = _pairs(torch.autograd.grad(loss, parameters, create_graph=True))
        weight = proxy.align.distance_weight
        terms = alignment_loss(own, _projected(proxy, target.layers), weight)
        kl = _anchor(proxy, batch, target, logits)
        total = terms.loss + proxy.align.lambda_kl * kl
        gradients = list(torch.autograd.grad(total, parameters))
    return _summary(proxy, terms, kl, loss, target), gradients


def _first_order(
    proxy: Factorised, batch: Batch, target: TargetView
) -> tuple[Objective, list[Tensor], list[Tensor]]:
    """All but the Hessian-vector product.

    Returns:
        The objective; its derivative by the proxy's own gradients, which is the vector that the
        Hessian multiplies; and the rest of its gradient: that of the anchor, and of the factors
        that project the target's gradient.
    """
    parameters, align = proxy.parameters, proxy.align
    with torch.enable_grad():
        loss, logits = _forward(proxy.model, batch, _anchored(batch, align))
        own = _pairs(torch.autograd.grad(loss, parameters, retain_graph=align.lambda_kl > 0))
        if align.lambda_kl > 0:
            kl = _anchor(proxy, batch, target, logits)
            explicit = list(torch.autograd.grad(align.lambda_kl * kl, parameters))
        else:
            explicit = [torch.zeros_like(p) for p in parameters]
    loss, logits = loss.detach(), logits.detach()  # the graph goes before the target's comes
    scale = align.distance_weight / len(own)

    def differentiate(i: int, observed: Observed, projected: FactorPair) -> None:
        by_own, by_projected = pair_derivatives(own[i], projected)
        own[i] = FactorPair(*(scale * d for d in by_own))  # in the place of what is done with
        if align.grad == "exact":
            for j, d in enumerate(project(observed, by_projected)):
                explicit[2 * i + j].add_(scale * d)

    terms = _distance(proxy, own, target, differentiate)
    if align.lambda_kl == 0:
        with torch.no_grad():
            kl = _anchor(proxy, batch, target, logits)
    direction = [d for pair in own for d in pair]
    return _summary(proxy, terms, kl.detach(), loss, target), direction, explicit


class _BatchLoss(nn.Module):
    """The loss as a module, so that its parameters can be swapped for a derivative."""

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        super().__init__()
        self.model, self.batch = model, batch

    def forward(self) -> Tensor:
        return _loss(self.model, self.batch)


def _jvp(proxy: Factorised, batch: Batch, direction: Sequence[Tensor]) -> list[Tensor]:
    """Forward over reverse: derivative of the gradient along ``direction``."""
    module = _BatchLoss(proxy.model, batch)
    names = [f"model.{name}.{side}.weight" for name in proxy.layers for side in ("left", "right")]
    here = dict(zip(names, (p.detach() for p in proxy.parameters), strict=True))
    along = dict(zip(names, direction, strict=True))

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(module, parameters, ())
        return found

    with forward_derivatives():
        product = torch.func.jvp(torch.func.grad(loss), (here,), (along,))[1]
    return [product[name] for name in names]


def _add_central_difference(
    total: Sequence[Tensor], proxy: Factorised, batch: Batch, direction: Sequence[Tensor]
) -> None:
    """Add (∇L(θ + εc) - ∇L(θ - εc)) / 2ε with ε = 1e-4 ‖θ‖ / ‖c‖: error of the order of ε²."""
    parameters = proxy.parameters
    here = [p.detach().clone() for p in parameters]
    length = _norm(direction)
    if length == 0:
        return
    step = RELATIVE_STEP * _norm(here) / length
    try:
        for sign in (1, -1):
            with torch.no_grad():
                for p, origin, along in zip(parameters, here, direction, strict=True):
                    torch.add(origin, along, alpha=sign * step, out=p)
            with torch.enable_grad():
                gradients = torch.autograd.grad(_loss(proxy.model, batch), parameters)
            for one, grad in zip(total, gradients, strict=True):
                one.add_(grad, alpha=sign / (2 * step))
            del gradients
    finally:
        with torch.no_grad():
            for p, origin in zip(parameters, here, strict=True):
                p.copy_(origin)


def _forward(
    model: Any, batch: Batch, positions: Tensor, embeds: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Token-mean loss of the batch, and logits at ``positions``, supervised ones among them."""
    logits = head(model, hidden_states(model, batch, embeds)[positions])
    logits = logits if logits.dtype == torch.float64 else logits.float()
    following = batch.labels.roll(-1, dims=1)[positions]
    supervised = supervised_positions(batch.labels)[positions]
    targets = torch.where(supervised, following, IGNORE)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE), logits


def _loss(model: Any, batch: Batch) -> Tensor:
    return _forward(model, batch, supervised_positions(batch.labels))[0]


def _anchored(batch: Batch, align: AlignSection) -> Tensor:
    """Positions (examples, tokens) whose logits are anchored; supervised ones are among them."""
    if align.kl_positions == "supervised":
        return supervised_positions(batch.labels)
    mask = attention_mask(batch)
    return torch.ones_like(batch.labels).bool() if mask is None else mask.bool()


def _anchor(proxy: Factorised, batch: Batch, target: TargetView, logits: Tensor) -> Tensor:
    owner = _anchored(batch, proxy.align).nonzero()[:, 0]
    return anchor(target.logits, logits, owner, proxy.align.tau)


def _projected(proxy: Factorised, layers: Mapping[str, Observed]) -> Iterator[FactorPair]:
    """The target's gradient in the proxy's factors, live in them unless the config stops it."""
    for name, pair in zip(proxy.layers, proxy.factors, strict=True):
        if proxy.align.grad == "stop_projection":
            pair = FactorPair(*(t.detach() for t in pair))
        yield project(layers[name], pair)


def _distance(
    proxy: Factorised,
    own: Sequence[FactorPair],
    target: TargetView,
    then: Callable[[int, Observed, FactorPair], None] | None = None,
) -> AlignmentTerms:
    """Distances of all layers, each taken while the target's backward pass goes by.

    Args:
        proxy: The proxy.
        own: Gradients of its factors.
        target: Of the same batch.
        then: Called for every layer after its distance, with its place, what the target's layer
            saw, and the target's gradient in the factors.
    """
    places = {name: i for i, name in enumerate(proxy.layers)}
    factors, found = proxy.factors, dict[str, AlignmentTerms]()

    @torch.no_grad()
    def compare(name: str, observed: Observed) -> None:
        i = places[name]
        projected = project(observed, factors[i])
        found[name] = alignment_loss([own[i]], [projected], proxy.align.distance_weight)
        if then is not None:
            then(i, observed, projected)

    target.each_layer(compare)
    return mean_terms([found[name] for name in proxy.layers])


def _summary(
    proxy: Factorised, terms: AlignmentTerms, kl: Tensor, loss: Tensor, target: TargetView
) -> Objective:
    loss_ga, anchor_kl = float(terms.loss.detach()), float(kl.detach())
    return Objective(
        loss_ga=loss_ga,
        kl=anchor_kl,
        objective=loss_ga + proxy.align.lambda_kl * anchor_kl,
        proxy_loss=float(loss.detach()),
        target_loss=target.loss,
        cosines=terms.cosines,
        n_zero=terms.n_zero,
    )


def _pairs(tensors: Sequence[Tensor]) -> list[FactorPair]:
    """left, right, left, right... as pairs."""
    return [FactorPair(*pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)]


def _norm(tensors: Sequence[Tensor]) -> float:
    """Norm of all tensors together."""
    norms = torch.stack([torch.linalg.vector_norm(t) for t in tensors])
    return float(torch.linalg.vector_norm(norms))
