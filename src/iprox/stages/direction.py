"""Stage ``direction``: query gradients as an estimator changes them, in the form of queries.

Whatever reads a query takes a direction instead: its norms are those of the changed gradients,
so that the cosine of a score is ``<P v, g> / (|P v| |g|)``.
"""

from __future__ import annotations

import importlib

import numpy as np
import torch

from iprox.progress import track
from iprox.stages.queries import check_origin, create_query_store, norm_of
from iprox.store.arrays import open_store, put
from iprox.store.job import Job, Metrics
from iprox.study.schema import CurvatureSection


def make(job: Job) -> Metrics:
    """Write ``query.zarr`` in the layout of stage ``query``, and ``half_norms`` beside ``norms``.

    ``half_norms`` (groups,) are ``sqrt(<v, P v>)``, the norms of the query gradients in the metric
    in which the score is an inner product; NaN where P is none.
    Of the root attributes ``estimator`` and ``damping`` are its settings, and
    ``layer_damping`` the damping of every layer as a number.

    Returns:
        Counts of groups and layers; of an estimator that passes texts also theirs, and FLOPs.

    Raises:
        ArtifactError: The curvature is of another model than the query, or of other settings.
        NumericsError: The curvature cannot be inverted, or a direction is zero or not finite.
    """
    section = job.section(CurvatureSection, "curvature")
    name = job.params["estimator"]["kind"]
    query = open_store(job.parents["query"] / "query.zarr")
    for role in ("finetuned_curvature", "curvature"):
        if role in job.parents:  # the curvature of the model that the query was taken at
            fitted = job.parents[role] / "curvature.zarr"
            check_origin(query.attrs, open_store(fitted).attrs, fitted)
            break
    precondition = importlib.import_module(f"iprox.estimators.{name}").preconditioner(job)
    about = dict(query.attrs)
    groups = [str(group) for group in query["group"][...]]
    layers = {n: (int(out), int(features)) for n, (out, features) in about.pop("layers").items()}
    settings = {"amount": section.damping, "mode": section.damping_mode}
    about |= {"estimator": name, "damping": settings, **getattr(precondition, "about", {})}
    store = create_query_store(job.out / "query.zarr", layers, groups, about)
    squares, halves = np.zeros((2, len(groups)))
    dampings: dict[str, float] = {}
    with track(len(layers), "layers", name) as progress:
        for layer in layers:
            gradients = torch.from_numpy(query[f"gradients/{layer}"][...])
            changed, dampings[layer] = precondition(layer, gradients)
            wide, v = changed.double().cpu(), gradients.double()
            squares += wide.square().sum((1, 2)).numpy()
            halves += (wide * v).sum((1, 2)).numpy()
            store[f"gradients/{layer}"][...] = changed.float().cpu().numpy()
            progress.advance(1)
    norms = [norm_of(float(s), group) for s, group in zip(squares, groups, strict=True)]
    put(store, "norms", np.array(norms), ("groups",))
    with np.errstate(invalid="ignore"):
        put(store, "half_norms", np.sqrt(halves), ("groups",))
    store.attrs["layer_damping"] = dampings
    passed: Metrics = getattr(precondition, "metrics", {})
    return {**passed, "groups": len(groups), "layers": len(layers)}
