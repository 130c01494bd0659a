"""A fine-tuned model with another head: a classifier whose labels are traced to texts."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import turns, write_pool, write_split, write_task
from conftest import tiny_model, tiny_tokenizer
from oracles import in_float64, inner, weight_gradients
from test_direction import Study, example, gradients, use
from torch import Tensor, nn

from iprox.data.labelled import encode_labelled
from iprox.errors import ArtifactError, DataError, ModelError
from iprox.models.classifier import class_ids
from iprox.models.layers import scored_linears
from iprox.models.load import load_model
from iprox.numerics.kfac import Damping
from iprox.plan.nodes import Node
from iprox.plan.plan import plan_study
from iprox.stages import target
from iprox.stages.curvature_store import open_curvature
from iprox.stages.passes import Reader
from iprox.store.arrays import open_store
from iprox.store.job import Job
from iprox.store.tables import read_table
from iprox.study.load import load_study
from iprox.study.schema import LayersSection

LABELS = ("bad", "good", "fair")
REVIEWS = {
    "r0": ("red cat sings", "good"),
    "r1": ("two dogs", "bad"),
    "r2": ("green bird over one cat", "fair"),
}
SHARDED = ("covariance", "eigenvalues", "features")


def classifier(dtype: torch.dtype = torch.float64, **changes: Any) -> Any:
    """A tiny Llama that sorts texts by three labels."""
    from transformers import AutoModelForSequenceClassification

    config = tiny_model(**changes).config
    config.id2label = dict(enumerate(LABELS))
    config.label2id = {label: place for place, label in enumerate(LABELS)}
    torch.manual_seed(7)
    model = AutoModelForSequenceClassification.from_config(config)
    model.config.architectures = [type(model).__name__]
    return model.to(dtype).eval()


@pytest.fixture
def reader() -> Reader:
    model = in_float64(classifier())
    layers = scored_linears(model, LayersSection())
    return Reader(model, tiny_tokenizer(), layers, torch.device("cpu"))


@pytest.fixture
def study(tmp_path: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Reviews as the pool of the fine-tuning, and two of them as queries."""
    use(monkeypatch, reader)
    found = Study.__new__(Study)
    found.folder = tmp_path
    found.pool = write_pool(tmp_path / "pool", REVIEWS)
    found.split = write_split(tmp_path / "split", "fisher", list(REVIEWS))
    found.task = write_task(tmp_path / "task", [("all", *REVIEWS["r0"]), ("all", *REVIEWS["r2"])])
    found.passed = {"pool": found.pool, "split": found.split}
    return found


def gradient_of(reader: Reader, text: str, label: str) -> dict[str, Tensor]:
    """Weight gradients of one label's loss, by the model's own pass and autograd."""
    ids = torch.tensor([reader.tokenizer(text)["input_ids"]])
    weights = [layer.weight.requires_grad_() for layer in reader.layers.values()]
    logits = reader.model(input_ids=ids).logits
    loss = nn.functional.cross_entropy(logits, torch.tensor([LABELS.index(label)]))
    found = torch.autograd.grad(loss, weights)
    reader.model.requires_grad_(False)
    return dict(zip(reader.layers, found, strict=True))


def test_a_query_is_the_gradient_of_its_label_s_loss(study: Study, reader: Reader) -> None:
    found = gradients(study.query())
    each = [gradient_of(reader, *REVIEWS[name]) for name in ("r0", "r2")]
    assert set(found) == set(reader.layers)  # the head's own weights are no part of it
    for name, gradient in found.items():
        expected = sum(g[name] for g in each) / 2
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-5 * scale)


def test_curvature_is_of_the_texts_tokens_and_labels_losses(study: Study, reader: Reader) -> None:
    fitted = study.fitted("ekfac")
    n_tokens = sum(len(reader.tokenizer(text)["input_ids"]) for text, _ in REVIEWS.values())
    store = open_store(fitted["curvature"] / "curvature.zarr")
    assert set(store.attrs["tokens"].values()) == {n_tokens}  # the label is no token
    layer = open_curvature(fitted["curvature"], fitted["eigenvalues"]).layer(
        name := next(iter(reader.layers)), torch.device("cpu")
    )
    total = torch.zeros(layer.eigenvalues().shape, dtype=torch.float64)
    for text, label in REVIEWS.values():
        gradient = gradient_of(reader, text, label)[name].float()
        total += layer.inputs.into(layer.grads.into(gradient.mT).mT).double().square() / 3
    error = (layer.eigenvalues().double() - total).norm() / total.norm()
    assert float(error) < 1e-4


def test_a_label_the_model_does_not_have_is_refused_with_those_it_has(study: Study) -> None:
    study.task = write_task(study.folder / "other", [("all", "red cat", "god")])
    with pytest.raises(DataError, match=r"god(.|\n)*good\?(.|\n)*label2id"):
        study.query()


def test_the_last_token_of_a_cut_text_predicts_the_label() -> None:
    ids = {label: place for place, label in enumerate(LABELS)}
    found = encode_labelled(turns("abcdef", "good"), tiny_tokenizer(), ids, 4, "r")
    assert len(found) == 5
    assert found.n_truncated == 2
    assert found.labels == [-100] * 4 + [1]


@pytest.mark.parametrize(
    "changes", [{"problem_type": "multi_label_classification"}, {"problem_type": "regression"}]
)
def test_a_model_that_does_not_choose_one_label_is_refused(changes: dict[str, str]) -> None:
    with pytest.raises(ModelError, match="does not choose one"):
        class_ids(classifier(**changes))


def test_only_a_fine_tuned_model_may_be_a_classifier(tmp_path: Path) -> None:
    save(classifier(torch.float32), tmp_path / "sorter")
    params = {"target": {"model": "sorter"}}
    (tmp_path / "refused").mkdir()
    with pytest.raises(ModelError, match=r"cannot score(.|\n)*finetuned\.model"):
        target.make(Job("target", params, {}, tmp_path / "refused", data_dir=tmp_path))
    (tmp_path / "taken").mkdir()
    params |= {"measured": {"tasks": True}}
    target.make(Job("target", params, {}, tmp_path / "taken", data_dir=tmp_path))
    assert class_ids(load_model(tmp_path / "taken")) == {n: i for i, n in enumerate(LABELS)}


# --- from the config to a ranking ----------------------------------------------------------------


def save(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def write_jsonl(path: Path, rows: dict[str, tuple[str, str]]) -> None:
    lines = (json.dumps({"id": i, "prompt": p, "response": r}) for i, (p, r) in rows.items())
    path.write_text("\n".join(lines) + "\n")


def written_study(folder: Path, **sizes: Any) -> Path:
    """A study file beside its model, its pool, a classifier made from it, and labelled texts."""
    save(tiny_model(dtype=torch.float32), folder / "base")
    sorter = classifier(torch.float32, **sizes)
    if not sizes:
        base = load_model(folder / "base").base_model.state_dict()
        sorter.base_model.load_state_dict({n: 1.05 * w for n, w in base.items()})
    save(sorter, folder / "sorter")
    texts = {f"p{i}": (f"{'a red cat ' * (1 + i % 3)}{i}", f"sings {i * i}") for i in range(6)}
    write_jsonl(folder / "texts.jsonl", texts)
    write_jsonl(folder / "reviews.jsonl", REVIEWS)
    write_jsonl(folder / "asked.jsonl", {"q0": ("one green bird", "fair")})
    lines = [
        "study: sorted",
        "target: {model: base}",
        "pool: {path: texts.jsonl}",
        "finetuned: {model: sorter, pool: {path: reviews.jsonl}, fisher: 1.0}",
        "tasks: [{name: reviews, kind: messages, path: asked.jsonl}]",
        "chat: {template: tulu, max_length: 64}",
        "split: {warmup: 1.0, fisher: 1.0}",
        "warmup: {epochs: 0}",
        "proxy: {kind: target}",
        "until: ranking",
        "runs: {m: {influence: {estimator: multistage}, curvature: {proximity: 0.001}}}",
    ]
    path = folder / "study.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def made(node: Node, folder: Path, done: dict[str, Path]) -> Path:
    """The artifact of a stage and of all before it, as the workflow makes them, in one shard."""
    if node.id in done:
        return done[node.id]
    parents = {role: made(parent, folder, done) for role, parent in node.parents.items()}
    out = done[node.id] = folder / f"{node.stage}-{node.id}"
    out.mkdir()
    stage = importlib.import_module(f"iprox.stages.{node.stage}")
    stage.make(Job(node.stage, node.params, parents, out, data_dir=folder, strict=True))
    if node.stage in SHARDED:
        (out / "shard.zarr").rename(out / "shard-00000.zarr")
    return out


def test_a_study_ranks_texts_for_the_labels_of_a_classifier(tmp_path: Path) -> None:
    plan = plan_study(load_study([written_study(tmp_path)]))
    done: dict[str, Path] = {}
    nodes = plan.runs["m"].nodes
    ranking = read_table(made(nodes["ranking"], tmp_path, done) / "ranking.parquet")
    chosen = nodes["features"].parents["query/reviews"].parents
    fitted = {role: done[node.id] for role, node in chosen.items()}
    later = open_curvature(fitted["finetuned_curvature"], fitted["finetuned_eigenvalues"])
    first = open_curvature(fitted["curvature"], fitted["eigenvalues"])

    sorter = load_model(tmp_path / "sorter")
    layers = scored_linears(sorter, LayersSection())
    cpu = torch.device("cpu")
    asked = Reader(sorter, tiny_tokenizer(), layers, cpu)
    query_gradient = gradient_of(asked, "one green bird", "fair")
    solved = {
        n: first.layer(n, cpu).solve(
            later.layer(n, cpu).solve(v[None], Damping(1e-3, "absolute")), Damping()
        )[0]
        for n, v in query_gradient.items()
    }
    model = load_model(tmp_path / "base")
    read = Reader(model, tiny_tokenizer(), scored_linears(model, LayersSection()), cpu)
    pool = read_table(done[plan.shared["pool"].id] / "pool.parquet").set_index("example_id")
    found = ranking.set_index("example_id")["score"]
    assert len(found) == 6
    for name, score in found.items():
        prompt, response = (turn["content"] for turn in pool.loc[name, "messages"])
        gradient = weight_gradients(model, read.layers, example(read, prompt, response))
        norms = (inner(gradient, gradient) * inner(solved, solved)) ** 0.5
        assert score == pytest.approx(inner(gradient, solved) / norms, abs=1e-4)


def test_a_classifier_of_other_blocks_is_refused_with_their_numbers(tmp_path: Path) -> None:
    plan = plan_study(load_study([written_study(tmp_path, num_hidden_layers=1)]))
    with pytest.raises(ArtifactError, match="7 layers in common of 7 and 14"):
        made(plan.runs["m"].nodes["ranking"], tmp_path, {})
