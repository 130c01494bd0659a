"""The formula for floating-point operations against operations counted as they run."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import tiny_model
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from iprox.engine.align import align_proxy
from iprox.engine.capture import backward_pass, input_sites
from iprox.engine.curvature import WhitenedNorms
from iprox.engine.geometry import gradient_gram
from iprox.engine.loss import Batch
from iprox.engine.objective import Factorised, TargetView, evaluate, gradient
from iprox.models.flops import network_of
from iprox.models.layers import block_linears, scored_linears
from iprox.models.load import as_proxy
from iprox.models.lowrank import replace_linears
from iprox.numerics import flops
from iprox.numerics.flops import Anchoring, Load, Network
from iprox.numerics.kfac import Damping, Eigenbasis, LayerCurvature
from iprox.numerics.ranks import Architecture, model_size
from iprox.study.schema import AlignSection, LayersSection

LENGTH, SUPERVISED, EXAMPLES = 40, 9, 4
BLOCKS = 6
ALL = LayersSection()
LOAD = Load.of([LENGTH] * EXAMPLES, SUPERVISED * EXAMPLES)
TOLERANCE = 0.05
ARCH = Architecture(
    hidden=64, blocks=BLOCKS, ff=96, heads=4, kv_heads=2, head_dim=16, vocab=1000, tied=True
)


def model(architecture: str = "llama", **changes: Any) -> Any:
    """A decoder with grouped-query attention, frozen."""
    sizes: dict[str, Any] = dict(
        hidden_size=64, intermediate_size=96, head_dim=16, num_hidden_layers=BLOCKS, vocab_size=1000
    )
    if architecture == "gemma3":
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * (BLOCKS // 2)
    made = tiny_model(architecture, torch.float32, **(sizes | changes))
    return made.requires_grad_(False)


def rank(name: str, out_dim: int, in_dim: int) -> int | None:
    """Rank of a layer; one kind is kept dense, as small layers may be."""
    return None if name.endswith("k_proj") else 16


def proxy(of: Any) -> Any:
    ranks = {n: rank(n, *m.weight.shape) for n, m in block_linears(of, ALL).items()}
    factors = {
        n: (torch.randn(m.out_features, r) / 8, torch.randn(r, m.in_features) / 8)
        for n, m in block_linears(of, ALL).items()
        if (r := ranks[n]) is not None
    }
    return as_proxy(of, factors).requires_grad_(False)


def backward_only(of: Any) -> Any:
    """The same factors for the backward pass alone."""
    thin = copy.deepcopy(of)
    ranks = {n: rank(n, *m.weight.shape) for n, m in block_linears(of, ALL).items()}
    replace_linears(thin, {n: r for n, r in ranks.items() if r is not None}, "backward")
    return thin.requires_grad_(False)


def batch(examples: int = EXAMPLES) -> Batch:
    ids = torch.randint(4, 260, (examples, LENGTH))
    labels = ids.clone()
    labels[:, : LENGTH - SUPERVISED] = -100
    return Batch(ids, labels, torch.full((examples,), LENGTH))


def counted(run: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def ignore(name: str, x: Tensor, d: Tensor) -> None:
    """A visitor that does nothing."""


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize(
    "make", [lambda dense: dense, proxy, backward_only], ids=["dense", "factorised", "backward"]
)
def test_a_scoring_pass(architecture: str, make: Any) -> None:
    scoring = make(model(architecture))
    layers = scored_linears(scoring, ALL)
    found = counted(lambda: backward_pass(scoring, layers, batch(), ignore))
    net = network_of(scoring, layers)
    assert flops.one_pass(net, LOAD) == pytest.approx(found, rel=TOLERANCE)
    # what the tolerance must not hide: attention, and a head at supervised positions only
    assert flops.one_pass(net, LOAD, LOAD.tokens) > 1.05 * found
    assert flops.one_pass(Network(net.linears, 0, net.head), LOAD) < 0.95 * found


@pytest.mark.parametrize("make", [lambda dense: dense, proxy], ids=["dense", "factorised"])
@pytest.mark.parametrize("n_queries", [0, 1, 3])
def test_products_of_features(make: Any, n_queries: int) -> None:
    scoring = make(model())
    layers = scored_linears(scoring, ALL)
    queries = {n: torch.randn(n_queries, *m.weight.shape) for n, m in layers.items()}
    grams: dict[int, Tensor] = {}

    def ghost(name: str, x: Tensor, d: Tensor) -> None:
        for v in queries[name]:
            (d * (x @ v.mT)).sum((1, 2))
        if x.data_ptr() not in grams:
            grams[x.data_ptr()] = x @ x.mT
            kept.append(x)
        (d @ d.mT * grams[x.data_ptr()]).sum((1, 2))

    def formed(name: str, x: Tensor, d: Tensor) -> None:
        g = d.mT @ x
        (g.flatten(1) @ queries[name].flatten(1).T, g.flatten(1)[:, None] @ g.flatten(1)[..., None])

    kept: list[Tensor] = []
    net, one = network_of(scoring, layers), batch()
    costs = [counted(lambda v=v: backward_pass(scoring, layers, one, v)) for v in (ghost, formed)]
    total = flops.features(net, LOAD, n_queries)
    assert total <= 1.05 * min(costs)  # per layer the cheaper way, so at most either of them
    assert total >= 0.7 * min(costs)
    for way, cost in zip((flops._ghost, flops._formed), costs, strict=True):
        products = sum(n * way(linear, LENGTH, n_queries) for linear, n in net.linears.items())
        assert flops.one_pass(net, LOAD) + EXAMPLES * products == pytest.approx(cost, rel=TOLERANCE)


def test_norms_by_a_curvature() -> None:
    scoring, one = model(), batch()
    layers = scored_linears(scoring, ALL)

    def basis(dim: int) -> Eigenbasis:
        return Eigenbasis([torch.eye(dim)], torch.ones(dim))

    curvatures = {
        n: LayerCurvature(n, basis(m.out_features), basis(m.in_features)) for n, m in layers.items()
    }
    norms = WhitenedNorms(curvatures, input_sites(scoring, layers, one), Damping(1.0, "absolute"))
    queries = {n: torch.randn(2, *m.weight.shape) for n, m in layers.items()}

    def visit(name: str, x: Tensor, d: Tensor) -> None:
        for v in queries[name]:
            (d * (x @ v.mT)).sum((1, 2))
        norms(name, x.flatten(0, 1), d.flatten(0, 1), [LENGTH] * EXAMPLES)

    found = counted(lambda: backward_pass(scoring, layers, one, visit))
    total = flops.features(network_of(scoring, layers), LOAD, 2, whitened=True)
    assert total == pytest.approx(found, rel=TOLERANCE)


def test_products_with_cut_queries() -> None:
    scoring = model()
    layers = scored_linears(scoring, ALL)
    rank, n_queries = 3, 2

    def thin(name: str, x: Tensor, d: Tensor) -> None:
        out, features = layers[name].weight.shape
        (d @ torch.randn(out, rank * n_queries) * (x @ torch.randn(features, rank * n_queries)))

    net = network_of(scoring, layers)
    cost = counted(lambda: backward_pass(scoring, layers, batch(), thin))
    norms = flops.inner_products(net, LOAD, 0)
    assert flops.features(net, LOAD, n_queries, query_rank=rank) == pytest.approx(
        cost + norms, rel=TOLERANCE
    )
    assert flops.features(net, LOAD, 2, query_rank=10**6) == flops.features(net, LOAD, 2)
    assert net.query_entries() == net.scored_weights > net.query_entries(rank)


def test_a_query_gradient() -> None:
    dense = model()
    layers = block_linears(dense, ALL)

    def mean(name: str, x: Tensor, d: Tensor) -> None:
        d.flatten(0, 1).mT @ x.flatten(0, 1)

    found = counted(lambda: backward_pass(dense, layers, batch(), mean))
    assert flops.query(network_of(dense, layers), LOAD) == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_training_step(frozen: bool) -> None:
    dense = model(tie_word_embeddings=False).requires_grad_(True)
    for module in (dense.get_input_embeddings(), dense.get_output_embeddings()):
        module.requires_grad_(not frozen)
    texts = batch()
    found = counted(lambda: dense(input_ids=texts.input_ids, labels=texts.labels).loss.backward())
    expected = flops.training(network_of(dense), LOAD, head_trained=not frozen)
    assert expected == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize("hvp", ["double_backward", "jvp", "central_diff"])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("positions", ["supervised", "all"])
def test_an_alignment_step(hvp: Any, exact: bool, positions: Any) -> None:
    target = model()
    align = AlignSection(
        hvp=hvp, grad="exact" if exact else "stop_projection", kl_positions=positions
    )
    trained = Factorised(proxy(target), align)
    dense = {name: target.get_submodule(name) for name in trained.layers}
    texts = batch()
    found = counted(lambda: gradient(trained, texts, TargetView(target, dense, texts, align)))
    how = Anchoring(hvp, exact, kl=True, all_positions=positions == "all")
    nets = (network_of(target), network_of(trained.model, scored_linears(trained.model, ALL)))
    assert flops.alignment_step(*nets, LOAD, how) == pytest.approx(found, rel=TOLERANCE)
    held = counted(lambda: evaluate(trained, texts, TargetView(target, dense, texts, align)))
    assert flops.heldout_objective(*nets, LOAD, how) == pytest.approx(held, rel=TOLERANCE)


def test_a_recovery_step() -> None:
    target = model()
    trained = Factorised(proxy(target), AlignSection())
    ids = batch().input_ids

    def whole() -> None:  # what engine.recovery.imitate computes in slices of the tokens
        with torch.no_grad():
            expected = target(input_ids=ids).logits.log_softmax(-1)
        found = trained.model(input_ids=ids).logits.log_softmax(-1)
        torch.nn.functional.kl_div(found, expected, reduction="sum", log_target=True).backward()

    nets = (network_of(target), network_of(trained.model, scored_linears(trained.model, ALL)))
    assert flops.recovery(*nets, LOAD) == pytest.approx(counted(whole), rel=TOLERANCE)


def test_a_comparison_of_gradients() -> None:
    dense = model()
    layers = block_linears(dense, ALL)
    texts = batch(8)

    def collate(rows: Any) -> Batch:
        return Batch(*(t[list(rows)] for t in texts))

    found = counted(lambda: gradient_gram(dense, layers, range(8), collate, chunk=2))
    load = LOAD.times(2)
    assert flops.geometry(network_of(dense, layers), load, 2) == pytest.approx(found, rel=TOLERANCE)


@pytest.mark.parametrize("hvp", ["double_backward", "central_diff"])
def test_a_whole_alignment(hvp: Any) -> None:
    target = model()
    align = AlignSection(hvp=hvp, epochs=2, batch=2, heldout=0.4, evaluate_every=2)
    texts = batch(10)

    def collate(rows: Any) -> Batch:
        return Batch(*(t[list(rows)] for t in texts))

    thin = proxy(target)
    found = counted(
        lambda: align_proxy(target, thin, range(6), range(6, 10), collate, align, layers=ALL)
    )
    expected = flops.alignment(
        network_of(target, block_linears(target, ALL)),
        network_of(thin, scored_linears(thin, ALL)),
        LOAD.times(2 * 6 / EXAMPLES),
        LOAD.times(4 / EXAMPLES),
        Anchoring(hvp),
        candidates=4,  # the start, and after steps 2, 4 and 6
        compared=LOAD.times(4 / EXAMPLES),
        chunk=2 * align.batch,
    )
    assert expected == pytest.approx(found, rel=TOLERANCE)


def test_a_greedy_answer() -> None:
    dense = model()
    ids, new = torch.randint(4, 260, (1, LENGTH)), 12

    def answer() -> None:
        dense.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new,
            max_new_tokens=new,
            do_sample=False,
        )

    expected = flops.generation(network_of(dense), LENGTH, new)
    assert expected == pytest.approx(counted(answer), rel=2 * TOLERANCE)  # the last is not passed


@pytest.mark.parametrize("factorised", [False, True])
def test_planned_shapes_are_those_of_the_model(factorised: bool) -> None:
    made = proxy(model()) if factorised else model()
    planned = Network.plan(ARCH, rank if factorised else lambda *_: None)
    assert planned == network_of(made, scored_linears(made, ALL))
    if not factorised:
        assert planned.weights() == model_size(ARCH).linears


def test_operations_add_over_examples_and_passes() -> None:
    net = Network.plan(ARCH)
    parts = [Load.of([5, 5, 30], 11), Load.of([70], 60)]
    whole = Load.of([30, 5, 70, 5], 71)
    for cost in (flops.one_pass, flops.query, lambda n, x: flops.features(n, x, 2)):
        assert cost(net, whole) == pytest.approx(sum(cost(net, p) for p in parts))
        assert cost(net, whole.times(3)) == pytest.approx(3 * cost(net, whole))
    assert whole.pairs == 25 + 25 + 900 + 4900


def test_decompositions_by_hand() -> None:
    # out 2, in 3: Gram 2*2*2*3, eigen 9*8, right factor 2*1*2*3
    assert flops.plain_svd(2, 3, 1) == 24 + 72 + 12
    assert flops.plain_svd(3, 2, 1) == flops.plain_svd(2, 3, 1)
    # LAPACK does what the leading terms say: more tokens or directions cost more
    assert flops.ipsvd_exact(64, 96, 512, 30) > flops.ipsvd_exact(64, 96, 256, 30)
    assert flops.ipsvd_paper(64, 96, 32, 30) < flops.ipsvd_paper(64, 96, 64, 30)


def test_a_layer_that_is_not_scored_costs_its_passes_only() -> None:
    scored = Network.plan(ARCH)
    some = Network.plan(ARCH, scored=lambda name: "mlp" in name)
    assert flops.one_pass(some, LOAD) == flops.one_pass(scored, LOAD)
    assert some.scored_weights == BLOCKS * 3 * 64 * 96
    assert flops.features(some, LOAD, 2) < flops.features(scored, LOAD, 2)


def test_modules_outside_the_decoder_do_not_count() -> None:
    dense = model()
    dense.extra = nn.Linear(1000, 1000)
    assert network_of(dense) == network_of(model())
