"""An off-the-shelf model as the proxy: its own weights, tokenizer and warm-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import CHAT, job, random_examples, turns, write_pool, write_split, write_task
from conftest import tiny_model, tiny_tokenizer

from iprox.data.chat import encode
from iprox.models.load import load_model
from iprox.stages import features, fidelity, query, target, warmup
from iprox.store.arrays import open_store
from iprox.store.job import Job

EXAMPLES = random_examples(9)
QUERIES = [("s", "one red cat", "blue dog"), ("s", "two runs", "over bird")]


def other_tokenizer() -> Any:
    """The same alphabet, with other ids and two tokens that stand for several letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=True)
    special = ["<eos>", "<pad>"]
    vocab = {token: i for i, token in enumerate([*special, *alphabet, "re", "red"])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[("r", "e"), ("re", "d")]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(special)
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """A target and a smaller model, as a user has them, and the texts."""
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "large")
    tiny_tokenizer().save_pretrained(tmp_path / "large")
    small = tiny_model(
        dtype=torch.float32,
        vocab_size=272,
        hidden_size=16,
        num_hidden_layers=1,
        pad_token_id=1,
        eos_token_id=0,
    )
    small.save_pretrained(tmp_path / "small")
    other_tokenizer().save_pretrained(tmp_path / "small")
    return {
        "pool": write_pool(tmp_path / "pool", EXAMPLES),
        "split": write_split(tmp_path / "split", "warmup", ["e001", "e004", "e006"]),
        "task": write_task(tmp_path / "task", QUERIES),
    }


def scored(root: Path, name: str, parents: dict[str, Path]) -> Path:
    """From a model's folder to its features of the pool, stage by stage."""

    def out(stage: str) -> Path:
        return root / f"{name}-{stage}"

    out("target").mkdir()
    target.make(Job("target", {"target": {"model": name}}, {}, out("target"), data_dir=root))
    learning = {"pool": parents["pool"], "split": parents["split"], "target": out("target")}
    warmup.make(job("warmup", out("warmup"), learning, warmup={"batch": 2, "lr": 1e-3}))
    model = out("warmup")
    query.make(job("query", out("query"), {"model": model, "task": parents["task"]}))
    inputs = {"model": model, "pool": parents["pool"], "query/own": out("query")}
    features.make(job("features", out("features"), inputs, subset={"name": "all"}))
    (out("features") / "shard.zarr").rename(out("features") / "shard-00000.zarr")
    return out("features")


def test_it_reads_texts_with_its_own_tokenizer(tmp_path: Path, folders: dict[str, Path]) -> None:
    found = open_store(scored(tmp_path, "small", folders) / "shard-00000.zarr")
    model, tokenizer = load_model(tmp_path / "small-warmup"), other_tokenizer()
    lengths, losses = [], []
    for example_id in sorted(EXAMPLES):
        text = encode(turns(*EXAMPLES[example_id]), tokenizer, **CHAT)
        ids, labels = torch.tensor([text.input_ids]), torch.tensor([text.labels])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
        lengths.append(len(text))
    assert found["tokens"][...].tolist() == lengths
    np.testing.assert_allclose(found["loss"][...], losses, rtol=1e-5)
    in_the_targets = encode(turns(*EXAMPLES["e000"]), tiny_tokenizer(), **CHAT)
    assert in_the_targets.input_ids[: lengths[0]] != list(
        encode(turns(*EXAMPLES["e000"]), tokenizer, **CHAT).input_ids
    )


def test_it_is_warmed_up_and_compared_as_any_proxy(
    tmp_path: Path, folders: dict[str, Path]
) -> None:
    passes = {
        role: scored(tmp_path, n, folders) for role, n in (("proxy", "small"), ("target", "large"))
    }
    before, after = (load_model(tmp_path / n).state_dict() for n in ("small", "small-warmup"))
    changed = [n for n, tensor in before.items() if not torch.equal(tensor, after[n])]
    assert changed
    assert not [n for n in changed if "embed" in n or "lm_head" in n]
    out = tmp_path / "fidelity"
    out.mkdir()
    settings = {"fidelity": {"bootstrap": 10}, "influence": {}}
    metrics = fidelity.make(Job("fidelity", settings, passes, out))
    assert metrics["examples"] == len(EXAMPLES)
    assert -1 <= float(metrics["spearman"]) <= 1
