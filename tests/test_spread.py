"""Training in several processes against training in one, and what only one process can do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from test_sft import examples, settings

from iprox.errors import ConfigError, NumericsError
from iprox.models.load import load_weights
from iprox.store.tables import read_table
from iprox.training import sft, spread
from iprox.training.sft import train_folder

PRECISION: dict[str, Any] = {"dtype": "float32", "attention": "eager", "label": "training"}


@pytest.fixture
def start(tmp_path: Path) -> Path:
    folder = tmp_path / "start"
    tiny_model("llama", dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_two_processes_learn_what_one_learns(start: Path, tmp_path: Path) -> None:
    made = {}
    for processes in (1, 2):
        out = tmp_path / f"out-{processes}"
        section = settings(epochs=2.0, batch=2, lr_warmup=0.0)
        metrics = train_folder(start, out, examples(6), section, processes=processes, **PRECISION)
        made[processes] = (metrics, load_weights(out), read_table(out / "log.parquet"))
    (one, weights, log), (two, spread_weights, spread_log) = made[1], made[2]
    assert weights.keys() == spread_weights.keys()
    # sums in another order, which Adam magnifies where gradients are near zero
    before = load_weights(start)
    moved = max(float((value - before[name]).abs().max()) for name, value in weights.items())
    apart = max(float((spread_weights[n] - value).abs().max()) for n, value in weights.items())
    assert 1e-3 < moved
    assert apart < 0.01 * moved
    assert two["steps"] == one["steps"] == 6
    assert two["flops"] == one["flops"]
    np.testing.assert_allclose(spread_log["loss"], log["loss"], rtol=1e-4)
    np.testing.assert_allclose(spread_log["lr"], log["lr"])


def test_what_needs_the_whole_model_is_refused(start: Path, tmp_path: Path) -> None:
    for asked in ({"keep_moments": True}, {"keep_epochs": True}):
        with pytest.raises(ConfigError, match="final weights alone"):
            train_folder(
                start, tmp_path / "out", examples(4), settings(), processes=2, **PRECISION, **asked
            )
    with pytest.raises(ConfigError, match="multiple of 2"):
        train_folder(
            start, tmp_path / "out", examples(4), settings(batch=3), processes=2, **PRECISION
        )
    section = settings(lora_rank=2)
    with pytest.raises(ConfigError, match="train_gpus"):
        train_folder(start, tmp_path / "out", examples(4), section, processes=2, **PRECISION)


def test_why_a_process_failed_is_told(start: Path, tmp_path: Path) -> None:
    wild = settings(lr=1e30, lr_warmup=0.0)
    with pytest.raises(NumericsError, match="processes that trained together failed: training div"):
        train_folder(start, tmp_path / "out", examples(8), wild, processes=2, **PRECISION)


def test_models_are_sharded_by_block_on_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    assert spread.sharding(model) == {}
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert spread.sharding(model) == {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked = spread.sharding(model)
    monkeypatch.undo()
    arguments = sft._arguments(settings(), 2, 1, False, tmp_path, asked).fsdp_plugin_args
    assert arguments["fsdp_version"] == 2
    assert arguments["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer"
    assert arguments["state_dict_type"] == "FULL_STATE_DICT"
