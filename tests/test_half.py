"""Scores by half of an inverse curvature: cosines of ``H^-1/2`` times both gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from artifacts import job, write_task
from oracles import inner, weight_gradients
from test_direction import EXAMPLES, Study, example, features_of, gradients, use
from test_direction import reader as reader
from test_direction import study as study
from torch import device

from iprox.errors import ArtifactError, ConfigError
from iprox.numerics.kfac import Damping
from iprox.plan.plan import plan_study
from iprox.stages import features
from iprox.stages.curvature_store import open_curvature
from iprox.stages.passes import Reader
from iprox.store.arrays import open_store
from iprox.study.load import load_study

ROOT = Path(__file__).parents[1]
CPU = device("cpu")


def scored(
    study: Study, estimator: str, fitted: dict[str, Path], query: Path, **damping: Any
) -> Path:
    """Features of the pool with norms by the curvature."""
    direction = study.direction(estimator, query, fitted, **damping)
    out = study.new()
    parents = {"pool": study.pool, "query/t": direction, **fitted}
    features.make(job("features", out, parents, subset={"name": "all"}, curvature=damping))
    (out / "shard.zarr").rename(out / "shard-00000.zarr")
    return out


@pytest.mark.parametrize(
    ("estimator", "mode"), [("kfac", "relative"), ("kfac", "factored"), ("ekfac", "absolute")]
)
def test_a_score_is_the_cosine_of_whitened_gradients(
    reader: Reader, study: Study, estimator: str, mode: str
) -> None:
    settings, source = {"damping": 0.01, "damping_mode": mode}, study.query()
    fitted = study.fitted(estimator)
    scores = features_of(scored(study, estimator, fitted, source, **settings)).scores("half")["t"]
    store = open_curvature(fitted["curvature"], fitted.get("eigenvalues"))
    damping = Damping(0.01, mode)  # type: ignore[arg-type]

    def whitened(a: Any, b: Any) -> float:
        """<H^-1/2 a, H^-1/2 b> = <H^-1 a, b>, solved layer by layer."""
        solved = {n: store.layer(n, CPU).solve(v[None].float(), damping)[0] for n, v in a.items()}
        return inner(solved, b)

    v = gradients(source)
    for score, name in zip(scores, sorted(EXAMPLES), strict=True):
        g = weight_gradients(reader.model, reader.layers, example(reader, *EXAMPLES[name]))
        expected = whitened(v, g) / (whitened(v, v) * whitened(g, g)) ** 0.5
        assert score == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_an_example_that_is_the_query_has_the_score_1(study: Study) -> None:
    study.task = write_task(study.folder / "same", [("a", *EXAMPLES["e004"])])
    features_at = scored(study, "ekfac", study.fitted("ekfac"), study.query(), damping=0.01)
    found = features_of(features_at)
    scores = found.scores("half")["t"]
    # the query's last token is not followed by the end of its turn, so that alone is not equal
    assert np.abs(scores).max() <= 1 + 1e-5
    assert found.example_id[int(scores.argmax())].as_py() == "e004"


def test_a_curvature_of_another_model_is_refused(
    study: Study, monkeypatch: pytest.MonkeyPatch, reader: Reader
) -> None:
    fitted, source = study.fitted("kfac"), study.query()
    next(iter(reader.layers.values())).weight.mul_(1.1)
    use(monkeypatch, reader)
    with pytest.raises(ArtifactError, match="another model"):
        scored(study, "kfac", fitted, source)


@pytest.mark.parametrize("estimator", ["kfac", "ekfac"])
def test_a_direction_that_is_cut_says_what_it_lost(study: Study, estimator: str) -> None:
    """``query_rank`` cuts what the curvature made of a query, not the query."""
    made = study.direction(estimator)
    found = {}
    for rank in (0, 2, 32):
        out, parents = study.new(), {"pool": study.pool, "query/t": made}
        settings = {"query_rank": rank}
        features.make(job("features", out, parents, subset={"name": "all"}, influence=settings))
        (out / "shard.zarr").rename(out / "shard-00000.zarr")
        lost = open_store(out / "shard-00000.zarr").attrs["query_truncation"]["t"]
        found[rank] = features_of(out).scores("dot")["t"], lost
    whole = gradients(made)
    tails = sum(float((np.linalg.svd(v.numpy())[1][2:] ** 2).sum()) for v in whole.values())
    assert found[2][1] == pytest.approx((tails / inner(whole, whole)) ** 0.5, rel=1e-5)
    assert found[2][1] > 0.01
    assert found[0][1] == found[32][1] == 0
    np.testing.assert_array_equal(found[32][0], found[0][0])
    assert not np.allclose(found[2][0], found[0][0], rtol=1e-3)


# --- the plan ----------------------------------------------------------------------------------


def plan(**run: Any) -> Any:
    base = {"proxy": {"kind": "target"}, "influence": {"estimator": "ekfac", "score": "half"}}
    study = load_study([ROOT / "config" / "small" / "ekfac.yaml"], {"runs": {"half": base | run}})
    return plan_study(study)


def test_norms_are_by_the_curvature_that_the_queries_passed() -> None:
    nodes = plan().runs["half"].nodes
    scored, direction = nodes["features"], nodes["features"].parents["query/mmlu"]
    for role in ("curvature", "eigenvalues"):
        assert scored.parents[role] is direction.parents[role]
    assert scored.params["curvature"] == direction.params["curvature"]


def test_a_proxy_of_the_backward_pass_has_the_target_s_curvature() -> None:
    proxy = {"kind": "ipsvd", "passes": "backward", "sparsity": 0.5}
    nodes = plan(proxy=proxy).runs["half"].nodes
    fitted = nodes["features"].parents["curvature"].parents["covariance"].parents["model"]
    assert fitted is nodes["warmup"]


@pytest.mark.parametrize(
    "run",
    [
        {"features": {"kind": "logra"}},
        {"proxy": {"kind": "ipsvd", "sparsity": "auto"}},
        {"influence": {"estimator": "datainf", "score": "half"}},
        {"influence": {"score": "half"}},
    ],
)
def test_what_has_no_half_is_refused(run: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="half"):
        plan(**run)
