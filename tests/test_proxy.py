"""The proxy stage, and proxies as folders and models that others can use."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from artifacts import job, random_examples, write_pool, write_split
from conftest import ARCHITECTURES, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from iprox.errors import ArtifactError, ConfigError, ModelError
from iprox.models.layers import block_linears, scored_linears
from iprox.models.load import as_proxy, load_model, load_proxy, save_proxy
from iprox.models.lowrank import LowRankLinear, find_linear, replace_linears
from iprox.numerics.ipsvd import Factors, plain_svd, truncate
from iprox.stages import proxy
from iprox.store.job import Job
from iprox.store.tables import read_metadata, read_table
from iprox.study.schema import LayersSection

SOME = LayersSection(exclude=["*k_proj"])
IDS = torch.arange(4, 24)[None]
TRAINING = {"epochs": 1.0, "batch": 4, "lr": 1e-3}


def factors_of(model: Any, rank: int = 6) -> dict[str, Factors]:
    linears = block_linears(model, SOME)
    return {
        name: truncate(plain_svd(linear.weight.detach()), rank) for name, linear in linears.items()
    }


def saved_proxy(folder: Path) -> Any:
    """A tiny float32 proxy, written to ``folder`` and loaded from it."""
    target = tiny_model(dtype=torch.float32)
    save_proxy(folder, target, factors_of(target), tiny_tokenizer(), {})
    return load_proxy(folder)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def write_factors(folder: Path, factors: dict[str, Factors]) -> Path:
    folder.mkdir()
    tensors = {
        f"{name}.{side}": t.float().contiguous()
        for name, pair in factors.items()
        for side, t in zip(("left", "right"), pair, strict=True)
    }
    save_file(tensors, folder / "factors.safetensors")
    return folder


# --- folders and models ------------------------------------------------------------------------


@pytest.fixture(params=[(a, True) for a in ARCHITECTURES] + [("llama", False), ("qwen2", False)])
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Any]:
    """A proxy in memory, and the same one saved and loaded."""
    architecture, tied = request.param
    target = tiny_model(architecture, torch.float32, tie_word_embeddings=tied)
    for linear in block_linears(target, SOME).values():
        if linear.bias is not None:
            torch.nn.init.normal_(linear.bias)
    factors = factors_of(target)
    save_proxy(tmp_path, target, factors, tiny_tokenizer(), {"note": "kept"})
    assert json.loads((tmp_path / "proxy.json").read_text())["note"] == "kept"
    return as_proxy(target, factors).eval(), load_proxy(tmp_path, attention="eager")


def test_a_saved_proxy_loads_bitwise(saved: tuple[Any, Any]) -> None:
    before, after = saved
    old, new = before.state_dict(), after.state_dict()
    assert set(old) == set(new)
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert torch.equal(logits(after), logits(before))


def test_a_loaded_proxy_is_an_ordinary_model(saved: tuple[Any, Any]) -> None:
    from transformers import PreTrainedModel

    _, after = saved
    assert isinstance(after, PreTrainedModel)
    assert not after.training
    head, embedding = after.get_output_embeddings(), after.get_input_embeddings()
    assert (head.weight is embedding.weight) == after.config.tie_word_embeddings
    found = after.generate(
        IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False
    )
    assert torch.equal(found[:, : IDS.shape[1]], IDS)


def test_what_a_loaded_proxy_saves_is_loaded_bitwise(
    saved: tuple[Any, Any], tmp_path: Path
) -> None:
    _, first = saved
    folder = tmp_path / "again"
    first.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    again = load_proxy(folder, attention="eager")
    old, new = first.state_dict(), again.state_dict()
    assert set(old) == set(new)
    assert all(torch.equal(new[name], old[name]) for name in old)
    assert torch.equal(logits(load_model(folder, attention="eager")), logits(first))


def test_the_example_in_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_proxy(tmp_path)
    readme = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (example,) = [
        b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "load_pr" in b
    ]
    (named,) = re.findall(r'^path = "(.*)"', example, re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    exec(example.replace(named, str(tmp_path)), {})
    assert capsys.readouterr().out.startswith("The sea")
    assert torch.equal(logits(load_proxy(tmp_path / "my-proxy")), logits(load_proxy(tmp_path)))


def test_a_damaged_description_is_refused(tmp_path: Path) -> None:
    saved_proxy(tmp_path)
    for name in ("proxy.json", "config.json"):
        (tmp_path / name).write_text("{")
        with pytest.raises(ModelError, match=name):
            load_model(tmp_path)
        (tmp_path / name).unlink()


def test_trainer_trains_the_factors(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    model = saved_proxy(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=1,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    row = {"input_ids": IDS[0], "labels": IDS[0]}
    trainer = Trainer(model=model, args=arguments, train_dataset=[row])
    trainer.train()
    trained = dict(model.named_parameters())
    moved = {name for name, old in before.items() if not torch.equal(trained[name], old)}
    assert {n for n in before if n.endswith(("left.weight", "right.weight"))} <= moved
    trainer.save_model(str(tmp_path / "trained"))
    assert torch.equal(logits(load_proxy(tmp_path / "trained")), logits(model.eval()))


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers")
def test_adapters_sit_on_the_factors(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = saved_proxy(tmp_path)
    before = logits(model)
    settings = peft.LoraConfig(r=2, target_modules=["left", "right"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    assert torch.equal(logits(adapted), before)  # an adapter starts at zero
    adapted(input_ids=IDS, labels=IDS).loss.backward()
    touched = [n for n, p in adapted.named_parameters() if p.grad is not None]
    assert touched
    assert all("lora_" in name for name in touched)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.01)
    found = logits(adapted)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits(merged), found, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load_proxy(tmp_path / "merged")), logits(merged))


def test_importing_the_package_loads_no_torch() -> None:
    code = "import sys, iprox; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_proxy_computes_the_product_of_its_factors_and_keeps_biases() -> None:
    target = tiny_model("qwen2")
    for linear in block_linears(target, SOME).values():
        if linear.bias is not None:
            torch.nn.init.normal_(linear.bias)
    factors = factors_of(target)
    found = logits(as_proxy(target, factors))
    for name, (left, right) in factors.items():
        find_linear(target, name).weight.data = left @ right
    torch.testing.assert_close(found, logits(target), rtol=1e-5, atol=1e-6)


def test_a_proxy_shares_nothing_with_its_target() -> None:
    target = tiny_model()
    before = {name: t.clone() for name, t in target.state_dict().items()}
    proxy_model = as_proxy(target, factors_of(target), torch.float32)
    with torch.no_grad():
        for parameter in proxy_model.parameters():
            parameter.fill_(1)
    assert all(torch.equal(t, before[name]) for name, t in target.state_dict().items())
    assert {p.dtype for p in proxy_model.parameters()} == {torch.float32}


def test_a_proxy_is_scored_by_its_factors_and_dense_layers(saved: tuple[Any, Any]) -> None:
    _, after = saved
    scored = set(scored_linears(after, LayersSection()))
    assert {n.rsplit(".", 1)[0] for n in scored if n.endswith((".left", ".right"))} == {
        n for n, m in after.named_modules() if isinstance(m, LowRankLinear)
    }
    assert "model.layers.0.self_attn.k_proj" in scored


def test_damaged_proxy_folders_are_refused(tmp_path: Path) -> None:
    target = tiny_model(dtype=torch.float32)
    save_proxy(tmp_path, target, factors_of(target), tiny_tokenizer(), {})
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    name = next(n for n in weights if n.endswith(".left.weight"))
    save_file({n: t for n, t in weights.items() if n != name}, path)
    with pytest.raises(ModelError, match="do not fit"):
        load_proxy(tmp_path)
    save_file(weights | {name: weights[name][:, 1:].contiguous()}, path)
    with pytest.raises(ModelError, match="do not fit"):
        load_proxy(tmp_path)
    (tmp_path / "proxy.json").unlink()
    with pytest.raises(ModelError, match="not a proxy"):
        load_proxy(tmp_path)


@pytest.mark.parametrize("change", [{"hidden_size": 16}, {"num_hidden_layers": 1}], ids=str)
def test_factors_and_proxies_of_another_target_are_refused(
    change: dict[str, int], tmp_path: Path
) -> None:
    target, other = tiny_model(dtype=torch.float32), tiny_model(dtype=torch.float32, **change)
    factors = factors_of(target)
    layer = r"model\.layers\.[01]\."
    for use in (
        lambda: as_proxy(other, factors),
        lambda: save_proxy(tmp_path, other, factors, tiny_tokenizer(), {}),
    ):
        with pytest.raises(ModelError, match=rf"(?s)(another target|no such layer).*{layer}.*do:"):
            use()
    save_proxy(tmp_path, target, factors, tiny_tokenizer(), {})
    other.config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"(?s)(do not fit|no such layer).*do:"):
        load_proxy(tmp_path)


def test_a_rank_above_its_layers_limit_is_refused() -> None:
    model = tiny_model()
    with pytest.raises(ModelError, match=r"(?s)rank.*layers\.0\.mlp\.up_proj.*33.*1\.\.32.*do:"):
        replace_linears(model, {"model.layers.0.mlp.up_proj": 33})


@pytest.mark.parametrize(
    "patterns", [{"include": ["*.qproj"]}, {"exclude": ["layers.7.*"]}], ids=str
)
def test_patterns_that_match_nothing_are_told_what_there_is(patterns: dict[str, list[str]]) -> None:
    first, last = "model.layers.0.self_attn.q_proj", "to model.layers.1.mlp.down_proj"
    for named in (scored_linears, block_linears):
        with pytest.raises(
            ModelError, match=rf"(?s)matches nothing.*proxy\.layers.*{first}.*{last}"
        ):
            named(tiny_model(), LayersSection(**patterns))
    with pytest.raises(ModelError, match=r"(?s)leave no layer.*of 14 layers.*do:"):
        scored_linears(tiny_model(), LayersSection(exclude=["*"]))


# --- the stage ---------------------------------------------------------------------------------


@pytest.fixture
def parents(tmp_path: Path, target_folder: Path) -> dict[str, Path]:
    examples = random_examples(12)
    return {
        "warmup": target_folder,
        "factors": write_factors(tmp_path / "factors", factors_of(load_model(target_folder))),
        "pool": write_pool(tmp_path / "pool", examples),
        "split": write_split(tmp_path / "split", "align", sorted(examples)[:10]),
    }


def proxy_job(out: Path, parents: dict[str, Path], gauge: str = "balanced", **align: Any) -> Job:
    return job("proxy", out, parents, align=align, gauge=gauge, passes="both")


def test_without_alignment_the_factors_are_taken_as_they_are(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    only = {role: parents[role] for role in ("factors", "warmup")}
    work = proxy_job(tmp_path / "out", only, epochs=0.0)
    metrics = proxy.make(work)
    target = load_model(parents["warmup"])
    expected = as_proxy(target, factors_of(target))
    made = load_proxy(work.out)
    assert torch.equal(logits(made), logits(expected))
    curve = read_table(work.out / "alignment.parquet")
    assert len(curve) == 1
    assert curve.loc[0, ["step", "split", "chosen"]].tolist() == [0, "heldout", True]
    assert curve[["loss_ga", "kl", "objective", "fidelity", "proxy_loss"]].isna().all(axis=None)
    assert read_table(work.out / "alignment_layers.parquet").empty
    assert metrics["parameters"] == sum(p.numel() for p in made.parameters())
    assert metrics["steps"] == metrics["chosen_step"] == metrics["flops"] == 0


def test_alignment_writes_its_curve_and_what_it_kept(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    work = proxy_job(tmp_path / "out", parents, **TRAINING, select_by="last")
    metrics = proxy.make(work)
    assert metrics["flops"] > 0
    curve = read_table(work.out / "alignment.parquet")
    assert curve["split"].tolist() == ["heldout", "train", "train", "heldout"]
    assert curve["step"].tolist() == [0, 1, 2, 2]
    assert curve["chosen"].tolist() == [False, False, False, True]
    train = curve["split"] == "train"
    assert curve.loc[train, "fidelity"].isna().all()
    assert curve.loc[~train, "fidelity"].notna().all()
    assert curve.loc[train, ["lr", "grad_norm"]].notna().all(axis=None)
    assert metrics["fidelity_start"] == curve.loc[0, "fidelity"]
    assert metrics["fidelity_best"] == curve.loc[3, "fidelity"]
    assert (metrics["steps"], metrics["train_examples"], metrics["heldout_examples"]) == (2, 6, 4)
    assert read_metadata(work.out / "alignment.parquet") == work.params["align"]
    layers = read_table(work.out / "alignment_layers.parquet")
    assert sorted(set(layers["step"])) == [0, 2]
    assert layers[["cosine_left", "cosine_right"]].notna().all(axis=None)
    about = json.loads((work.out / "proxy.json").read_text())
    assert about["alignment_step"] == 2
    assert set(about["ranks"]) == set(layers["layer"])
    target, made = load_model(parents["warmup"]), load_proxy(work.out)
    assert not torch.equal(logits(made), logits(as_proxy(target, factors_of(target))))


def test_training_that_harms_leaves_the_factors_as_they_were(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    work = proxy_job(tmp_path / "out", parents, epochs=1.0, lr=1e30, select_by="objective")
    metrics = proxy.make(work)
    assert metrics["chosen_step"] == 0
    target = load_model(parents["warmup"])
    assert torch.equal(logits(load_proxy(work.out)), logits(as_proxy(target, factors_of(target))))


def test_the_same_job_writes_the_same_bytes(tmp_path: Path, parents: dict[str, Path]) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        proxy.make(proxy_job(out, parents, **TRAINING))
    names = sorted(p.name for p in outs[0].iterdir())
    assert names == sorted(p.name for p in outs[1].iterdir())
    assert all((outs[0] / n).read_bytes() == (outs[1] / n).read_bytes() for n in names)


def test_a_bfloat16_target_gets_a_proxy_trained_in_float32(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    work = proxy_job(tmp_path / "out", parents, **TRAINING, select_by="last")
    work.params["compute"]["dtype"] = "bfloat16"
    assert proxy.make(work)["chosen_step"] == 2
    assert {t.dtype for t in load_file(work.out / "model.safetensors").values()} == {torch.bfloat16}


def test_examples_without_a_response_are_dropped_and_counted(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    work = proxy_job(tmp_path / "out", parents, **TRAINING)
    work.params["chat"] = {"template": "tulu", "max_length": 36}
    metrics = proxy.make(work)
    assert metrics["unsupervised"] > 0
    assert metrics["train_examples"] + metrics["heldout_examples"] == 10 - metrics["unsupervised"]


def test_too_few_examples_are_an_error(tmp_path: Path, parents: dict[str, Path]) -> None:
    parents["split"] = write_split(tmp_path / "small", "align", ["e000", "e001"])
    with pytest.raises(ConfigError, match="too few examples"):
        proxy.make(proxy_job(tmp_path / "out", parents, **TRAINING))


def test_incomplete_factors_are_refused(tmp_path: Path, parents: dict[str, Path]) -> None:
    path = parents["factors"] / "factors.safetensors"
    tensors = load_file(path)
    tensors.popitem()
    save_file(tensors, path)
    with pytest.raises(ArtifactError, match="incomplete"):
        proxy.make(proxy_job(tmp_path / "out", parents, epochs=0.0))
    path.write_bytes(b"")
    with pytest.raises(ArtifactError, match="cannot be read"):
        proxy.load_factors(path)
