"""A corpus of broken studies, pools, tasks and models: each ends in one message that helps.

The messages stand in ``bad_input.txt``, to be read as a user would. After a change of a message,
write them anew with ``IPROX_WRITE_GOLDEN=1 pytest tests/test_bad_input.py`` and read the diff.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest
import yaml
from bad_configs import CONFIGS
from conftest import tiny_model, tiny_tokenizer
from typer.testing import CliRunner

from iprox.cli.main import app
from iprox.cli.planning import load_plan
from iprox.plan.nodes import Node
from iprox.stages import pool, split, target, task
from iprox.store.runner import run_rule

GOLDEN = Path(__file__).with_name("bad_input.txt")
WRITE = "IPROX_WRITE_GOLDEN"

STUDY = """\
study: good
target: {model: model}
pool: {path: pool.jsonl}
tasks: [{name: own, kind: messages, path: task.jsonl}]
runs: {a: {}}
"""
RECORD = {"instruction": "Add one and two.", "output": "three"}
GOOD = json.dumps(RECORD) + "\n"


def write_good(folder: Path) -> None:
    """A study in order, and model folders that planning refuses."""
    (folder / "study.yaml").write_text(STUDY)
    (folder / "pool.jsonl").write_text(
        "".join(json.dumps(RECORD | {"instruction": f"Add one and {i}."}) + "\n" for i in range(4))
    )
    (folder / "task.jsonl").write_text(GOOD)
    (folder / "pool.txt").write_text("x")
    (folder / "empty.jsonl").write_text("")
    for name in ("model", "no-config", "broken-config", "pickled"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text('{"model_type": "llama"}')
        (folder / name / "model.safetensors").write_bytes(b"x")
    (folder / "no-config" / "config.json").unlink()
    (folder / "broken-config" / "config.json").write_text("{")
    (folder / "pickled" / "model.safetensors").rename(folder / "pickled" / "pytorch_model.bin")


# --- golden messages -----------------------------------------------------------------------


def read_golden() -> dict[str, str]:
    parts = re.split(r"^## (.*)\n", GOLDEN.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {name: text.strip() for name, text in zip(parts[1::2], parts[2::2], strict=True)}


def write_golden(name: str, message: str) -> None:
    found = {} if not GOLDEN.exists() else read_golden()
    found[name] = message
    text = "".join(f"## {case}\n{found[case]}\n\n" for case in ORDER if case in found)
    GOLDEN.write_text(f"What a user reads, by mistake. Made by test_bad_input.py.\n\n{text}")


def compare(name: str, message: str, folder: Path) -> None:
    """The message is the stored one, and has the parts that a message must have."""
    message = message.replace(str(folder), "FOLDER").strip()
    message = re.sub(r"/(?:tmp|private|var)/[\w./-]*", "FOLDER", message)
    message = re.sub(r"^(  allowed: .{90}).{30,}$", r"\1...", message, flags=re.MULTILINE)
    if os.environ.get(WRITE):
        write_golden(name, message)
    assert "Traceback" not in message
    first, *rest = message.splitlines()
    assert first
    labels = {line.strip().split(":")[0] for line in rest}
    assert "where" in labels, message
    assert labels & {"allowed", "do"}, message
    assert message == read_golden()[name]


# --- study files ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("good")
    write_good(folder)
    return folder


def planned(folder: Path, content: str | bytes, monkeypatch: pytest.MonkeyPatch) -> Any:
    raw = content if isinstance(content, bytes) else content.encode()
    (folder / "bad.yaml").write_bytes(raw)
    monkeypatch.chdir(folder)
    return CliRunner().invoke(app, ["plan", "study.yaml", "bad.yaml"])


def test_the_good_study_plans(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert planned(good, "shards: 2\n", monkeypatch).exit_code == 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_broken_study_is_refused_before_anything_runs(
    good: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = planned(good, CONFIGS[name], monkeypatch)
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    compare(name, done.output.removeprefix("Error: "), good)
    assert not (good / "results").exists()


# --- pools, tasks, splits, models: found by the first jobs, which need no GPU ---------------


def run_node(node: Node, make: Any, folder: Path) -> str:
    """Run a stage as its rule does; what it says when it refuses."""
    rule = SimpleNamespace(
        params=SimpleNamespace(
            spec=node.spec,
            code="c",
            parents={role: parent.manifest for role, parent in node.parents.items()},
        ),
        log=[f"results/logs/{node.stage}.log"],
        output=SimpleNamespace(manifest=node.manifest),
        wildcards=SimpleNamespace(),
        config={},
        threads=1,
        resources=SimpleNamespace(),
    )
    with pytest.raises(SystemExit) as caught:
        run_rule(rule, make)
    assert caught.value.code == 1
    assert not node.manifest.exists()
    text = (folder / rule.log[0]).read_text(encoding="utf-8")
    return text[text.index("ERROR iprox: ") :].removeprefix("ERROR iprox: ")


def only(study: str | dict[str, Any], stage: str, folder: Path) -> Node:
    (folder / "study.yaml").write_text(study if isinstance(study, str) else yaml.safe_dump(study))
    plan = load_plan([folder / "study.yaml"])
    return next(node for (s, _), node in plan.nodes.items() if s == stage)


def parquet(path: Path, **columns: list[Any]) -> None:
    pd.DataFrame(columns).to_parquet(path)


def gigabyte_line(path: Path) -> None:
    """A line of 1 GB that takes no room on the disk."""
    with path.open("wb") as file:
        file.write(b'{"instruction": "')
        file.truncate(10**9)


POOLS: dict[str, tuple[str, bytes | Callable[[Path], None]]] = {
    "pool of blank lines": ("p.jsonl", b"\n \n\n"),
    "pool with a broken line": ("p.jsonl", GOOD.encode() + b'{"instruction": "x", \n'),
    "pool with invalid UTF-8": ("p.jsonl", GOOD.encode() * 2 + b'{"instruction": "\xff"}\n'),
    "pool in UTF-16": ("p.jsonl", GOOD.encode("utf-16")),
    "pool with a BOM in the middle": ("p.jsonl", GOOD.encode() + b"\xef\xbb\xbf" + GOOD.encode()),
    "pool with a number for text": ("p.jsonl", b'{"instruction": "x", "output": 3}\n'),
    "pool with NaN for text": ("p.jsonl", b'{"instruction": "x", "output": NaN}\n'),
    "pool with a missing response": ("p.jsonl", GOOD.encode() + b'{"instruction": "x"}\n'),
    "pool of empty responses": ("p.jsonl", b'{"instruction": "x", "output": ""}\n'),
    "pool of two shapes": ("p.jsonl", GOOD.encode() + b'{"prompt": "x", "response": "y"}\n'),
    "pool of no known shape": ("p.jsonl", b'{"text": "x"}\n'),
    "pool with one id twice": (
        "p.jsonl",
        b"".join(json.dumps(RECORD | {"id": 7}).encode() + b"\n" for _ in range(2)),
    ),
    "pool with an unknown role": (
        "p.jsonl",
        b'{"messages": [{"role": "tool", "content": "x"}]}\n',
    ),
    "pool with a turn that is text": ("p.jsonl", b'{"messages": ["hello"]}\n'),
    "pool with a lone surrogate": ("p.jsonl", b'{"instruction": "\\ud800", "output": "x"}\n'),
    "pool of one line of 1 GB": ("p.jsonl", gigabyte_line),
    "pool that is an object": ("p.json", b'{"data": []}'),
    "pool that is nested too deeply": ("p.json", b"[" * 100_000),
    "pool with a short CSV record": ("p.csv", b"instruction,output\na,b\nc\n"),
    "pool with a CSV column twice": ("p.csv", b"output,output\na,b\n"),
    "pool with an open quote": ("p.csv", b'instruction,output\n"a,b\n'),
    "Parquet that is not Parquet": ("p.parquet", b"PAR1 but not really"),
    "Parquet with other columns": ("p.parquet", lambda path: parquet(path, text=["a"])),
    "Parquet with numbers": (
        "p.parquet",
        lambda path: parquet(path, instruction=[1, 2], output=[3, 4]),
    ),
}


@pytest.mark.parametrize("name", POOLS)
@pytest.mark.usefixtures("quiet")
def test_a_broken_pool_is_refused_by_the_first_job(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_good(tmp_path)
    monkeypatch.chdir(tmp_path)
    file, content = POOLS[name]
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    else:
        content(tmp_path / file)
    node = only(STUDY.replace("pool.jsonl", file), "pool", tmp_path)
    compare(name, run_node(node, pool.make, tmp_path), tmp_path)


TASKS: dict[str, tuple[dict[str, Any], str]] = {
    "task with fewer examples than queries": ({"queries": 5}, GOOD),
    "task whose examples are all held out": ({"heldout": 1}, GOOD),
    "task without a response": ({}, '{"instruction": "x"}\n'),
    "task with one id twice": ({}, 2 * (json.dumps(RECORD | {"id": "a"}) + "\n")),
    "task tested on its own queries": ({"test": "t.jsonl"}, GOOD),
    "question with an unknown answer": (
        {"kind": "mmlu"},
        json.dumps({"split": "dev", "subject": "s", "question": "q", "answer": "E"}
                   | dict.fromkeys("ABCD", "x")),
    ),
    "question without choices": (
        {"kind": "mmlu"},
        '{"split": "dev", "subject": "s", "question": "q", "answer": "A"}\n',
    ),
    "passage without its question": ({"kind": "tydiqa"}, '{"language": "english"}\n'),
}  # fmt: skip


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.usefixtures("quiet")
def test_a_broken_task_is_refused_by_its_first_job(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_good(tmp_path)
    monkeypatch.chdir(tmp_path)
    keys, content = TASKS[name]
    (tmp_path / "t.jsonl").write_text(content)
    settings = {"name": "t", "kind": "messages", "path": "t.jsonl", **keys}
    study = yaml.safe_load(STUDY) | {"tasks": [settings]}
    compare(name, run_node(only(study, "task", tmp_path), task.make, tmp_path), tmp_path)


@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore")
def test_a_split_larger_than_the_pool_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_good(tmp_path)
    monkeypatch.chdir(tmp_path)
    study = yaml.safe_load(STUDY) | {"split": {"warmup": 9}}
    first = only(study, "pool", tmp_path)
    first_rule = SimpleNamespace(
        params=SimpleNamespace(spec=first.spec, code="c", parents={}),
        log=["results/logs/pool.log"],
        output=SimpleNamespace(manifest=first.manifest),
        wildcards=SimpleNamespace(),
        config={},
        threads=1,
        resources=SimpleNamespace(),
    )
    run_rule(first_rule, pool.make)
    message = run_node(only(study, "split", tmp_path), split.make, tmp_path)
    compare("split larger than the pool", message, tmp_path)


def edit(folder: Path, file: str, **keys: Any) -> None:
    content = json.loads((folder / file).read_text()) | keys
    (folder / file).write_text(json.dumps(content))


def spoil_weights(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_weights(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


def remove_eos(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def enlarge_tokenizer(folder: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


def write_lines(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


MODELS: dict[str, Callable[[Path], None]] = {
    "model of an encoder": lambda f: edit(f, "config.json", model_type="bert"),
    "model of an unknown kind": lambda f: edit(f, "config.json", model_type="hyena-9000"),
    "model with code of its own": lambda f: edit(
        f, "config.json", model_type="own", auto_map={"AutoConfig": "own.Own"}
    ),
    "model with another width than its weights": lambda f: edit(f, "config.json", hidden_size=64),
    "model with more blocks than its weights": lambda f: edit(
        f, "config.json", num_hidden_layers=3
    ),
    "model with NaN weights": spoil_weights,
    "model with truncated weights": cut_weights,
    "model whose weights were never downloaded": write_lines,
    "model without a tokenizer": remove_tokenizer,
    "tokenizer without end-of-sequence token": remove_eos,
    "tokenizer of another model": enlarge_tokenizer,
    "index that names a missing file": lambda f: (
        (f / "model.safetensors").unlink(),
        (f / "model.safetensors.index.json").write_text(
            '{"metadata": {}, "weight_map": {"x": "model-00001-of-00001.safetensors"}}'
        ),
    ),  # type: ignore[dict-item, return-value]
}


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    folder = tmp_path_factory.mktemp("saved") / "model"
    tiny_model(dtype=torch.float32).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.usefixtures("quiet")
@pytest.mark.filterwarnings("ignore")
def test_a_broken_model_is_refused_by_the_first_job(
    name: str, tmp_path: Path, saved_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_good(tmp_path)
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(saved_model, tmp_path / "model")
    MODELS[name](tmp_path / "model")
    compare(name, run_node(only(STUDY, "target", tmp_path), target.make, tmp_path), tmp_path)


ORDER = [*CONFIGS, *POOLS, *TASKS, "split larger than the pool", *MODELS]


def test_the_corpus_is_whole() -> None:
    assert len(ORDER) == len(set(ORDER)) >= 60
    assert list(read_golden()) == ORDER
