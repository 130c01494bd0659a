"""Requests of jobs: one formula, in the model's size, the texts' length and the attempt."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from iprox.numerics.ranks import Architecture
from iprox.plan import sizes
from iprox.plan.estimate import TRAININGS
from iprox.plan.nodes import Node, Plan
from iprox.plan.plan import plan_study
from iprox.plan.resources import LEAST_MB, Request, Requests, uses_device
from iprox.study.load import load_study, merge, parse_study

ROOT = Path(__file__).parents[1]

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
         "num_attention_heads": 4, "vocab_size": 1000}  # fmt: skip


ELSEWHERE = Path(__file__).parent
"""A folder without results, whose models would be looked at instead of those of the tests."""


def plan(**changes: Any) -> Plan:
    body = {
        "study": "s",
        "pool": {"name": "dolly"},
        "tasks": ["mmlu"],
        "runs": {
            "iprox": {"influence": {"estimator": "ekfac"}},
            "auto": {"proxy": {"kind": "svd", "sparsity": "auto"}},
            "cut": {"proxy": {"kind": "layers"}},
            "random": {"scorer": {"kind": "random"}},
            "ifd": {"scorer": {"kind": "ifd"}},
        },
    }
    return plan_study(parse_study(merge(body, changes)))


def of(stage: str, p: Plan, on_gpu: bool = True, train_gpus: int = 1) -> Request:
    """The largest request of a stage."""
    requests = Requests(Path(), ELSEWHERE, train_gpus)
    found = [requests.of(n, on_gpu) for (s, _), n in p.nodes.items() if s == stage]
    return Request(*(max(getattr(r, f.name) for r in found) for f in fields(Request)))


def larger(monkeypatch: pytest.MonkeyPatch, **changes: int) -> None:
    arch = sizes.architecture(SMALL | changes)
    monkeypatch.setitem(sizes.PACKAGED, "smollm2-135m", arch)


def test_every_stage_asks_for_something() -> None:
    p = plan()
    requests = Requests(Path(), ELSEWHERE)
    for node in p.nodes.values():
        for on_gpu in (False, True):
            request = requests.of(node, on_gpu)
            assert request.mem_mb >= LEAST_MB
            assert request.runtime >= 20
            assert (request.gpu_mem_mb > 0) == (on_gpu and uses_device(node))


def test_an_attempt_asks_for_a_multiple() -> None:
    assert Request(1000, 2000, 20).times(3) == Request(3000, 6000, 60)


@pytest.mark.parametrize("stage", ["warmup", "probe", "query", "features", "proxy", "finetune"])
def test_larger_models_and_longer_texts_ask_for_more(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = {"proxy": {"passes": "both"}}
    larger(monkeypatch)
    small = of(stage, plan(**trained))
    larger(monkeypatch, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    large = of(stage, plan(**trained))
    assert large.mem_mb > small.mem_mb
    assert large.gpu_mem_mb > 10 * small.gpu_mem_mb
    assert large.runtime >= small.runtime
    if stage != "query":  # whose texts are the task's
        longer = of(stage, plan(**trained, chat={"max_length": 32768}))
        assert longer.gpu_mem_mb > large.gpu_mem_mb


def test_larger_batches_of_a_training_ask_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    larger(monkeypatch, hidden_size=2048, num_hidden_layers=16)
    batches = [of("warmup", plan(warmup={"batch": n})).gpu_mem_mb for n in (1, 4)]
    assert batches[0] < batches[1]


def test_shards_divide_the_time_and_not_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    larger(monkeypatch, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    one, many = (of("features", plan(shards=n)) for n in (1, 50))
    assert one.runtime > 3 * many.runtime
    assert many.gpu_mem_mb == one.gpu_mem_mb


def test_a_model_on_a_gpu_needs_little_main_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    larger(monkeypatch, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    assert of("finetune", plan(), True).mem_mb < of("finetune", plan(), False).mem_mb / 2


def test_a_training_that_is_spread_shards_its_states_and_takes_less_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    larger(monkeypatch, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32)
    for stage in ("finetune", "warmup"):
        one, four = (of(stage, plan(), True, gpus) for gpus in (1, 4))
        assert four.gpu_mem_mb < one.gpu_mem_mb / 2
        assert four.mem_mb > one.mem_mb  # each process reads the weights
        assert four.runtime < one.runtime
        assert of(stage, plan(), False, 4) == of(stage, plan(), False)
    assert of("features", plan(), True, 4) == of("features", plan(), True)


def test_a_pool_of_unknown_size_is_guessed_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "pool.jsonl").write_text("x" * 8_000_000)
    node = plan(pool={"name": None, "path": "pool.jsonl"}).shared["pool"]
    request = Requests(tmp_path, ELSEWHERE).of(node, False)
    with (tmp_path / "pool.jsonl").open("wb") as file:
        file.truncate(400_000_000)  # takes no room
    assert Requests(tmp_path, ELSEWHERE).of(node, False).mem_mb > request.mem_mb


def test_an_unknown_model_is_taken_for_a_large_one() -> None:
    request = of("features", plan(target={"model": "someone/unknown"}))
    assert request.gpu_mem_mb > 16_000


PEAKS = {"warmup": 3747, "probe": 3029, "proxy": 6308, "features": 2562, "query": 2012,
         "evaluation": 1606}  # fmt: skip
"""Largest resident size in millions of bytes of the demo's jobs, as its provenance has them."""


@pytest.mark.parametrize("stage", PEAKS)
def test_the_demo_asks_for_what_it_was_measured_to_take(stage: str) -> None:
    p = plan_study(load_study([ROOT / "config" / "config.yaml"]))
    nodes: list[Node] = [n for (s, _), n in p.nodes.items() if s == stage]
    asked = max(Requests(ROOT).of(node, False).mem_mb for node in nodes)
    assert 0.95 * PEAKS[stage] <= asked * 2**20 / 1e6 < 1.6 * PEAKS[stage]


def test_known_sizes_are_those_of_the_architecture() -> None:
    assert isinstance(sizes.PACKAGED["smollm2-135m"], Architecture)


# --- the rules and the profiles ---------------------------------------------------------------

RULES = sorted((ROOT / "workflow" / "rules").glob("*.smk"))


def test_rules_that_compute_on_the_device_ask_for_one_gpu_and_no_others() -> None:
    asking = set()
    for path in RULES:
        for rule in re.split(r"^rule ", path.read_text(), flags=re.MULTILINE)[1:]:
            name = re.sub(r"_shard$", "", rule.split(":")[0])
            if "gpu=" in rule:
                several = "gpu=PLAN.study.config.train_gpus," in rule
                assert several == (name in TRAININGS)
                assert several or "gpu=1," in rule or name == "ranking"  # by its scorer
                asking.add(name)
    for node in plan().nodes.values():  # rules of other kinds of study are not looked at
        assert (node.stage in asking) == uses_device(node) or node.stage == "ranking", node.stage


@pytest.mark.parametrize("profile", ["default", "local", "cpu", "slurm"])
def test_profiles_rerun_for_the_same_reasons(profile: str) -> None:
    path = ROOT / "workflow" / "profiles" / profile / "config.yaml"
    settings = yaml.safe_load(path.read_text())
    assert settings["rerun-triggers"] == ["mtime", "params", "input", "software-env"]
    assert settings["rerun-incomplete"] is True


@pytest.mark.workflow
def test_the_command_of_the_kubernetes_example_plans(tmp_path: Path) -> None:
    job = yaml.safe_load((ROOT / "workflow" / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    shutil.copy(ROOT / "config" / "config.yaml", tmp_path / "my-study.yaml")
    command = [*container["command"], *container["args"], "--dry-run", "--quiet"]
    command[2] = command[2].replace("snakemake", f"{sys.executable} -m snakemake")
    command = [part.replace("/project", str(ROOT)) for part in command]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
