"""A loop in the manner of LESS: one backward pass per example, with weight gradients.

LESS (arXiv:2402.04333) projects LoRA gradients of each example; here the full gradients of the
block linears are used as they are, so that the loop is also the brute-force answer.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bench.problem import Answer, Problem, Scoring

PACKAGE = None
READS_QUERIES = False
DIFFERS = "own loop, batch size 1; no LoRA, no projection, no Adam moments"


def prepare(problem: Problem, scratch: Path) -> Scoring:
    """Inner products and norms from ``.grad``, one example at a time."""
    weights = [layer.weight for layer in problem.layers.values()]
    queries = [problem.gradients[name].flatten(1) for name in problem.layers]

    def run() -> Answer:
        dots, norms = [], []
        for weight in weights:
            weight.requires_grad_()
        for example in problem.pool:
            problem.model(
                input_ids=torch.tensor([example.input_ids]),
                labels=torch.tensor([example.labels]),
            ).loss.backward()
            grads = [weight.grad.flatten().to(queries[0]) for weight in weights]
            dots.append(sum(q @ g for q, g in zip(queries, grads, strict=True)))
            norms.append(sum(g @ g for g in grads).sqrt())
            for weight in weights:
                weight.grad = None
        for weight in weights:
            weight.requires_grad_(False)
        return Answer(torch.stack(dots), torch.stack(norms))

    return run
