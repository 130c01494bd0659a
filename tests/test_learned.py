"""Plans of runs whose scorer learns from a teacher."""

from __future__ import annotations

from typing import Any

import pytest

from iprox.errors import ConfigError
from iprox.numerics.ranks import Architecture, model_size
from iprox.plan.estimate import Estimator
from iprox.plan.nodes import Node, Plan
from iprox.plan.plan import plan_study
from iprox.plan.volumes import Volumes
from iprox.study.load import merge, parse_study

BASE: dict[str, Any] = {
    "study": "s",
    "pool": {"path": "pool.jsonl", "limit": 100},
    "split": {"fidelity": 20, "teach": 30},
    "tasks": ["mmlu", "bbh"],
    "runs": {"ic": {}},
    "scorer": {"kind": "influcoder"},
    "features": {"kind": "lora"},
    "proxy": {"kind": "target"},
}


def plan(**changes: Any) -> Plan:
    return plan_study(parse_study(merge(BASE, changes)))


def nodes(**changes: Any) -> dict[str, Node]:
    return plan(**changes).runs["ic"].nodes


def test_an_encoder_learns_from_the_teach_split_and_is_judged_on_the_slice() -> None:
    parents = nodes()["encoder"].parents
    names = {role: node.stage for role, node in parents.items()}
    assert names == {
        "backbone": "backbone",
        "teach": "features",
        "heldout": "features",
        "pool": "pool",
        "sketches/mmlu": "query_sketches",
        "sketches/bbh": "query_sketches",
        "task/mmlu": "task",
        "task/bbh": "task",
    }
    for role, split in (("teach", "teach"), ("heldout", "fidelity")):
        assert parents[role].params["subset"] == {"name": split}
        assert parents[role].params["features"]["kind"] == "lora"
    split = parents["teach"].parents["split"].params["split"]
    assert split["disjoint_from"] == {"name": "fidelity", "size": 20}


@pytest.mark.parametrize("proxy", ["ipsvd", "svd", "layers", "target"])
def test_any_scoring_model_teaches(proxy: str) -> None:
    made = nodes(proxy={"kind": proxy})
    teacher = made["encoder"].parents["teach"].parents["model"]
    assert teacher.stage == {"layers": "extraction", "target": "warmup"}.get(proxy, "proxy")


def test_the_pool_is_embedded_in_shards_and_passes_no_language_model() -> None:
    made = nodes(shards=4)
    assert made["features"].stage == "embeddings"
    assert made["features"].shards == 4
    assert set(made["features"].parents) == {"encoder", "pool"}
    assert set(made["ranking"].parents) == {"features", "pool", "query/mmlu", "query/bbh"}


def test_fidelity_compares_with_the_target_and_with_the_teacher() -> None:
    parents = nodes()["fidelity"].parents
    assert "features" not in parents["target"].params  # exact
    assert parents["proxy"] is nodes()["features"] or parents["proxy"].stage == "embeddings"
    assert parents["teacher"].params["subset"] == {"name": "fidelity"}
    assert {r for r in parents if r.startswith("teacher_query/")} == {
        "teacher_query/mmlu",
        "teacher_query/bbh",
    }


def test_an_encoder_that_is_used_as_it_is_needs_no_model_and_no_teacher() -> None:
    p = plan(
        encoder={"train": False, "model": "results/encoder/x"},
        fidelity={"enabled": False},
        runs={"ic": {"until": "ranking"}},
    )
    made = {stage for stage, _ in p.nodes}
    used = {"pool", "task", "target", "backbone", "embeddings", "query_embeddings", "ranking"}
    assert made == used | {"report"}


def test_what_does_not_concern_the_training_leaves_the_encoder_alone() -> None:
    one, two = nodes(), nodes(select={"fraction": 0.5}, influence={"val_agg": "subtask_max"})
    assert one["encoder"].id == two["encoder"].id
    assert one["ranking"].id != two["ranking"].id


@pytest.mark.parametrize(
    "change", [{"alpha": 1.0}, {"seed": 3}, {"max_length": 128}, {"hard_ratio": 0.25}]
)
def test_what_concerns_it_makes_another(change: dict[str, Any]) -> None:
    assert nodes()["encoder"].id != nodes(encoder=change)["encoder"].id


def test_exact_features_cannot_teach() -> None:
    with pytest.raises(ConfigError, match=r"sketches(.|\n)*features.kind(.|\n)*lora"):
        plan(features={"kind": "exact"})


@pytest.mark.parametrize("kind", ["influcoder", "regression"])
def test_what_learns_has_one_teacher(kind: str) -> None:
    summed = {"influence": {"checkpoints": "epochs"}, "warmup": {"epochs": 2}}
    with pytest.raises(ConfigError, match="one teacher"):
        plan(scorer={"kind": kind}, **summed)


def test_a_slice_that_is_the_pool_leaves_nothing_to_teach_with() -> None:
    with pytest.raises(ConfigError, match="leaves no example to teach with"):
        plan(split={"fidelity": 1.0})


def test_a_run_until_fidelity_has_no_ranking() -> None:
    made = nodes(runs={"ic": {"until": "fidelity"}})
    assert "fidelity" in made
    assert "ranking" not in made


def test_every_stage_has_a_cost() -> None:
    p = plan()
    arch = Architecture(hidden=64, blocks=2, ff=128, heads=4, kv_heads=2, head_dim=16, vocab=1000)
    estimator = Estimator(arch, Volumes([], length=50))
    needs = {stage: estimator.need(node) for (stage, _), node in p.nodes.items()}
    for stage in ("encoder", "embeddings", "query_embeddings", "query_sketches"):
        assert needs[stage].flops > 0, stage
        assert needs[stage].memory > 0, stage
    # 27 labelled candidates in 2 blocks, 293 known queries in 37, of 24 texts of 200 tokens
    steps = 37
    assert needs["encoder"].tokens == 8 * steps * 24 * 200


@pytest.mark.parametrize("features", ["exact", "lora"])
def test_a_head_for_each_task_learns_from_any_features(features: str) -> None:
    made = nodes(scorer={"kind": "regression"}, features={"kind": features})
    heads = {r: n for r, n in made["ranking"].parents.items() if r.startswith("query/")}
    assert {node.stage for node in heads.values()} == {"head"}
    parents = heads["query/mmlu"].parents
    assert {"embeddings", "teach", "heldout"} <= set(parents)
    assert ("query/mmlu" in parents) == (features == "lora")
    assert made["fidelity"].parents["proxy"] is made["features"]
    assert "teacher" not in made["fidelity"].parents


@pytest.mark.parametrize("rank", [0, 4])
def test_moments_are_two_copies_of_what_is_trained(rank: int) -> None:
    """Embedding and head are frozen; low-rank updates are kept too."""
    arch = Architecture(hidden=64, blocks=2, ff=128, heads=4, kv_heads=2, head_dim=16, vocab=1000)
    estimator = Estimator(arch, Volumes([], length=50))
    disk = []
    for kind in ("less", "gradient"):
        changes = {"features": {"kind": "countsketch"}, "warmup": {"lora_rank": rank}}
        p = plan(scorer={"kind": kind}, **changes)
        node = next(node for (stage, _), node in p.nodes.items() if stage == "warmup")
        disk.append(estimator.need(node).disk)
    size = model_size(arch)
    updates = 2 * rank * (4 * 64 + 2 * (64 + 32) + 3 * (64 + 128))  # q o, k v, the MLP; 2 blocks
    trained = 3 * updates if rank else 2 * (size.total - size.embeddings)
    assert disk[0] - disk[1] == 4 * trained
