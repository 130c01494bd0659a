"""A small classifier on made-up data: what low-rank weights keep of its loss and its influence.

The experiment of IProX (arXiv:2602.17835, Figure 3): a ReLU network of four layers is trained,
every layer is replaced by factors, by plain SVD or by IPSVD, and the losses and the influence
scores (TracIn at one checkpoint, dot products of weight gradients) of both networks are compared.
The paper names no sizes; those of :class:`Setting` are this project's. Labels are noisy and
clusters overlap on purpose: a network that fits its training data exactly leaves gradients on a
handful of examples, and no probe of them is representative.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from iprox.numerics.correlation import spearman
from iprox.numerics.ipsvd import DampedRoot, Directions, decompose, plain_svd, truncate
from iprox.numerics.ranks import rank_for

Kind = Literal["svd", "ipsvd"]


@dataclass(frozen=True)
class Setting:
    """Sizes of the experiment.

    Attributes:
        inputs: Features of an example; the i-th has the scale exp(-i / 20).
        hidden: Width of each of the three hidden layers.
        classes: Classes, each of ``clusters`` Gaussian clusters.
        clusters: Clusters of a class.
        noise: Standard deviation inside a cluster, in units of that between their centres.
        label_noise: Share of training examples with a label drawn at random.
        train: Training examples.
        test: Test examples, whose influences are compared.
        scored: Training examples that influence is measured on.
        probe: Training examples whose inputs and gradients weight the decomposition.
        epochs: Passes over the training examples.
        batch: Examples per step.
        lr: Learning rate of Adam.
        damping: Damping of both second moments, relative to their mean eigenvalue.
    """

    inputs: int = 64
    hidden: int = 128
    classes: int = 10
    clusters: int = 3
    noise: float = 1.8
    label_noise: float = 0.2
    train: int = 3000
    test: int = 200
    scored: int = 500
    probe: int = 512
    epochs: int = 4
    batch: int = 64
    lr: float = 1e-3
    damping: float = 0.1


class Examples(NamedTuple):
    """Inputs (examples, inputs) and labels (examples,)."""

    x: Tensor
    y: Tensor


class Rows(NamedTuple):
    """What one layer sees of each example: inputs (examples, in), output gradients (.., out)."""

    inputs: Tensor
    grads: Tensor


class Retention(NamedTuple):
    """What a network of low-rank layers keeps of the one it was made from."""

    loss: float  # original loss over compressed loss, on the training examples
    influence: float  # mean over test examples of the Spearman correlation of influences


def draw_examples(setting: Setting, generator: torch.Generator) -> tuple[Examples, Examples]:
    """Training and test examples of one random task."""
    n = setting.classes * setting.clusters
    scale = torch.exp(-torch.arange(setting.inputs) / 20.0)
    centres = torch.randn(n, setting.inputs, generator=generator)

    def draw(count: int, label_noise: float) -> Examples:
        cluster = torch.randint(n, (count,), generator=generator)
        spread = torch.randn(count, setting.inputs, generator=generator)
        labels = cluster % setting.classes
        random = torch.randint(setting.classes, (count,), generator=generator)
        swapped = torch.rand(count, generator=generator) < label_noise
        x = (centres[cluster] + setting.noise * spread) * scale
        return Examples(x, torch.where(swapped, random, labels))

    return draw(setting.train, setting.label_noise), draw(setting.test, 0.0)


def train_network(setting: Setting, data: Examples, generator: torch.Generator) -> nn.Sequential:
    """A ReLU network of four layers, trained with Adam; weights in float64."""
    widths = [setting.inputs, *[setting.hidden] * 3, setting.classes]
    layers: list[nn.Module] = []
    for fan_in, fan_out in zip(widths, widths[1:], strict=False):
        layer = nn.Linear(fan_in, fan_out)
        with torch.no_grad():
            layer.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            layer.bias.zero_()
        layers += [layer, nn.ReLU()]
    network = nn.Sequential(*layers[:-1])
    optimizer = torch.optim.Adam(network.parameters(), lr=setting.lr)
    for _ in range(setting.epochs):
        for batch in torch.randperm(len(data.y), generator=generator).split(setting.batch):
            optimizer.zero_grad()
            cross_entropy(network(data.x[batch]), data.y[batch]).backward()
            optimizer.step()
    return network.double().requires_grad_(False)


def layer_rows(network: nn.Sequential, data: Examples) -> list[Rows]:
    """Inputs and output gradients of every linear layer, factors included, example by example."""
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def walk(modules: nn.Sequential, x: Tensor) -> Tensor:
        for module in modules:
            if isinstance(module, nn.Sequential):
                x = walk(module, x)
                continue
            if isinstance(module, nn.Linear):
                inputs.append(x.detach())
                x = module(x)
                if not x.requires_grad:
                    x.requires_grad_()
                outputs.append(x)
            else:
                x = module(x)
        return x

    with torch.enable_grad():
        loss = cross_entropy(walk(network, data.x.double()), data.y, reduction="sum")
        grads = torch.autograd.grad(loss, outputs)
    return [Rows(x, d) for x, d in zip(inputs, grads, strict=True)]


def influences(first: list[Rows], second: list[Rows]) -> Tensor:
    """Inner products of two sets of examples' weight gradients, (first, second).

    The gradient of a weight at one example is d xᵀ, so that the product of two of them is
    (d · d') (x · x'); over layers these are added up.
    """
    products = [
        (a.grads @ b.grads.T) * (a.inputs @ b.inputs.T) for a, b in zip(first, second, strict=True)
    ]
    return torch.stack(products).sum(0)


def mean_loss(network: nn.Sequential, data: Examples) -> float:
    """Mean cross-entropy."""
    return float(cross_entropy(network(data.x.double()), data.y))


def directions(
    setting: Setting, network: nn.Sequential, probe: Examples
) -> dict[Kind, list[Directions]]:
    """Nested low-rank solutions of every layer, by plain SVD and by IPSVD."""
    weights = [m.weight for m in network if isinstance(m, nn.Linear)]
    weighted = [
        decompose(
            weight,
            DampedRoot.from_rows(rows.inputs, setting.damping),
            DampedRoot.from_rows(rows.grads, setting.damping),
        )
        for weight, rows in zip(weights, layer_rows(network, probe), strict=True)
    ]
    return {"svd": [plain_svd(weight) for weight in weights], "ipsvd": weighted}


def compress(network: nn.Sequential, nested: list[Directions], sparsity: float) -> nn.Sequential:
    """The network with every layer's weight replaced by two factors in balanced gauge."""
    remaining = iter(nested)
    modules: list[nn.Module] = []
    for module in network:
        modules.append(
            _factorised(module, next(remaining), sparsity)
            if isinstance(module, nn.Linear)
            else module
        )
    return nn.Sequential(*modules)


def _factorised(layer: nn.Linear, nested: Directions, sparsity: float) -> nn.Module:
    """Two linear layers in place of one; the layer itself where factors would save nothing."""
    out, inn = layer.out_features, layer.in_features
    rank = rank_for(out, inn, sparsity, multiple=1, rounding="round_ceil")
    if rank is None:
        return copy.deepcopy(layer)
    factors = truncate(nested, rank)
    right = nn.Linear(layer.in_features, rank, bias=False, dtype=torch.float64)
    left = nn.Linear(rank, layer.out_features, dtype=torch.float64)
    right.weight.data, left.weight.data = factors.right, factors.left
    left.bias.data = layer.bias.detach().clone()
    return nn.Sequential(right, left).requires_grad_(False)


def retention(
    original: nn.Sequential, compressed: nn.Sequential, train: Examples, test: Examples, scored: int
) -> Retention:
    """What a compressed network keeps.

    Args:
        original: The network as it was trained.
        compressed: The same with low-rank layers.
        train: Training examples.
        test: Test examples, each with influences of its own.
        scored: The first so many training examples are scored.
    """
    some = Examples(train.x[:scored], train.y[:scored])
    ours, theirs = (
        influences(layer_rows(network, test), layer_rows(network, some)).numpy()
        for network in (compressed, original)
    )
    loss = mean_loss(original, train) / mean_loss(compressed, train)
    return Retention(loss, float(spearman(ours, theirs).mean()))


def curve(
    setting: Setting, sparsities: tuple[float, ...], seed: int
) -> list[tuple[Kind, float, Retention]]:
    """Retention of both decompositions at every sparsity, for one random task and network."""
    generator = torch.Generator().manual_seed(seed)
    train, test = draw_examples(setting, generator)
    network = train_network(setting, train, generator)
    drawn = torch.randperm(len(train.y), generator=generator)[: setting.probe]
    nested = directions(setting, network, Examples(train.x[drawn], train.y[drawn]))
    return [
        (
            kind,
            sparsity,
            retention(network, compress(network, layers, sparsity), train, test, setting.scored),
        )
        for kind, layers in nested.items()
        for sparsity in sparsities
    ]
