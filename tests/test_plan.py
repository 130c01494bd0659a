"""Identities: what a changed key reruns, what runs share, and what changes nothing."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from iprox.errors import ConfigError
from iprox.plan.index import links
from iprox.plan.nodes import Plan
from iprox.plan.plan import plan_study
from iprox.study.load import merge, parse_study

BASE: dict[str, Any] = {
    "study": "s",
    "pool": {"path": "pool.jsonl", "limit": 100},
    "tasks": ["mmlu", "bbh"],
    "proxy": {"passes": "both"},
    "runs": {"a": {}},
}
STAGES = (
    "pool target task split warmup checkpoint probe decomposition factors extraction proxy query "
    "covariance curvature eigenvalues direction features ranking fidelity selection finetune "
    "evaluation report"
).split()


def plan(**changes: Any) -> Plan:
    body = BASE | {"runs": changes.pop("runs")} if "runs" in changes else BASE
    return plan_study(parse_study(merge(body, changes)))


def stages(p: Plan) -> set[tuple[str, str]]:
    return {key for key in p.nodes if key[0] != "report"}


def rerun(**changes: Any) -> list[str]:
    """Stages that a change of the study makes anew, in order, without the report."""
    new = stages(plan(**changes)) - stages(plan())
    return [s for s in STAGES if any(stage == s for stage, _ in new)]


AFTER_QUERY = ["features", "ranking", "fidelity", "selection", "finetune", "evaluation"]
AFTER_PROXY = ["query", *AFTER_QUERY]
CURVATURE = ["covariance", "curvature", "eigenvalues"]
AFTER_RANKING = ["selection", "finetune", "evaluation"]

CHANGES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "encoder.alpha": ({"encoder": {"alpha": 1.0}}, []),
    "prefilter.by": ({"prefilter": {"by": "bm25"}}, ["features", "ranking", *AFTER_RANKING]),
    "proxy.sparsity": ({"proxy": {"sparsity": 0.3}}, ["factors", "proxy", *AFTER_PROXY]),
    "proxy.rank_allocation": (
        {"proxy": {"rank_allocation": "global"}},
        ["factors", "proxy", *AFTER_PROXY],
    ),
    "proxy.gauge": ({"proxy": {"gauge": "paper"}}, ["factors", "proxy", *AFTER_PROXY]),
    "proxy.damping": (
        {"proxy": {"damping": 0.2}},
        ["decomposition", "factors", "proxy", *AFTER_PROXY],
    ),
    "proxy.whiten": (
        {"proxy": {"whiten": "inputs"}},
        ["decomposition", "factors", "proxy", *AFTER_PROXY],
    ),
    "probe.tokens": (
        {"probe": {"tokens": 64}},
        ["probe", "decomposition", "factors", "proxy", *AFTER_PROXY],
    ),
    "align.lr": ({"align": {"lr": 1e-4}}, ["proxy", *AFTER_PROXY]),
    "align.recover_epochs": ({"align": {"recover_epochs": 1.0}}, ["proxy", *AFTER_PROXY]),
    "split.align": ({"split": {"align": 7}}, ["split", "proxy", *AFTER_PROXY]),
    "split.fidelity": (
        {"split": {"fidelity": 10}},
        ["split", "features", "fidelity"],
    ),
    "influence.loss_reduction": (
        {"influence": {"loss_reduction": "token_sum"}},
        ["probe", "decomposition", "factors", "proxy", *AFTER_PROXY],
    ),
    "influence.score": (
        {"influence": {"score": "dot"}},
        ["ranking", "fidelity", *AFTER_RANKING],
    ),
    "influence.estimator": (
        {"influence": {"estimator": "ekfac"}},
        ["split", *CURVATURE, "direction", *AFTER_QUERY],
    ),
    "curvature.damping, which tracin does not use": ({"curvature": {"damping": 1.0}}, []),
    "influence.val_agg": ({"influence": {"val_agg": "mean_unit"}}, AFTER_PROXY),
    "proxy.passes": (  # factors are the same, and query gradients are the target's
        {"proxy": {"passes": "backward", "whiten": "both"}},
        ["proxy", "features", "ranking", "fidelity", *AFTER_RANKING],
    ),
    "influence.query_rank": (
        {"influence": {"query_rank": 8}},
        ["features", "ranking", "fidelity", *AFTER_RANKING],
    ),
    "influence.query_dtype": (
        {"influence": {"query_dtype": "bfloat16"}},
        ["features", "ranking", "fidelity", *AFTER_RANKING],
    ),
    "influence.query_home": (
        {"influence": {"query_home": "disk"}},
        ["features", "ranking", "fidelity", *AFTER_RANKING],
    ),
    "influence.on_nonfinite": (
        {"influence": {"on_nonfinite": "skip"}},
        ["features", "ranking", "fidelity", *AFTER_RANKING],
    ),
    "features.kind": (
        {"features": {"kind": "logra"}},
        ["features", "ranking", "fidelity", *AFTER_RANKING],
    ),
    "features.rank, which exact features do not use": ({"features": {"rank": 3}}, []),
    "select.fraction": ({"select": {"fraction": 0.1}}, AFTER_RANKING),
    "finetune.lr": ({"finetune": {"lr": 1e-4}}, ["finetune", "evaluation"]),
    "evaluate.seed": ({"evaluate": {"seed": 1}}, ["evaluation"]),
    "fidelity.bootstrap": ({"fidelity": {"bootstrap": 7}}, ["fidelity"]),
    "report.examples": ({"report": {"examples": 3}}, []),
    "report.find": ({"report": {"find": ["unsafe"]}}, []),
    "shards": ({"shards": 7}, []),
    "data_dir": ({"data_dir": "/elsewhere"}, []),
    "study": ({"study": "other"}, []),
    "pool.limit": (
        {"pool": {"limit": 90}},
        ["pool", "split", "warmup", "probe", "decomposition", "factors", "proxy", *AFTER_PROXY],
    ),
    "warmup.lr": (
        {"warmup": {"lr": 1e-4}},
        ["warmup", "probe", "decomposition", "factors", "proxy", *AFTER_PROXY],
    ),
    "target.dtype": (
        {"target": {"dtype": "bfloat16"}},
        ["target", "warmup", "probe", "decomposition", "factors", "proxy", *AFTER_PROXY],
    ),
}


@pytest.mark.parametrize("key", CHANGES)
def test_a_changed_key_reruns_exactly_what_depends_on_it(key: str) -> None:
    change, expected = CHANGES[key]
    assert rerun(**change) == expected
    assert stages(plan()) == stages(plan(**{}))  # and going back needs nothing new


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"curvature": {"damping": 1.0}}, ["direction", *AFTER_QUERY]),
        ({"curvature": {"damping_mode": "absolute"}}, ["direction", *AFTER_QUERY]),
        ({"curvature": {"labels": "sampled"}}, [*CURVATURE, "direction", *AFTER_QUERY]),
        ({"curvature": {"max_factor_dim": 64}}, [*CURVATURE, "direction", *AFTER_QUERY]),
        ({"curvature": {"seed": 3}}, []),  # nothing is sampled
        ({"split": {"fisher": 7}}, ["split", *CURVATURE, "direction", *AFTER_QUERY]),
        ({"influence": {"estimator": "kfac"}}, ["direction", *AFTER_QUERY]),
        ({"influence": {"estimator": "datainf"}}, ["direction", *AFTER_QUERY]),
        ({"influence": {"estimator": "tracin"}}, AFTER_QUERY),
        ({"influence": {"score": "dot"}}, ["ranking", "fidelity", *AFTER_RANKING]),
        ({"shards": 4}, []),
    ],
)
def test_a_second_order_study_refits_only_what_a_change_reaches(
    change: dict[str, Any], expected: list[str]
) -> None:
    base = {"influence": {"estimator": "ekfac"}}
    new = stages(plan(**merge(base, change))) - stages(plan(**base))
    assert [s for s in STAGES if any(stage == s for stage, _ in new)] == expected


def test_influence_over_epochs_is_measured_at_each_with_a_proxy_of_its_own() -> None:
    base = {"warmup": {"epochs": 3.0}}
    p = plan(**base, influence={"checkpoints": "epochs"})
    nodes = p.runs["a"].nodes
    ranking = nodes["ranking"]
    assert set(ranking.parents) == {
        "features",
        "checkpoint/1/features",
        "checkpoint/2/features",
        "warmup",
    }
    for epoch in (1, 2):
        features = ranking.parents[f"checkpoint/{epoch}/features"]
        assert features is nodes[f"features-epoch-{epoch}"]
        proxy = features.parents["model"]
        checkpoint = proxy.parents["warmup"]
        assert (checkpoint.stage, checkpoint.params["checkpoint"]) == (
            "checkpoint",
            {"epoch": epoch},
        )
        assert checkpoint.parents["warmup"] is nodes["warmup"]
        assert proxy.parents["factors"] is not nodes["factors"]
        assert features.parents["query/mmlu"].parents["model"] is proxy
    count = {s: sum(stage == s for stage, _ in p.nodes) for s in STAGES}
    once = {s: sum(stage == s for stage, _ in plan(**base).nodes) for s in STAGES}
    more = {s: count[s] / once[s] for s in STAGES if count[s] != once[s] and once[s]}
    proxy = ("probe", "decomposition", "factors", "proxy")
    assert more == dict.fromkeys(proxy, 3) | {"query": 2, "features": 2}  # the target's are for all
    assert count["checkpoint"] == 2
    assert ranking.params["influence"]["checkpoints"] == "epochs"


def test_one_epoch_has_no_earlier_checkpoint() -> None:
    p = plan(influence={"checkpoints": "epochs"})
    assert not [stage for stage, _ in p.nodes if stage == "checkpoint"]
    assert "epochs" not in p.runs["a"].nodes["warmup"].params


def test_estimators_share_queries_and_a_fit() -> None:
    grid = {"influence": {"estimator": ["tracin", "kfac", "ekfac", "datainf"]}}
    p = plan(proxy={"kind": "target"}, runs={"r": grid})
    count = {s: sum(stage == s for stage, _ in p.nodes) for s in STAGES}
    assert count["query"] == 2  # a task each
    assert count["covariance"] == count["curvature"] == count["eigenvalues"] == 1
    assert count["direction"] == 2 * 3
    assert count["features"] == 4
    roles = {r: set(n.parents) for r, n in direct_parents(p).items()}
    assert roles["tracin"] == {"model", "task"}
    assert roles["kfac"] == {"query", "curvature"}
    assert roles["ekfac"] == {"query", "curvature", "eigenvalues"}
    assert roles["datainf"] == {"query", "model", "pool", "split"}


def direct_parents(p: Plan) -> dict[str, Any]:
    """What the pool is scored against in each run."""
    return {
        name.removeprefix("r-"): run.nodes["features"].parents["query/mmlu"]
        for name, run in p.runs.items()
    }


def test_a_study_links_to_queries_and_what_was_made_of_them() -> None:
    found = links(plan(influence={"estimator": "ekfac"}))
    assert found["a/query-mmlu"].stage == "query"
    assert found["a/direction-mmlu"].stage == "direction"
    for stage in CURVATURE:
        assert found[f"a/{stage}"].stage == stage
    assert not [name for name in links(plan()) if "direction" in name]


def test_fidelity_compares_the_same_estimator_at_proxy_and_target() -> None:
    p = plan(influence={"estimator": "kfac"})
    parents = p.runs["a"].nodes["fidelity"].parents
    for role, stage in (("proxy", "proxy"), ("target", "warmup")):
        direction = parents[role].parents["query/bbh"]
        covariance = direction.parents["curvature"].parents["covariance"]
        assert covariance.parents["model"].stage == stage


def test_curvature_passes_are_cut_into_few_shards() -> None:
    p = plan(influence={"estimator": "ekfac"}, shards=100)
    assert {n.shards for (s, _), n in p.nodes.items() if s in ("covariance", "eigenvalues")} == {8}
    assert p.runs["a"].nodes["features"].shards == 100


@pytest.mark.parametrize("estimator", ["ekfac", "datainf"])
def test_factored_damping_needs_two_factors(estimator: str) -> None:
    section = {"damping_mode": "factored"}
    assert plan(influence={"estimator": "kfac"}, curvature=section)
    with pytest.raises(ConfigError, match=f"{estimator} with factored"):
        plan(influence={"estimator": estimator}, curvature=section)


@pytest.mark.parametrize(
    ("align", "roles"),
    [
        ({"epochs": 0.0}, {"factors", "warmup"}),
        ({"epochs": 0.0, "recover_epochs": 1.0}, {"factors", "warmup", "pool", "split"}),
    ],
)
def test_a_proxy_reads_the_align_examples_when_anything_is_trained(
    align: dict[str, Any], roles: set[str]
) -> None:
    [node] = [n for (stage, _), n in plan(align=align).nodes.items() if stage == "proxy"]
    assert set(node.parents) == roles
    assert node.params["align"]["epochs"] == 0
    assert node.params["align"]["recover_epochs"] == align.get("recover_epochs", 0.0)


def test_reduced_queries_reach_the_pass_and_are_compared_with_the_target_s_exact_ones() -> None:
    reduced = {
        "on_nonfinite": "skip",
        "query_dtype": "bfloat16",
        "query_home": "disk",
        "query_rank": 8,
    }
    p = plan(runs={"t": {"proxy": {"kind": "target"}}}, influence=reduced)
    nodes = p.runs["t"].nodes
    assert nodes["features"].params["influence"] == reduced | {"loss_reduction": "token_mean"}
    exact = nodes["fidelity"].parents["target"].params["influence"]
    assert (exact["query_dtype"], exact["query_rank"]) == ("float32", 0)
    whole = plan(runs={"t": {"proxy": {"kind": "target"}}})
    assert "fidelity" not in whole.runs["t"].nodes


def test_a_proxy_of_the_backward_pass_is_asked_the_target_s_queries() -> None:
    p = plan(
        runs={"b": {"proxy": {"passes": "backward"}, "influence": {"estimator": "kfac"}}},
        split={"fisher": 10},
    )
    nodes = p.runs["b"].nodes
    assert "split" not in nodes["proxy"].parents  # nothing is aligned
    direction = next(n for r, n in nodes["features"].parents.items() if r.startswith("query/"))
    assert direction.parents["query"].parents["model"] is nodes["warmup"]
    covariance = direction.parents["curvature"].parents["covariance"]
    assert covariance.parents["model"] is nodes["warmup"]


def test_fidelity_knows_what_a_proxy_was_made_from() -> None:
    p = plan(
        runs={
            "both": {},
            "back": {"proxy": {"passes": "backward"}, "align": {"epochs": 3.0}},
            "svd": {"proxy": {"kind": "svd"}, "align": {"epochs": 0.0}},
            "cut": {"proxy": {"kind": "layers", "sparsity": 0.5}},
        }
    )
    made_of = {
        run: {r.removeprefix("made_of/") for r in p.runs[run].nodes["fidelity"].parents}
        & {"probe", "align", "warmup", "fidelity"}
        for run in p.runs
    }
    assert made_of == {
        "both": {"probe", "align"},
        "back": {"probe"},
        "svd": set(),
        "cut": {"probe"},
    }


def test_errors_of_scores_are_weighted_by_what_the_pool_is_scored_against() -> None:
    weighted = {"passes": "backward", "whiten": "queries"}
    p = plan(
        runs={
            "b": {"proxy": weighted, "influence": {"estimator": "kfac"}},
            "smaller": {"proxy": weighted | {"sparsity": 0.7}, "influence": {"estimator": "kfac"}},
            "both": {},
        },
        split={"fisher": 10},
    )
    nodes = p.runs["b"].nodes
    asked = {r: n for r, n in nodes["features"].parents.items() if r.startswith("query/")}
    assert asked
    assert asked.items() <= nodes["probe"].parents.items()
    assert p.runs["smaller"].nodes["decomposition"] is nodes["decomposition"]
    assert not any(r.startswith("query/") for r in p.runs["both"].nodes["probe"].parents)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"proxy": {"sparsity": 0.3}}, ["factors", "proxy", *AFTER_QUERY]),
        ({"proxy": {"whiten": "queries"}}, []),
        (
            {"proxy": {"whiten": "both"}},
            ["probe", "decomposition", "factors", "proxy", *AFTER_QUERY],
        ),
        ({"align": {"lr": 1e-4, "epochs": 9.0}}, []),  # nothing is trained
        ({"split": {"align": 7}}, []),
        ({"influence": {"query_rank": 8}}, ["features", "ranking", "fidelity", *AFTER_RANKING]),
        (
            {"influence": {"val_agg": "mean_unit"}},
            ["probe", "decomposition", "factors", "proxy", *AFTER_PROXY],
        ),
    ],
)
def test_a_changed_key_reruns_what_depends_on_it_of_the_default_proxy(
    change: dict[str, Any], expected: list[str]
) -> None:
    base = {"proxy": {"passes": "backward"}}
    new = stages(plan(**merge(base, change))) - stages(plan(**base))
    assert [s for s in STAGES if any(stage == s for stage, _ in new)] == expected


def test_the_default_proxy_is_made_for_the_tasks_unless_the_pool_is_sketched() -> None:
    body = BASE | {"proxy": {}}
    run = {
        "exact": {},
        "both": {"proxy": {"passes": "both"}},
        "logra": {"features": {"kind": "logra"}},
    }
    run |= {"paper": {"preset": "paper"}, "reference": {"preset": "reference"}}
    study = parse_study(body | {"runs": run})
    chosen = {r.name: (r.config.proxy.passes, r.config.proxy.whiten) for r in study.runs}
    assert chosen == {
        "exact": ("backward", "queries"),
        "both": ("both", "both"),
        "logra": ("backward", "both"),
        "paper": ("both", "both"),
        "reference": ("both", "both"),
    }


def test_factors_in_both_passes_cannot_be_weighted_by_queries() -> None:
    with pytest.raises(ConfigError, match="proxy.whiten"):
        plan(proxy={"whiten": "queries"})


def test_every_section_of_a_run_is_covered_by_the_table_above() -> None:
    from iprox.study.schema import RunConfig

    sections = {key.split(".")[0] for key in CHANGES} | {"preset", "until", "scorer", "chat"}
    assert set(RunConfig.model_fields) <= sections


def test_a_sweep_shares_everything_upstream() -> None:
    p = plan(runs={"i": {"proxy": {"sparsity": [0.3, 0.5, 0.7]}}})
    count = {s: sum(stage == s for stage, _ in p.nodes) for s in STAGES}
    assert count["warmup"] == count["probe"] == count["decomposition"] == 1
    assert count["factors"] == count["proxy"] == count["ranking"] == 3


def test_runs_that_resolve_to_the_same_stages_are_one_set_of_jobs() -> None:
    once = plan(runs={"a": {}})
    twice = plan(runs={"a": {}, "b": {"proxy": {"sparsity": 0.5}}})
    assert stages(once) == stages(twice)


def test_the_target_run_needs_no_proxy_stages() -> None:
    p = plan(runs={"full": {"proxy": {"kind": "target"}}})
    assert not {s for s, _ in p.nodes} & {"probe", "decomposition", "factors", "proxy", "fidelity"}
    features = p.runs["full"].nodes["features"]
    assert features.parents["model"].stage == "warmup"


def test_a_new_task_ranks_the_sketched_pool_without_another_pass() -> None:
    sketched = {"features": {"kind": "countsketch"}, "split": {"fidelity": 100}}
    before, after = (plan(tasks=t, **sketched) for t in (["mmlu"], ["mmlu", "bbh"]))
    new = {stage for stage, _ in stages(after) - stages(before)}
    assert {"task", "query", "ranking"} <= new
    assert before.runs["a"].nodes["features"].id == after.runs["a"].nodes["features"].id
    ranking = after.runs["a"].nodes["ranking"]
    assert sorted(ranking.parents) == ["features", "query/bbh", "query/mmlu"]


def test_exact_features_depend_on_the_tasks() -> None:
    before, after = (plan(tasks=tasks) for tasks in (["mmlu"], ["mmlu", "bbh"]))
    assert before.runs["a"].nodes["features"].id != after.runs["a"].nodes["features"].id


@pytest.mark.parametrize("proxy", ["target", "ipsvd"])
def test_sketches_are_compared_with_the_targets_exact_scores(proxy: str) -> None:
    p = plan(runs={"a": {"proxy": {"kind": proxy}, "features": {"kind": "logra"}}})
    parents = p.runs["a"].nodes["fidelity"].parents
    compared = sorted(role for role in parents if not role.startswith("made_of/"))
    assert compared == ["proxy", "proxy_query/bbh", "proxy_query/mmlu", "target"]
    assert parents["proxy"].params["features"]["kind"] == "logra"
    assert "features" not in parents["target"].params
    assert parents["target"].parents["model"].stage == "warmup"


def test_only_the_keys_of_a_kind_count() -> None:
    first, second = (plan(features={"kind": "logra", "dim": dim}) for dim in (10, 20))
    assert stages(first) == stages(second)
    assert stages(first) != stages(plan(features={"kind": "logra", "rank": 3}))


def test_plain_svd_reads_no_probe() -> None:
    p = plan(runs={"svd": {"proxy": {"kind": "svd"}}})
    assert "probe" not in {s for s, _ in p.nodes}


def test_kept_blocks_take_the_place_of_a_proxy() -> None:
    p = plan(runs={"cut": {"proxy": {"kind": "layers", "sparsity": [0.3, 0.5]}}})
    made = {s for s, _ in p.nodes}
    assert not made & {"probe", "decomposition", "factors", "proxy"}
    nodes = p.runs["cut-0.3"].nodes
    assert set(nodes["extraction"].parents) == {"pool", "split", "warmup"}
    assert nodes["extraction"].parents["split"].params["split"]["name"] == "probe"
    assert nodes["features"].parents["model"] is nodes["extraction"]
    assert nodes["features"].id.startswith("layers-0.3-")
    assert nodes["fidelity"].parents["target"].parents["model"] is nodes["warmup"]
    # neither factors' settings nor the probe's positions touch it
    other = {"kind": "layers", "damping": 0.7, "gauge": "paper", "rank_allocation": "global"}
    change = {"probe": {"tokens": 7}, "align": {"epochs": 0}}
    first, second = (
        plan(runs={"a": {"proxy": {"kind": "layers"}}}),
        plan(runs={"a": {"proxy": other}}, **change),
    )
    assert stages(first) == stages(second)


def test_another_model_is_warmed_up_like_the_target() -> None:
    p = plan(runs={"small": {"proxy": {"kind": "model", "model": "org/small"}}})
    nodes = p.runs["small"].nodes
    assert not {s for s, _ in p.nodes} & {"probe", "decomposition", "factors", "proxy"}
    other, target = nodes["proxy-target"], nodes["target"]
    assert other.params["target"] == target.params["target"] | {"model": "org/small"}
    ours, theirs = nodes["proxy-warmup"], nodes["warmup"]
    assert ours.params == theirs.params
    assert ours.parents == theirs.parents | {"target": other}
    assert nodes["features"].parents["model"] is ours
    assert nodes["features"].id.startswith("org-small-")
    assert nodes["fidelity"].parents["target"].parents["model"] is theirs
    assert nodes["finetune-mmlu"].parents["model"] is target


def test_code_of_another_model_is_never_run() -> None:
    p = plan(
        target={"trust_remote_code": True, "revision": "abc"},
        runs={"small": {"proxy": {"kind": "model", "model": "org/small", "revision": "def"}}},
    )
    section = p.runs["small"].nodes["proxy-target"].params["target"]
    assert section["trust_remote_code"] is False
    assert section["revision"] == "def"


def test_a_model_that_is_not_named_is_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"(?s)runs\.a\.proxy.*needs proxy\.model"):
        plan(runs={"a": {"proxy": {"kind": "model"}}})


def test_fidelity_shares_the_pass_when_the_slice_is_the_pool() -> None:
    p = plan(split={"fidelity": 100})
    fidelity = p.runs["a"].nodes["fidelity"]
    assert fidelity.parents["proxy"] is p.runs["a"].nodes["features"]
    q = plan(split={"fidelity": 10})
    assert q.runs["a"].nodes["fidelity"].parents["proxy"] is not q.runs["a"].nodes["features"]


def test_a_sparsity_that_is_looked_for_is_a_stage_of_its_own() -> None:
    found = plan(proxy={"sparsity": "auto"}, split={"fidelity": 10}).runs["a"].nodes
    search = found["sparsity"]
    assert found["factors"].parents["sparsity"] is search
    assert search.parents["decomposition"] is found["decomposition"]
    assert search.parents["target"] is found["fidelity"].parents["target"]  # one pass serves both
    assert set(search.parents) >= {"task/mmlu", "task/bbh", "warmup", "pool"}
    fixed = plan(split={"fidelity": 10}).runs["a"].nodes
    assert "sparsity" not in fixed
    assert set(fixed["factors"].parents) == {"decomposition"}
    assert fixed["decomposition"].id == found["decomposition"].id


def test_a_floor_matters_only_where_a_sparsity_is_looked_for() -> None:
    assert rerun(fidelity={"floor": 0.5}) == []
    auto = {"proxy": {"sparsity": "auto"}}
    low, high = (plan(**auto, fidelity={"floor": floor}).runs["a"].nodes for floor in (0.5, 0.6))
    assert low["sparsity"].id != high["sparsity"].id
    assert low["proxy"].id != high["proxy"].id
    assert low["decomposition"].id == high["decomposition"].id


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"proxy": {"sparsity": "auto"}, "fidelity": {"floor": None}}, "what is enough"),
        ({"proxy": {"sparsity": "auto"}, "probe": {"tokens": "rank"}}, "looked for later"),
        ({"proxy": {"max_cost": 0.5}}, "max_cost needs sparsity: auto"),
        ({"proxy": {"sparsity": "automatic"}}, "proxy.sparsity"),
    ],
)
def test_a_search_that_cannot_be_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(**changes)


def test_a_random_order_trains_one_model_for_all_tasks() -> None:
    p = plan(runs={"random": {"scorer": {"kind": "random", "draws": 2}}})
    assert sum(stage == "finetune" for stage, _ in p.nodes) == 2
    assert sum(stage == "evaluation" for stage, _ in p.nodes) == 2 * 2 + 2  # and the base, twice


@pytest.mark.parametrize(
    ("until", "last"),
    [("fidelity", "fidelity"), ("ranking", "ranking"), ("selection", "selection")],
)
def test_until_stops_a_run(until: str, last: str) -> None:
    p = plan(until=until)
    after = STAGES[STAGES.index("evaluation")]
    assert last in p.runs["a"].nodes
    assert after not in {s for s, _ in p.nodes}


def test_the_papers_rule_for_the_probe_depends_on_the_sparsity() -> None:
    p = plan(preset="paper", runs={"i": {"proxy": {"sparsity": [0.3, 0.7]}}})
    assert sum(stage == "probe" for stage, _ in p.nodes) == 2


def test_order_of_keys_changes_nothing() -> None:
    assert stages(plan(proxy={"damping": 0.2, "gauge": "paper"})) == stages(
        plan(proxy={"gauge": "paper", "damping": 0.2})
    )


def test_an_unknown_id_lists_the_valid_ones() -> None:
    p = plan()
    with pytest.raises(ConfigError, match=p.runs["a"].nodes["proxy"].id):
        p.node("proxy", "ipsvd-0.5-0000000000")


def test_identities_are_stable() -> None:
    # A changed identity orphans every user's results: this value may change only on purpose.
    assert plan().shared["pool"].id == "pool-100-c2414485a6"


def test_planning_imports_neither_torch_nor_snakemake() -> None:
    probe = (
        "import sys, iprox.plan.plan, iprox.cli.planning; "
        "print([m for m in ('torch', 'snakemake', 'pandas', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
