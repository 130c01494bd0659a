"""Fitting of EK-FAC as the curvature stages do it: two passes over texts, eigenbases between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from bench import ours
from bench.problem import Problem
from iprox.engine.capture import input_sites
from iprox.engine.curvature import Covariances, SquaredGradients, visit_examples
from iprox.engine.loss import Batch
from iprox.numerics.kfac import Damping, Eigenbasis, LayerCurvature, eigenbasis

NO_SPLIT = 2**62


class Fit:
    """The curvature of a problem's model on its pool; each step is timed by itself.

    Attributes:
        sums: Second moments, after the first pass.
        squares: Squared gradients, after the second.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.layers = dict(problem.layers)
        self.batches = ours.batched(problem)
        self.sites = input_sites(problem.model, self.layers, self.batches[-1][1])
        self.sums: Covariances | None = None
        self.squares: SquaredGradients | None = None

    def first_pass(self) -> None:
        """Second moments of inputs and output gradients."""
        self.sums = Covariances(self.layers, self.sites, NO_SPLIT)
        visit_examples(self.problem.model, self.layers, self._named(), self.sums)

    def eigenbases(self) -> None:
        """Their eigenvectors."""
        assert self.sums is not None
        self.inputs = {name: self._basis(blocks) for name, blocks in self.sums.inputs.items()}
        grads = self.sums.output_grads.items()
        self.output_grads = {name: self._basis(blocks) for name, blocks in grads}

    def second_pass(self) -> None:
        """Squared gradients in the eigenbases."""
        self.squares = SquaredGradients(self.inputs, self.output_grads, self.sites)
        visit_examples(self.problem.model, self.layers, self._named(), self.squares)

    def directions(self, gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Query gradients times the inverse curvature."""
        assert self.squares is not None
        found = {}
        for name, gradient in gradients.items():
            grads, inputs = self.output_grads[name], self.inputs[self.sites[name]]
            values = self.squares.sums[name] / len(self.problem.pool)
            layer = LayerCurvature(name, grads, inputs, corrected=values)
            found[name] = layer.solve(gradient, Damping())
        return found

    def _basis(self, sums: Sequence[Tensor]) -> Eigenbasis:
        """Found in float64 and used in the model's precision, as the stages do."""
        vectors, values = eigenbasis(sums, self.problem.tokens)
        return Eigenbasis([q.to(sums[0].dtype) for q in vectors], values.to(sums[0].dtype))

    def _named(self) -> Iterator[tuple[Batch, list[str]]]:
        for indices, batch in self.batches:
            yield batch, [str(i) for i in indices]
