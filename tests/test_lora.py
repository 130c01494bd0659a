"""LoRA: the model starts unchanged, its update has the rank asked for, and nothing else is new."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model
from test_sft import PAD, Killed, Killing, examples, gap, settings, weights

from iprox.errors import ConfigError
from iprox.models.layers import block_linears
from iprox.study.schema import LayersSection
from iprox.training import checkpoints, sft


def train(model: Any, pool: Any = None, folder: Path | None = None, **changes: Any) -> sft.Training:
    given = settings(**{"lora_rank": 2, "batch": 2, "lr": 1e-2} | changes)
    return sft.fine_tune(
        model, pool or examples(6), given, pad_token_id=PAD, micro_batch=1, checkpoints=folder
    )


def test_without_the_package_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ConfigError, match="lora_rank"):
        train(tiny_model())


def test_block_linears_get_updates_of_the_rank_and_nothing_else_changes() -> None:
    pytest.importorskip("peft")
    model = tiny_model()
    before, names = weights(model), set(block_linears(model, LayersSection()))
    done = train(model)
    after = weights(model)
    assert after.keys() == before.keys()
    for name, weight in after.items():
        update = weight - before[name]
        if name.removesuffix(".weight") in names:
            assert torch.linalg.matrix_rank(update, rtol=1e-6) == 2
        else:
            assert not update.any()
    sizes = (before[f"{name}.weight"].shape for name in names)
    assert done.parameters == sum(2 * (out + into) for out, into in sizes)
    assert done.log["loss"].iloc[-1] < done.log["loss"].iloc[0]
    assert not any(p.requires_grad for p in model.parameters())


def test_the_merged_model_says_what_the_trained_one_said(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    model = tiny_model(dtype=torch.float32)
    train(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert gap(weights(model), weights(loaded)) == 0.0
    assert sorted(p.name for p in tmp_path.iterdir() if "adapter" in p.name) == []


def test_the_same_seed_gives_the_same_update() -> None:
    pytest.importorskip("peft")
    made = []
    for seed in (0, 0, 1):
        model = tiny_model()
        train(model, seed=seed)
        made.append(weights(model))
    assert gap(made[0], made[1]) == 0.0
    assert gap(made[0], made[2]) > 0.0


def test_a_killed_training_goes_on_to_the_same_update(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    models = [tiny_model(dtype=torch.float32) for _ in range(3)]
    train(models[0])
    pool = Killing(examples(6))
    pool.left = 9
    with pytest.raises(Killed):
        train(models[1], pool, tmp_path)
    assert checkpoints.last_checkpoint(tmp_path) is not None
    train(models[2], None, tmp_path)
    assert gap(weights(models[0]), weights(models[2])) == 0.0
