"""Training against a hand-written AdamW loop, and what must not change or be written."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny_model, tiny_tokenizer
from torch import Tensor

from iprox.data.chat import IGNORED, Encoded
from iprox.errors import ArtifactError, ConfigError, DataError, ModelError, NumericsError
from iprox.models.load import load_model, load_tokenizer, load_weights
from iprox.progress import loops
from iprox.stages import checkpoint, finetune, warmup
from iprox.store.job import Job
from iprox.store.tables import read_table, write_table
from iprox.study.schema import FinetuneSection, WarmupSection
from iprox.training import checkpoints, sft

PAD = 0


class Recorded(list[Any]):
    """Examples that remember the order in which they were asked for."""

    order: list[int]

    def __getitem__(self, index: Any) -> Any:
        self.order.append(index)
        return super().__getitem__(index)


def examples(n: int, seed: int = 0) -> list[Encoded]:
    """``n`` examples of 5 to 12 tokens, the last 1 to 4 supervised."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        length, answer = (
            int(torch.randint(a, b, (), generator=generator)) for a, b in ((5, 13), (1, 5))
        )
        ids = torch.randint(4, 260, (length,), generator=generator).tolist()
        made.append(Encoded(ids, [IGNORED] * (length - answer) + ids[length - answer :]))
    return made


def settings(**changes: Any) -> FinetuneSection:
    values = dict(epochs=3.0, lr=1e-3, weight_decay=0.1, batch=4, lr_warmup=0.3)
    return FinetuneSection(**(values | changes))


def weights(model: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def gap(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[n] - second[n]).abs().max()) for n in first)


def token_mean(model: Any, batch: list[Encoded]) -> Tensor:
    """Mean over all supervised tokens of a batch, one unpadded example at a time."""
    total, count = torch.zeros(()), 0
    for example in batch:
        # Cross-entropy in float32, as transformers' own loss has it for every precision.
        logits = model(input_ids=torch.tensor([example.input_ids])).logits[0, :-1].float()
        targets = torch.tensor(example.labels[1:])
        total = total + F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
        count += int((targets != IGNORED).sum())
    return total / count


def adamw_by_hand(
    model: Any, batches: list[list[Encoded]], given: FinetuneSection, stop: int | None = None
) -> list[float]:
    """AdamW with clipping at norm 1, decay on matrices only, and a linear schedule.

    ``stop`` ends it after some steps of the schedule of all batches.
    """
    model.requires_grad_(True)
    first = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    second = copy.deepcopy(first)
    rising = math.ceil(len(batches) * given.lr_warmup)
    losses = []
    for step, batch in enumerate(batches[:stop]):
        rate = step / rising if step < rising else (len(batches) - step) / (len(batches) - rising)
        lr = given.lr * rate
        loss = token_mean(model, batch)
        losses.append(loss.item())
        model.zero_grad()
        loss.backward()
        norm = torch.sqrt(sum((p.grad**2).sum() for p in model.parameters()))
        with torch.no_grad():
            for name, p in model.named_parameters():
                grad = p.grad / max(float(norm), 1.0)
                if p.dim() > 1:
                    p -= lr * given.weight_decay * p
                first[name] = 0.9 * first[name] + 0.1 * grad
                second[name] = 0.999 * second[name] + 0.001 * grad**2
                mean = first[name] / (1 - 0.9 ** (step + 1))
                spread = (second[name] / (1 - 0.999 ** (step + 1))).sqrt()
                p -= lr * mean / (spread + 1e-8)
    return losses


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-6)])
def test_trainer_takes_the_steps_of_a_hand_written_adamw(
    dtype: torch.dtype, tolerance: float
) -> None:
    given = settings(batch=2, epochs=2.0)  # 6 examples: 6 steps, in an order of its own
    pool = Recorded(examples(6))
    pool.order = []
    ours, oracle = tiny_model(dtype=dtype), tiny_model(dtype=dtype)
    result = sft.fine_tune(ours, pool, given, pad_token_id=PAD, micro_batch=2)
    order = pool.order
    assert sorted(order) == sorted([*range(6), *range(6)])
    batches = [[list.__getitem__(pool, i) for i in order[s : s + 2]] for s in range(0, 12, 2)]
    losses = adamw_by_hand(oracle, batches, given)
    assert gap(weights(ours), weights(oracle)) < tolerance
    assert result.log["loss"].tolist() == pytest.approx(losses, rel=1e-5)
    assert gap(weights(ours), weights(tiny_model(dtype=dtype))) > 100 * tolerance


def test_earlier_epochs_are_seen_as_the_steps_leave_them() -> None:
    given = settings(batch=2, epochs=2.5)  # 6 examples: epochs end after 3, 6 and 8 steps
    pool = Recorded(examples(6))
    pool.order = []
    ours, seen = tiny_model(), {}
    result = sft.fine_tune(
        ours,
        pool,
        given,
        pad_token_id=PAD,
        micro_batch=2,
        at_epoch_end=lambda epoch, _: seen.update({epoch: weights(ours)}),
    )
    order = pool.order[:16]
    batches = [[list.__getitem__(pool, i) for i in order[s : s + 2]] for s in range(0, 16, 2)]
    assert list(seen) == [1, 2]
    for epoch, steps in ((1, 3), (2, 6)):
        oracle = tiny_model()
        adamw_by_hand(oracle, batches, given, stop=steps)
        assert gap(seen[epoch], weights(oracle)) < 1e-8
    table = sft.epoch_weights(result.log)
    rates = result.log["lr"].tolist()
    means = [sum(part) / len(part) for part in (rates[:3], rates[3:6], rates[6:])]
    assert table["steps"].tolist() == [3, 3, 2]
    assert table["weight"].tolist() == pytest.approx([m / sum(means) for m in means], rel=1e-12)


def test_micro_batches_change_only_rounding() -> None:
    models = [tiny_model() for _ in range(3)]
    for model, micro in zip(models, (1, 2, 4), strict=True):
        sft.fine_tune(model, examples(8), settings(), pad_token_id=PAD, micro_batch=micro)
    assert gap(weights(models[0]), weights(models[2])) < 1e-12
    assert gap(weights(models[1]), weights(models[2])) < 1e-12


def test_the_same_seed_gives_the_same_bytes_and_another_seed_does_not() -> None:
    models = [tiny_model(dtype=torch.float32) for _ in range(3)]
    for model, seed in zip(models, (5, 5, 6), strict=True):
        sft.fine_tune(model, examples(8), settings(seed=seed), pad_token_id=PAD)
    assert gap(weights(models[0]), weights(models[1])) == 0
    assert gap(weights(models[0]), weights(models[2])) > 0


def test_frozen_embeddings_stay_and_everything_else_moves() -> None:
    model = tiny_model(tie_word_embeddings=False)
    before = weights(model)
    sft.fine_tune(model, examples(4), settings(freeze_embed_head=True), pad_token_id=PAD)
    same = {n for n, w in weights(model).items() if torch.equal(w, before[n])}
    assert same == {"model.embed_tokens.weight", "lm_head.weight"}


def test_the_log_has_a_row_per_step_and_a_linear_schedule() -> None:
    result = sft.fine_tune(
        tiny_model(), examples(10), settings(epochs=2.0, lr_warmup=0.0), pad_token_id=PAD
    )
    log = result.log
    assert log["step"].tolist() == [1, 2, 3, 4, 5, 6]  # 4 + 4 + 2 sequences, twice
    assert log["epoch"].iloc[-1] == pytest.approx(2.0)
    assert log["lr"].tolist() == pytest.approx([1e-3 * (6 - s) / 6 for s in range(6)])
    assert log["loss"].iloc[0] == pytest.approx(math.log(260), rel=0.05)
    assert (log["grad_norm"] > 0).all()
    assert result.tokens == 2 * sum(len(e.input_ids) for e in examples(10))


def test_fractions_of_an_epoch_train_fractions_of_its_steps() -> None:
    result = sft.fine_tune(tiny_model(), examples(16), settings(epochs=0.5), pad_token_id=PAD)
    assert len(result.log) == 2


def test_a_single_step_trains() -> None:
    model = tiny_model()
    before = weights(model)
    given = settings(epochs=1, batch=4, lr_warmup=0.03)
    sft.fine_tune(model, examples(4), given, pad_token_id=PAD)
    assert gap(before, weights(model)) > 0


def test_bfloat16_keeps_float32_master_weights() -> None:
    model = tiny_model(dtype=torch.float32)
    sft.fine_tune(model, examples(4), settings(lr=1e-5), pad_token_id=PAD, bf16=True)
    moved = weights(model)
    assert {w.dtype for w in moved.values()} == {torch.float32}
    change = gap(moved, weights(tiny_model(dtype=torch.float32)))
    assert 0 < change < 1e-4  # below what bfloat16 resolves at 1: lost without master weights


def test_a_diverging_run_stops_and_names_the_step() -> None:
    model = tiny_model(dtype=torch.float32)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(NumericsError, match=r"step 1"):
        sft.fine_tune(model, examples(4), settings(), pad_token_id=PAD)


def test_examples_without_anything_to_learn_are_refused() -> None:
    only_first = Encoded([5, 6], [5, IGNORED], example_id="a-1")  # nothing precedes the first token
    with pytest.raises(DataError, match="1 of 1 examples: a-1"):
        sft.fine_tune(tiny_model(), [only_first], settings(), pad_token_id=PAD)
    with pytest.raises(DataError, match="nothing to train on"):
        sft.fine_tune(tiny_model(), [], settings(), pad_token_id=PAD)


def test_a_saved_model_loads_with_the_trained_weights_and_nothing_is_pickled(
    tmp_path: Path,
) -> None:
    model = tiny_model(dtype=torch.float32)
    config = copy.deepcopy(model.config)
    section = WarmupSection(batch=4, lr=1e-3)
    sft.fine_tune(model, examples(4), section, pad_token_id=PAD)
    trained = weights(model)
    sft.save(model, tiny_tokenizer(), tmp_path, torch.float32)
    assert gap(weights(load_model(tmp_path)), trained) == 0
    assert load_tokenizer(tmp_path).encode("ab") == tiny_tokenizer().encode("ab")
    assert load_model(tmp_path).config.use_cache == config.use_cache
    suffixes = {p.suffix for p in tmp_path.iterdir()}
    assert suffixes <= {".json", ".safetensors", ".jinja"}


def test_the_micro_batch_divides_the_batch_and_fits_the_budget(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    long = [Encoded([4] * 300, [4] * 300)]
    assert sft.micro_batch_size(long, 32) == 2  # 3 fit into 1024 tokens; 2 divides 32
    assert sft.micro_batch_size(examples(3), 6) == 6
    assert sft.micro_batch_size([Encoded([4] * 5000, [4] * 5000)], 7) == 1
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert sft.micro_batch_size(examples(3), 6) == 3
    assert sft.micro_batch_size(long, 32) == 1  # the two processes share the budget
    with pytest.raises(ConfigError, match="multiple of 2"):
        sft.micro_batch_size(examples(3), 7)


def messages(i: int) -> list[dict[str, str]]:
    return [
        {"role": "user", "content": f"Say {i}."},
        {"role": "assistant", "content": f"It is {i}."},
    ]


def stage_job(tmp_path: Path, target: Path, stage: str, section: dict[str, Any]) -> Job:
    """A pool of 8 examples, 4 in the warm-up split, and a selection of 3."""
    folders = {role: tmp_path / role for role in ("pool", "split", "selection", f"out-{stage}")}
    for folder in folders.values():
        folder.mkdir(exist_ok=True)
    rows = [{"example_id": f"ex-{i}", "messages": messages(i)} for i in range(8)]
    write_table(folders["pool"] / "pool.parquet", pa.Table.from_pylist(rows))
    split = [{"example_id": f"ex-{i}", "split": "warmup", "position": 3 - i} for i in range(4)]
    split += [{"example_id": f"ex-{i}", "split": "probe", "position": i - 4} for i in range(4, 8)]
    write_table(folders["split"] / "split.parquet", pa.Table.from_pylist(split))
    lines = "".join(json.dumps({**row, "tasks": ["t"]}) + "\n" for row in rows[:3])
    (folders["selection"] / "selected").mkdir(exist_ok=True)
    (folders["selection"] / "selected" / "t.jsonl").write_text(lines, encoding="utf-8")
    params = {
        stage: section,
        "chat": {"max_length": 64},
        "compute": {"dtype": "float32", "attention": "eager"},
        "subset": {"task": "t"},
    }
    parents = {**folders, "target": target, "model": target}
    return Job(stage=stage, params=params, parents=parents, out=folders[f"out-{stage}"])


def test_the_warmup_stage_trains_on_its_split_and_leaves_a_model(
    tmp_path: Path, target_folder: Path
) -> None:
    job = stage_job(tmp_path, target_folder, "warmup", {"lr": 1e-3, "batch": 2})
    with loops() as ended:
        metrics = warmup.make(job)
    assert (ended[0].tokens, ended[0].examples) == (metrics["tokens"], metrics["examples"])
    assert metrics["flops"] > 6 * metrics["parameters"] * metrics["tokens"] > 0  # and attention
    assert (metrics["examples"], metrics["steps"], metrics["examples_dropped"]) == (4, 2, 0)
    before, after = load_model(target_folder), load_model(job.out)
    assert torch.equal(before.model.embed_tokens.weight, after.model.embed_tokens.weight)
    assert gap(weights(before), weights(after)) > 1e-4
    log = read_table(job.out / "log.parquet")
    assert log.columns.tolist() == ["step", "epoch", "loss", "lr", "grad_norm"]
    assert log["loss"].iloc[0] == metrics["loss_first"]


def test_the_stages_write_the_same_bytes_again(tmp_path: Path, target_folder: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        warmup.make(stage_job(tmp_path / name, target_folder, "warmup", {"lr": 1e-3}))
    assert files(tmp_path / "a" / "out-warmup") == files(tmp_path / "b" / "out-warmup")


def files(folder: Path) -> dict[str, bytes]:
    """Contents of all files by their path."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_checkpoint_is_the_model_of_its_epoch(tmp_path: Path, target_folder: Path) -> None:
    learning = {"batch": 2, "lr": 1e-3, "epochs": 3.0}
    for name in ("plain", "kept"):
        (tmp_path / name).mkdir()
    plain = stage_job(tmp_path / "plain", target_folder, "warmup", learning)
    kept = stage_job(tmp_path / "kept", target_folder, "warmup", learning)
    warmup.make(plain)
    warmup.make(replace(kept, params={**kept.params, "epochs": {"kept": True}}))
    assert files(plain.out) == {n: b for n, b in files(kept.out).items() if "epoch" not in n}
    models = {}
    for epoch in (1, 2):
        params = {"checkpoint": {"epoch": epoch}, "compute": {"dtype": "float32"}}
        out = tmp_path / str(epoch)
        out.mkdir()
        job = Job("checkpoint", params, {"warmup": kept.out}, out, strict=True)
        assert checkpoint.make(job)["epoch"] == epoch
        load_tokenizer(out)
        models[epoch] = weights(load_model(out))
        assert gap(models[epoch], weights(load_model(sft.epoch_folder(kept.out, epoch)))) == 0
    last = weights(load_model(kept.out))
    assert gap(models[1], models[2]) > 0
    assert gap(models[2], last) > 0
    missing = Job("checkpoint", {"checkpoint": {"epoch": 3}}, {"warmup": kept.out}, out)
    with pytest.raises(ModelError):
        checkpoint.make(missing)


def test_no_epochs_leave_the_target_as_it_is(tmp_path: Path, target_folder: Path) -> None:
    job = stage_job(tmp_path, target_folder, "warmup", {"epochs": 0.0})
    assert warmup.make(job)["steps"] == 0
    assert gap(weights(load_model(target_folder)), weights(load_model(job.out))) == 0
    assert len(read_table(job.out / "log.parquet")) == 0


def test_the_saved_precision_is_the_targets(tmp_path: Path, target_folder: Path) -> None:
    job = stage_job(tmp_path, target_folder, "warmup", {"epochs": 0.0})
    job.params["compute"]["dtype"] = "bfloat16"
    warmup.make(job)
    stored = load_weights(job.out)
    assert {w.dtype for w in stored.values()} == {torch.bfloat16}
    assert all(torch.equal(w.bfloat16(), stored[n]) for n, w in load_weights(target_folder).items())


def test_the_finetune_stage_trains_on_the_selection_of_its_task(
    tmp_path: Path, target_folder: Path
) -> None:
    job = stage_job(tmp_path, target_folder, "finetune", {"lr": 1e-3, "batch": 2, "epochs": 2})
    metrics = finetune.make(job)
    assert (metrics["examples"], metrics["steps"]) == (3, 4)
    assert gap(weights(load_model(target_folder)), weights(load_model(job.out))) > 1e-4
    job.params["subset"]["task"] = "bbh"
    with pytest.raises(ArtifactError, match="no such subset"):
        finetune.make(job)


def test_responses_cut_away_are_dropped_and_counted(
    tmp_path: Path, target_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    job = stage_job(tmp_path, target_folder, "finetune", {"epochs": 1})
    path = job.parents["selection"] / "selected" / "t.jsonl"
    long = [{"role": "user", "content": "x" * 99}, {"role": "assistant", "content": "y"}]
    with path.open("a") as file:
        file.write(json.dumps({"example_id": "long-1", "tasks": ["t"], "messages": long}) + "\n")
    metrics = finetune.make(job)
    assert (metrics["examples"], metrics["examples_dropped"]) == (3, 1)
    assert "long-1" in caplog.text
    job.params["chat"]["max_length"] = 8
    with pytest.raises(DataError, match="nothing to train on"):
        finetune.make(job)


# --- checkpoints ---------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for a signal: nothing in between may catch it."""


class Killing(list[Any]):
    """Examples that kill the training when one more than ``left`` is asked for."""

    left: int

    def __getitem__(self, index: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().__getitem__(index)


@pytest.mark.parametrize("left", [5, 6, 9, 13, 17])
@pytest.mark.parametrize("micro", [1, 2])
def test_a_killed_training_goes_on_to_the_same_bytes(
    left: int, micro: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """6 examples, 2 a step: 9 steps of 3 epochs; killed in epochs and between them."""
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    given, kept = settings(batch=2, epochs=3.0), tmp_path / "progress"

    def train(pool: list[Encoded], folder: Path | None) -> tuple[dict[str, Tensor], Any]:
        model = tiny_model(dtype=torch.float32)
        done = sft.fine_tune(
            model, pool, given, pad_token_id=PAD, micro_batch=micro, checkpoints=folder
        )
        return weights(model), done.log

    whole, log = train(examples(6), None)
    pool = Killing(examples(6))
    pool.left = left
    with pytest.raises(Killed):
        train(pool, kept)
    last = checkpoints.last_checkpoint(kept)
    assert last is not None
    assert 0 < len(checkpoints.read_history(last)) < len(log)
    resumed, resumed_log = train(examples(6), kept)
    assert gap(whole, resumed) == 0.0
    assert resumed_log.equals(log)
    files = {p.suffix for p in kept.rglob("*") if p.is_file()}
    assert files == {".safetensors", ".json"}


def test_a_training_that_is_not_killed_is_the_same_with_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "SECONDS", 0.0)
    trained = []
    for folder in (None, tmp_path / "kept"):
        model = tiny_model(dtype=torch.float32)
        sft.fine_tune(model, examples(6), settings(), pad_token_id=PAD, checkpoints=folder)
        trained.append(weights(model))
    assert gap(*trained) == 0.0
