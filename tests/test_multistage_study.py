"""Estimator ``multistage`` from the stages' files, and its place in a plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from artifacts import exact_reader, job
from test_direction import LAYER, Study, gradients, use

from iprox.errors import ArtifactError, ConfigError, NumericsError
from iprox.estimators.multistage import check_shared
from iprox.numerics.kfac import Damping
from iprox.numerics.multistage import LaterStage, through_stages
from iprox.plan.plan import plan_study
from iprox.stages import direction
from iprox.stages.curvature_store import open_curvature
from iprox.stages.passes import Reader
from iprox.store.arrays import open_store
from iprox.store.tables import write_table
from iprox.study.load import load_study

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "config" / "small" / "multistage.yaml"


@pytest.fixture
def later_reader() -> Reader:
    """Another model with the same layers."""
    reader = exact_reader()
    with torch.random.fork_rng():
        torch.manual_seed(5)
        for layer in reader.layers.values():
            layer.weight.add_(0.05 * torch.randn_like(layer.weight))
    return reader


@pytest.fixture
def parents(
    tmp_path: Path, later_reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> dict[str, Path]:
    """A query at the later model, and both models' curvature."""
    study = Study(tmp_path)
    use(monkeypatch, later_reader)
    later = study.fitted("ekfac", (0, 5))
    found = {"query": study.query()} | {f"finetuned_{r}": path for r, path in later.items()}
    use(monkeypatch, exact_reader())
    finetuned = study.new()
    finetuned.mkdir()
    rows = pd.DataFrame({"step": [1, 2], "lr": [0.3, 0.2]})
    write_table(finetuned / "log.parquet", rows)
    return found | study.fitted("ekfac", (0, 2, 5)) | {"finetuned": finetuned}


def solved(tmp_path: Path, parents: dict[str, Path], **curvature: Any) -> Path:
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    about = {"estimator": {"kind": "multistage"}, "curvature": curvature}
    direction.make(job("direction", out, parents, **about))
    return out


def test_queries_pass_both_curvatures_newest_first(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    found = solved(tmp_path, parents, proximity=0.7)
    cpu = torch.device("cpu")
    first = open_curvature(parents["curvature"], parents["eigenvalues"]).layer(LAYER, cpu)
    later = open_curvature(parents["finetuned_curvature"], parents["finetuned_eigenvalues"])
    stage = LaterStage(later.layer(LAYER, cpu), 0.7)
    query = gradients(parents["query"])[LAYER].float()[None]
    slow = through_stages(query, [stage], first, Damping())[0].double()
    torch.testing.assert_close(gradients(found)[LAYER], slow, rtol=1e-5, atol=1e-7)
    other = first.solve(later.layer(LAYER, cpu).solve(query, Damping()), Damping())[0].double()
    cosine = torch.cosine_similarity(slow.flatten(), other.flatten(), dim=0)
    assert cosine < 1 - 1e-6  # the proximity is no relative damping


def test_the_result_is_for_the_earlier_model(tmp_path: Path, parents: dict[str, Path]) -> None:
    about = open_store(solved(tmp_path, parents, proximity=0.7) / "query.zarr").attrs
    earlier = open_store(parents["curvature"] / "curvature.zarr").attrs
    query = open_store(parents["query"] / "query.zarr").attrs
    assert about["model"] == earlier["model"] != query["model"]
    assert about["proximity"] == 0.7


def test_the_proximity_is_one_over_the_learning_rates(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    auto, given = (solved(tmp_path, parents, proximity=p) for p in ("auto", 2.0))
    torch.testing.assert_close(gradients(auto)[LAYER], gradients(given)[LAYER])


def test_a_training_without_steps_has_no_proximity(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    write_table(parents["finetuned"] / "log.parquet", pd.DataFrame({"lr": [0.0]}))
    with pytest.raises(NumericsError, match="without steps"):
        solved(tmp_path, parents, proximity="auto")


def test_a_query_of_the_earlier_model_is_refused(tmp_path: Path, parents: dict[str, Path]) -> None:
    swapped = parents | {
        "finetuned_curvature": parents["curvature"],
        "finetuned_eigenvalues": parents["eigenvalues"],
    }
    with pytest.raises(ArtifactError, match="another model"):
        solved(tmp_path, swapped, proximity=1.0)


@pytest.mark.parametrize(
    ("later", "message"),
    [
        ({"c": [2, 2], "d": [2, 2]}, "0 layers in common of 2 and 2"),
        ({"a": [2, 2]}, "1 layers in common of 1 and 2"),
        ({"a": [2, 2], "b": [3, 2]}, "layer b"),
    ],
)
def test_models_of_other_layers_are_refused_with_numbers(later: Any, message: str) -> None:
    first = {"layers": {"a": [2, 2], "b": [2, 2]}}
    check_shared(first, first, Path("x"))
    with pytest.raises(ArtifactError, match=message):
        check_shared({"layers": later}, first, Path("x"))


# --- the plan ----------------------------------------------------------------------------------


def test_tasks_are_measured_at_the_finetuned_model_and_the_pool_at_the_earlier_one() -> None:
    plan = plan_study(load_study([STUDY]))
    multistage, ekfac = (plan.runs[name].nodes for name in ("multistage", "ekfac"))
    chosen = multistage["features"].parents["query/mmlu"]
    finetuned, pretrained = multistage["finetuned"], multistage["warmup"]
    assert chosen.stage == "direction"
    assert chosen.parents["query"].parents["model"] is finetuned
    assert chosen.parents["finetuned_curvature"].parents["covariance"].parents["model"] is finetuned
    assert chosen.parents["curvature"] is ekfac["curvature"]
    assert chosen.parents["eigenvalues"] is ekfac["eigenvalues"]
    assert multistage["features"].parents["model"] is pretrained
    assert finetuned.parents["target"] is pretrained
    assert finetuned.parents["pool"] is not plan.shared["pool"]
    later = chosen.parents["finetuned_eigenvalues"].parents
    assert later["pool"] is finetuned.parents["pool"]


def test_a_sweep_over_the_proximity_fits_nothing_again() -> None:
    base = {"proxy": {"kind": "target"}}
    runs = {"m": base | {"influence": {"estimator": "multistage"}}}
    runs["m"] |= {"curvature": {"proximity": [1.0, 10.0]}}
    plan = plan_study(load_study([STUDY], {"runs": runs}))
    stages = [stage for stage, _ in plan.nodes]
    assert stages.count("eigenvalues") == 2  # one of each model
    assert len({n.nodes["features"].id for k, n in plan.runs.items() if k.startswith("m-")}) == 2


def test_a_given_model_is_used_as_it_is() -> None:
    pool = {"name": "alpaca-demo", "limit": 10}
    finetuned = {"finetuned": {"model": "mine", "pool": pool}}
    run = {"proxy": {"kind": "target"}, "influence": {"estimator": "multistage"}}
    runs = {"multistage": run | {"curvature": {"proximity": 3.0}}}
    plan = plan_study(load_study([STUDY], finetuned | {"runs": runs}))
    model = plan.runs["multistage"].nodes["finetuned"]
    assert model.stage == "target"
    assert model.params["target"]["model"] == "mine"


@pytest.mark.parametrize(
    ("extra", "run", "key"),
    [
        ({"finetuned": {"pool": None}}, {}, "finetuned.pool"),
        ({}, {"proxy": {"kind": "ipsvd"}}, "proxy.kind"),
        ({}, {"influence": {"estimator": "multistage", "checkpoints": "epochs"}}, "checkpoints"),
        ({"finetuned": {"model": "mine"}}, {}, "curvature.proximity"),
        ({}, {"curvature": {"damping_mode": "factored"}}, "damping_mode"),
    ],
)
def test_what_has_no_second_stage_is_refused(
    extra: dict[str, Any], run: dict[str, Any], key: str
) -> None:
    base = {"proxy": {"kind": "target"}, "influence": {"estimator": "multistage"}}
    with pytest.raises(ConfigError, match=key):
        plan_study(load_study([STUDY], extra | {"runs": {"multistage": base | run}}))
