"""Second-order influence from the stages' files, against definitions by autograd."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import (
    CHAT,
    exact_reader,
    job,
    random_examples,
    turns,
    write_pool,
    write_split,
    write_task,
)
from oracles import factorised, inner, weight_gradients
from torch import Tensor

from iprox import estimators
from iprox.data.batches import collate
from iprox.data.chat import encode
from iprox.engine.capture import backward_pass
from iprox.engine.loss import Batch
from iprox.errors import ArtifactError, ConfigError, DataError, NumericsError
from iprox.estimators import datainf
from iprox.models.layers import scored_linears
from iprox.numerics.correlation import spearman
from iprox.numerics.datainf import swapped_inverse_weights
from iprox.stages import covariance, curvature, direction, eigenvalues, features, query
from iprox.stages.passes import Reader, fingerprint
from iprox.store.arrays import open_store
from iprox.store.manifest import describe
from iprox.study.estimators import ESTIMATORS
from iprox.study.schema import LayersSection

QUERIES = [("b", "red?", "green"), ("a", "one?", "two three")]
EXAMPLES = random_examples(9)
FISHER = ["e003", "e007", "e001", "e005", "e000"]
PASSES = (query, covariance, eigenvalues, features, datainf)
LAYER = "model.layers.0.self_attn.k_proj"  # the smallest: 16 x 32


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    return use(monkeypatch, exact_reader())


def use(monkeypatch: pytest.MonkeyPatch, opened: Reader) -> Reader:
    for stage in PASSES:
        monkeypatch.setattr(stage, "open_reader", lambda *_: opened)
    return opened


class Study:
    """The artifacts of a small study, made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pool = write_pool(folder / "pool", EXAMPLES)
        self.split = write_split(folder / "split", "fisher", FISHER)
        self.task = write_task(folder / "task", QUERIES)
        self.passed = {"pool": self.pool, "split": self.split}

    def new(self) -> Path:
        return self.folder / f"artifact{len(list(self.folder.iterdir()))}"

    def query(self, val_agg: str = "mean_raw", **influence: Any) -> Path:
        out = self.new()
        settings = {"val_agg": val_agg, **influence}
        query.make(job("query", out, {"task": self.task}, influence=settings))
        return out

    def sharded(self, stage: Any, parents: dict[str, Path], cuts: Sequence[int], **p: Any) -> Path:
        folder = self.new()
        folder.mkdir()
        for number, rows in enumerate(zip(cuts, cuts[1:], strict=False)):
            out = folder / "out"
            stage.make(job(stage.__name__, out, parents, rows, **({"curvature": {}} | p)))
            (out / "shard.zarr").rename(folder / f"shard-{number:05d}.zarr")
            out.rmdir()
        return folder

    def curvature(self, cuts: Sequence[int] = (0, 5), **params: Any) -> Path:
        sums = self.sharded(covariance, self.passed, cuts, **params)
        out = self.new()
        curvature.make(job("curvature", out, {"covariance": sums}))
        return out

    def fitted(
        self, estimator: str, cuts: Sequence[int] = (0, 5), **params: Any
    ) -> dict[str, Path]:
        """What the estimator reads."""
        reads = ESTIMATORS[estimator]
        parents = {role: self.passed[role] for role in reads if role in self.passed}
        if "curvature" in reads:
            parents["curvature"] = self.curvature(cuts, **params)
        if "eigenvalues" in reads:
            passed = self.passed | {"curvature": parents["curvature"]}
            parents["eigenvalues"] = self.sharded(eigenvalues, passed, cuts, **params)
        return parents

    def direction(
        self,
        estimator: str,
        query: Path | None = None,
        fitted: dict[str, Path] | None = None,
        **damping: Any,
    ) -> Path:
        parents = {"query": query or self.query()} | (fitted or self.fitted(estimator))
        out = self.new()
        direction.make(
            job("direction", out, parents, curvature=damping, estimator={"kind": estimator})
        )
        return out


@pytest.fixture
def study(tmp_path: Path, reader: Reader) -> Study:
    return Study(tmp_path)


def example(reader: Reader, prompt: str, response: str) -> Batch:
    return Batch(*collate([encode(turns(prompt, response), reader.tokenizer, **CHAT)], 0))


def fisher_examples(reader: Reader) -> list[Batch]:
    return [example(reader, *EXAMPLES[i]) for i in FISHER]


def gradients(folder: Path, group: int = 0) -> dict[str, Tensor]:
    store = open_store(folder / "query.zarr")
    names = store.attrs["layers"]
    return {n: torch.from_numpy(store[f"gradients/{n}"][group]).double() for n in names}


def second_moments(reader: Reader, layer: str) -> tuple[Tensor, Tensor, float]:
    """S, A and tokens per example of one layer, from single passes."""
    x_rows, d_rows = [], []

    def visit(name: str, x: Tensor, d: Tensor) -> None:
        x_rows.append(x[0])
        d_rows.append(d[0])

    for batch in fisher_examples(reader):
        backward_pass(reader.model, {layer: reader.layers[layer]}, batch, visit)
    x, d = torch.cat(x_rows), torch.cat(d_rows)
    return d.mT @ d / len(d), x.mT @ x / len(x), len(x) / len(FISHER)


def test_kfac_solves_with_the_kronecker_product(reader: Reader, study: Study) -> None:
    source = study.query()
    found = gradients(study.direction("kfac", source))[LAYER]
    s, a, n = second_moments(reader, LAYER)
    curvature = n * torch.kron(s, a)
    damped = curvature + 0.1 * curvature.trace() / len(curvature) * torch.eye(len(curvature))
    expected = torch.linalg.solve(damped, gradients(source)[LAYER].flatten()).reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=float(expected.abs().max()) * 1e-5)


def test_ekfac_solves_with_the_squares_of_example_gradients(reader: Reader, study: Study) -> None:
    source = study.query()
    found = gradients(study.direction("ekfac", source, damping=0.3))[LAYER]
    s, a, _ = second_moments(reader, LAYER)
    q_s, q_a = torch.linalg.eigh(s)[1], torch.linalg.eigh(a)[1]
    layers = {LAYER: reader.layers[LAYER]}
    squares = [
        (q_s.mT @ weight_gradients(reader.model, layers, b)[LAYER] @ q_a).square()
        for b in fisher_examples(reader)
    ]
    values = torch.stack(squares).mean(0)
    within = q_s.mT @ gradients(source)[LAYER] @ q_a / (values + 0.3 * values.mean())
    expected = q_s @ within @ q_a.mT
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=float(expected.abs().max()) * 1e-4)


def test_datainf_is_the_mean_of_inverted_rank_one_matrices(reader: Reader, study: Study) -> None:
    source = study.query()
    folder = study.direction("datainf", source)
    found = gradients(folder)
    examples = [weight_gradients(reader.model, reader.layers, b) for b in fisher_examples(reader)]
    for name, v in gradients(source).items():
        rows = torch.stack([g[name].flatten() for g in examples])
        damping = float(0.1 * rows.square().mean())
        swapped = [
            v.flatten() / damping - g * (g @ v.flatten()) / (damping * (damping + g.square().sum()))
            for g in rows
        ]
        expected = torch.stack(swapped).mean(0).reshape(v.shape)
        torch.testing.assert_close(found[name], expected, rtol=1e-4, atol=1e-6 / damping)
        stored = open_store(folder / "query.zarr").attrs["layer_damping"][name]
        assert stored == pytest.approx(damping, rel=1e-6)


def test_datainf_counts_what_it_passes(study: Study) -> None:
    parents = {"query": study.query()} | study.fitted("datainf")
    params: dict[str, Any] = {"curvature": {}, "estimator": {"kind": "datainf"}}
    counts = direction.make(job("direction", study.new(), parents, **params))
    assert counts["examples"] == len(FISHER)
    assert float(counts["flops"]) > 0


def test_datainf_is_exact_for_one_example() -> None:
    g, v = torch.randn(2, 12, dtype=torch.float64)
    weight = swapped_inverse_weights((g @ v)[None, None], g.square().sum()[None], 0.3)
    found = v / 0.3 + weight[0, 0] * g
    exact = torch.linalg.solve(torch.outer(g, g) + 0.3 * torch.eye(12, dtype=g.dtype), v)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=0)
    with pytest.raises(NumericsError, match="needs damping"):
        swapped_inverse_weights((g @ v)[None, None], g.square().sum()[None], 0.0)


@pytest.mark.parametrize("estimator", ["kfac", "ekfac", "datainf"])
def test_memory_and_batches_change_nothing(
    study: Study, estimator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = study.query("subtask_max")
    whole = study.direction(estimator, source)
    for stage in (covariance, eigenvalues, datainf):
        monkeypatch.setattr(stage, "free_bytes", lambda _: 1)
    monkeypatch.setattr("iprox.engine.scoring.CPU_BATCH_TOKENS", 1)
    parts = study.direction(estimator, source)
    for group in (0, 1):
        ours, theirs = gradients(whole, group), gradients(parts, group)
        for name, expected in ours.items():
            scale = float(expected.abs().max())
            torch.testing.assert_close(theirs[name], expected, rtol=1e-3, atol=1e-4 * scale)


def test_shards_are_added_up(study: Study) -> None:
    source = study.query()
    whole, cut, again = (
        study.direction("ekfac", source, study.fitted("ekfac", cuts))
        for cuts in ((0, 5), (0, 2, 2, 5), (0, 2, 2, 5))
    )
    for name, expected in gradients(whole).items():
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradients(cut)[name], expected, rtol=1e-3, atol=1e-4 * scale)
    assert describe("direction", cut).content == describe("direction", again).content


def test_a_damping_sweep_changes_nothing_it_reads(study: Study) -> None:
    source, fitted = study.query(), study.fitted("ekfac")
    before = {role: describe(role, folder).content for role, folder in fitted.items()}
    first = study.direction("ekfac", source, fitted, damping=0.1)
    study.direction("ekfac", source, fitted, damping=10.0)
    again = study.direction("ekfac", source, fitted, damping=0.1)
    assert describe("direction", first).content == describe("direction", again).content
    assert {role: describe(role, folder).content for role, folder in fitted.items()} == before


def score(study: Study, queries: Path, by: str) -> np.ndarray:
    out = study.new()
    parents = {"pool": study.pool, "query/t": queries}
    features.make(job("features", out, parents, subset={"name": "all"}))
    (out / "shard.zarr").rename(out / "shard-00000.zarr")
    return features_of(out).scores(by)["t"]


def features_of(folder: Path) -> Any:
    from iprox.stages.feature_store import read_features

    return read_features(folder)


@pytest.mark.parametrize("estimator", ["kfac", "ekfac", "datainf"])
def test_much_damping_ranks_like_tracin(study: Study, estimator: str) -> None:
    source = study.query()
    flat = study.direction(estimator, source, damping=1e9, damping_mode="absolute")
    sharp = study.direction(estimator, source, damping=1e-3)
    for by in ("dot", "cosine"):
        plain = score(study, source, by)
        assert spearman(score(study, flat, by), plain) == pytest.approx(1.0)
        assert spearman(score(study, sharp, by), plain) < 1


def test_a_cosine_is_of_the_changed_query_and_the_example(reader: Reader, study: Study) -> None:
    made = study.direction("kfac")
    changed = gradients(made)
    norm = inner(changed, changed) ** 0.5
    assert open_store(made / "query.zarr")["norms"][:] == pytest.approx([norm], rel=1e-6)
    scores = score(study, made, "cosine")
    for i, name in enumerate(sorted(EXAMPLES)):
        g = weight_gradients(reader.model, reader.layers, example(reader, *EXAMPLES[name]))
        expected = inner(changed, g) / norm / inner(g, g) ** 0.5
        assert scores[i] == pytest.approx(expected, rel=1e-5, abs=1e-7)


def test_factors_of_a_proxy_are_layers_like_others(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = exact_reader()
    proxy = factorised(dense.model, dense.layers)
    layers = scored_linears(proxy, LayersSection())
    reader = use(monkeypatch, Reader(proxy, dense.tokenizer, layers, dense.device))
    source, name = study.query(), f"{LAYER}.left"
    found = gradients(study.direction("kfac", source))[name]
    s, a, n = second_moments(reader, name)
    curvature = n * torch.kron(s, a)
    damped = curvature + 0.1 * curvature.trace() / len(curvature) * torch.eye(len(curvature))
    expected = torch.linalg.solve(damped, gradients(source)[name].flatten()).reshape(found.shape)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=float(expected.abs().max()) * 1e-5)


def test_long_sides_are_split_and_reported(study: Study, caplog: pytest.LogCaptureFixture) -> None:
    made = study.curvature(curvature={"max_factor_dim": 20})
    assert "split into blocks" in caplog.text
    store = open_store(made / "curvature.zarr")
    assert store.attrs["split"]["inputs/model.layers.0.self_attn.q_proj"] == 2
    assert store["inputs/model.layers.0.self_attn.q_proj/1"].shape == (16, 16)
    assert f"output_grads/{LAYER}" not in store.attrs["split"]
    direction_of = study.direction("kfac", fitted={"curvature": made})
    assert gradients(direction_of)[LAYER].isfinite().all()


def test_sampled_labels_are_another_curvature(study: Study) -> None:
    empirical, sampled = (
        study.curvature(curvature={"labels": labels}) for labels in ("empirical", "sampled")
    )
    name = f"grad_values/{LAYER}"
    values = [open_store(f / "curvature.zarr")[name][:] for f in (empirical, sampled)]
    assert not np.allclose(*values, atol=0)


def test_curvature_of_another_model_is_refused(
    study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, fitted = study.query(), study.fitted("ekfac")
    other = exact_reader()
    other.layers[LAYER].weight[0, 0] += 1
    use(monkeypatch, other)
    moved = study.query()
    for estimator in ("kfac", "ekfac"):
        with pytest.raises(ArtifactError, match="another model"):
            study.direction(estimator, moved, fitted)
    with pytest.raises(ArtifactError, match="another model"):
        study.direction("datainf", source)
    passed = study.passed | {"curvature": fitted["curvature"]}
    with pytest.raises(ArtifactError, match="another model"):
        study.sharded(eigenvalues, passed, (0, 5))


def test_curvature_of_another_loss_is_refused(study: Study) -> None:
    fitted = study.fitted("kfac", influence={"loss_reduction": "token_sum"})
    with pytest.raises(ArtifactError, match="another loss_reduction"):
        study.direction("kfac", fitted=fitted)


def test_singular_curvature_without_damping_names_the_layer(study: Study) -> None:
    with pytest.raises(NumericsError, match=r"cannot be inverted(.|\n)*layer model\.layers"):
        study.direction("kfac", damping=0.0)
    with pytest.raises(NumericsError, match=r"needs damping(.|\n)*layer model\.layers"):
        study.direction("datainf", damping=0.0)
    with pytest.raises(ConfigError, match="factored damping"):
        study.direction("datainf", damping_mode="factored")


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_a_second_moment_without_variance_names_the_layer(study: Study, value: float) -> None:
    sums = study.sharded(covariance, study.passed, (0, 5))
    store = open_writable(sums / "shard-00000.zarr")
    store[f"output_grads/{LAYER}/0"][...] = value
    with pytest.raises(NumericsError, match=rf"zero or not finite(.|\n)*{LAYER}, output grads"):
        curvature.make(job("curvature", study.new(), {"covariance": sums}))


def open_writable(path: Path) -> Any:
    import zarr

    return zarr.open_group(str(path), mode="r+")


def test_an_empty_fisher_split_is_refused(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    sums = study.sharded(covariance, study.passed, (0, 0))
    with pytest.raises(ArtifactError, match="no example of the fisher split"):
        curvature.make(job("curvature", study.new(), {"covariance": sums}))
    monkeypatch.setattr("iprox.stages.fisher.split_ids", lambda *_: [])
    with pytest.raises(DataError, match="no example has a supervised token"):
        study.direction("datainf")


def test_fingerprints_tell_models_apart(reader: Reader) -> None:
    other = exact_reader()
    assert fingerprint(reader.layers) == fingerprint(other.layers)
    other.layers[LAYER].weight[0, 3] += 1e-9
    assert fingerprint(reader.layers) != fingerprint(other.layers)


def test_every_estimator_has_its_file() -> None:
    folder = Path(estimators.__file__).parent
    assert {p.stem for p in folder.glob("*.py")} - {"__init__"} == {
        name for name, reads in ESTIMATORS.items() if reads
    }


def test_the_estimator_of_the_contributors_guide_runs(
    reader: Reader, study: Study, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    guide = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()
    file, line, *_ = re.findall(r"```python\n(.*?)```", guide, re.DOTALL)
    [(name, reads)] = ast.literal_eval(f"{{{line}}}").items()
    (tmp_path / f"{name}.py").write_text(file)
    monkeypatch.setattr(estimators, "__path__", [*estimators.__path__, str(tmp_path)])
    monkeypatch.setitem(ESTIMATORS, name, reads)
    source = study.query()
    found = gradients(study.direction(name, source))[LAYER]
    _, a, _ = second_moments(reader, LAYER)
    damped = a + 0.1 * a.trace() / len(a) * torch.eye(len(a))
    expected = torch.linalg.solve(damped, gradients(source)[LAYER].mT).mT
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=float(expected.abs().max()) * 1e-5)
    assert len(file.splitlines()) <= 25
