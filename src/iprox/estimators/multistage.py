"""Multi-stage influence: queries at a fine-tuned model, examples at the model it began with.

Layer by layer ``a (H_p + l)^-1 (H_f + a)^-1 V``: V at the fine-tuned model, H_f and H_p EK-FAC's
curvature of the fine-tuned and of the earlier model on what each was trained on, a the proximity
of the two (arXiv:2505.05017). Examples are scored by their gradients at the earlier model.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from iprox.errors import ArtifactError
from iprox.estimators import Preconditioner
from iprox.models.device import pick_device
from iprox.numerics.kfac import Damping
from iprox.numerics.multistage import LaterStage, proximity_of, through_stages
from iprox.stages.curvature_store import CurvatureStore, open_curvature
from iprox.store.job import Job
from iprox.store.tables import read_table
from iprox.study.schema import CurvatureSection

log = logging.getLogger(__name__)


def preconditioner(job: Job) -> Preconditioner:
    """Solves with the later model's curvature, then with the earlier one's.

    Raises:
        ArtifactError: The two models do not have the same layers.
        NumericsError: The learning rates of the fine-tuning do not give a proximity.
    """
    section = job.section(CurvatureSection, "curvature")
    parents = job.parents
    first = open_curvature(parents["curvature"], parents["eigenvalues"])
    later = open_curvature(parents["finetuned_curvature"], parents["finetuned_eigenvalues"])
    check_shared(later.bases.attrs, first.bases.attrs, parents["curvature"])
    proximity = section.proximity
    if proximity == "auto":
        proximity = proximity_of(read_table(parents["finetuned"] / "log.parquet")["lr"])
        log.info("proximity %.4g, one over the sum of the fine-tuning's learning rates", proximity)
    damping = Damping(section.damping, section.damping_mode)
    return _Directions(first, later, proximity, damping)


class _Directions:
    """Solutions layer by layer.

    Attributes:
        about: What the result is of: the model whose gradients it is scored against.
    """

    def __init__(
        self, first: CurvatureStore, later: CurvatureStore, proximity: float, damping: Damping
    ) -> None:
        self.first, self.later, self.proximity, self.damping = first, later, proximity, damping
        self.about = {"model": first.bases.attrs["model"], "proximity": proximity}

    def __call__(self, layer: str, gradients: Tensor) -> tuple[Tensor, float]:
        device = pick_device()
        first = self.first.layer(layer, device)
        stage = LaterStage(self.later.layer(layer, device), self.proximity)
        solved = through_stages(gradients.to(device), [stage], first, self.damping)
        return solved, first.damping(self.damping)


def check_shared(later: Any, first: Any, where: Path) -> None:
    """Refuse two models whose scored layers are not the same.

    Args:
        later: Root attributes of the fine-tuned model's curvature.
        first: Those of the earlier model's.
        where: The latter.

    Raises:
        ArtifactError: Says how many layers they share, or which one has another shape.
    """
    ours, theirs = later["layers"], first["layers"]
    shared = [name for name in ours if name in theirs]
    if len(shared) < max(len(ours), len(theirs)):
        raise ArtifactError(
            "the fine-tuned model and the one it began with do not have the same layers",
            where=where,
            value=f"{len(shared)} layers in common of {len(ours)} and {len(theirs)}",
            allowed="two stages of one model",
            fix="give the model that finetuned.model was made from as target.model",
        )
    for name in shared:
        if ours[name] != theirs[name]:
            raise ArtifactError(
                "a layer has another shape in the fine-tuned model",
                where=f"layer {name}",
                value=ours[name],
                allowed=theirs[name],
                fix="give the model that finetuned.model was made from as target.model",
            )
