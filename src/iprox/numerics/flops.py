"""Floating-point operations of every pass over a decoder, from its shapes and the token counts.

A multiply-add counts as two. What is counted is matrix products: of the blocks' linear layers,
of attention (scores and weighted values, all pairs of tokens, as kernels that do not skip the
masked half compute them), and of the head at the positions whose logits are needed. Padding,
norms, activations and softmaxes are not counted. Imports no tensor library, so that costs can
be predicted before anything is loaded.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from iprox.numerics.ranks import Architecture, block_shapes
from iprox.numerics.sides import block_sides

HessianProduct = Literal["double_backward", "jvp", "central_diff"]

EIGEN = 9
"""Operations of a symmetric eigendecomposition with vectors, in units of side cubed (Golub & Van
Loan, Matrix Computations, section 8.3)."""

UNSPLIT = 2**62
"""A limit on sides that splits none."""

SECOND_READERS = ("k_proj", "v_proj", "up_proj")
"""Layers whose input another layer of the block has read before: q's, and gate's."""


class Linear(NamedTuple):
    """A matrix of a decoder block.

    Attributes:
        out_dim: Outputs.
        in_dim: Inputs.
        scored: Whether its weight gradient is part of an example's gradient.
        factor: Whether it is one of the two factors of a replaced layer.
        own_input: Whether it is the first to read its input.
        backward_rank: Inner width of the factors that its backward pass goes through; 0: none.
    """

    out_dim: int
    in_dim: int
    scored: bool = True
    factor: bool = False
    own_input: bool = True
    backward_rank: int = 0

    @property
    def backward_weights(self) -> int:
        """Entries of the matrices that its backward pass goes through."""
        thin = self.backward_rank * (self.out_dim + self.in_dim)
        return thin if self.backward_rank else self.weights

    @property
    def stored(self) -> int:
        """Entries of the matrix, and of factors beside it."""
        return self.weights + (self.backward_weights if self.backward_rank else 0)

    @property
    def weights(self) -> int:
        """Entries of the matrix."""
        return self.out_dim * self.in_dim

    def is_cut_to(self, rank: int) -> bool:
        """Whether a matrix of this shape is cut to ``rank``; 0 stands for no cut."""
        return 0 < rank < min(self.out_dim, self.in_dim)

    def query_entries(self, rank: int) -> int:
        """Numbers that hold a matrix of this shape, cut to ``rank``."""
        return rank * (self.out_dim + self.in_dim) if self.is_cut_to(rank) else self.weights


@dataclass(frozen=True)
class Network:
    """The matrix products of a decoder.

    Attributes:
        linears: Matrices of all blocks, and how often each occurs.
        attention: Query heads x head width x blocks.
        head: Entries of the output head, vocabulary x hidden.
    """

    linears: Mapping[Linear, int]
    attention: int
    head: int

    @classmethod
    def plan(
        cls,
        arch: Architecture,
        rank: Callable[[str, int, int], int | None] = lambda name, out_dim, in_dim: None,
        scored: Callable[[str], bool] = lambda name: True,
        backward_only: bool = False,
    ) -> Network:
        """The network of an architecture, before there is a model.

        Args:
            arch: Its sizes.
            rank: (name, out, in) of a scored layer -> rank of its factors, None if kept dense.
            scored: Whether a layer, by its name ``layers.<i>.self_attn.q_proj``, is scored.
            backward_only: The factors are beside the weights, for the backward pass alone.
        """
        linears: Counter[Linear] = Counter()
        for block in range(arch.blocks):
            for kind, (out_dim, in_dim) in block_shapes(arch).items():
                name = f"layers.{block}.{kind}"
                own = not kind.endswith(SECOND_READERS)
                r = rank(name, out_dim, in_dim) if scored(name) else None
                if backward_only:
                    linears[Linear(out_dim, in_dim, scored(name), False, own, r or 0)] += 1
                else:
                    linears.update(matrices(out_dim, in_dim, r, scored(name), own))
        attention = arch.heads * arch.head_dim * arch.blocks
        return cls(dict(linears), attention, arch.vocab * arch.hidden)

    def weights(self, which: Callable[[Linear], bool] = lambda linear: True) -> int:
        """Entries of the blocks' matrices that ``which`` accepts."""
        return sum(n * linear.weights for linear, n in self.linears.items() if which(linear))

    @property
    def stored_weights(self) -> int:
        """Entries of the blocks' matrices and of factors beside them."""
        return sum(n * linear.stored for linear, n in self.linears.items())

    @property
    def scored_weights(self) -> int:
        """Length of an example's gradient."""
        return self.weights(lambda linear: linear.scored)

    def query_entries(self, rank: int = 0) -> int:
        """Numbers that hold a query gradient whose layers are cut to ``rank``; 0: not cut."""
        scored = ((linear, n) for linear, n in self.linears.items() if linear.scored)
        return sum(n * linear.query_entries(rank) for linear, n in scored)

    @property
    def factor_weights(self) -> int:
        """Entries of all factors: what alignment trains."""
        return self.weights(lambda linear: linear.factor)


def matrices(
    out_dim: int, in_dim: int, rank: int | None, scored: bool, own_input: bool
) -> list[Linear]:
    """A layer's matrix, or its two factors."""
    if rank is None:
        return [Linear(out_dim, in_dim, scored, False, own_input)]
    return [
        Linear(rank, in_dim, scored, True, own_input),
        Linear(out_dim, rank, scored, True),
    ]


@dataclass(frozen=True)
class Load:
    """Token counts of the texts that are passed through a model.

    Attributes:
        lengths: Tokens of an example -> number of examples of that length.
        supervised: Positions with a loss, over all examples.
    """

    lengths: Mapping[int, float] = field(default_factory=dict)
    supervised: float = 0

    @classmethod
    def of(cls, lengths: Iterable[int], supervised: float) -> Load:
        """The load of texts of these lengths."""
        return cls(dict(Counter(lengths)), supervised)

    @classmethod
    def even(cls, n_examples: float, length: float, supervised_share: float) -> Load:
        """The load of examples of one, mean, length."""
        tokens = max(1, round(length))
        return cls({tokens: n_examples}, supervised_share * tokens * n_examples)

    @property
    def n_examples(self) -> float:
        """Number of examples."""
        return sum(self.lengths.values())

    @property
    def tokens(self) -> float:
        """Tokens of all examples."""
        return sum(length * n for length, n in self.lengths.items())

    @property
    def pairs(self) -> float:
        """Pairs of tokens that attention compares: the sum of squared lengths."""
        return sum(length**2 * n for length, n in self.lengths.items())

    def times(self, factor: float) -> Load:
        """The same texts passed ``factor`` times."""
        return Load({k: factor * n for k, n in self.lengths.items()}, factor * self.supervised)


# --- passes ----------------------------------------------------------------------------------


def forward(net: Network, load: Load, logits: float | None = None) -> float:
    """A forward pass.

    Args:
        net: The model.
        load: The texts.
        logits: Positions whose logits are computed; the supervised ones when absent.
    """
    positions = load.supervised if logits is None else logits
    linear = net.weights() * load.tokens + net.head * positions
    return 2 * linear + 4 * net.attention * load.pairs


def input_backward(net: Network, load: Load, logits: float | None = None) -> float:
    """A backward pass that forms no weight gradient: each product once more, attention's twice."""
    spared = sum(n * (one.weights - one.backward_weights) for one, n in net.linears.items())
    return forward(net, load, logits) + 4 * net.attention * load.pairs - 2 * spared * load.tokens


def one_pass(net: Network, load: Load, logits: float | None = None) -> float:
    """Forward and backward with frozen weights: the floor under every score."""
    return forward(net, load, logits) + input_backward(net, load, logits)


def inner_products(net: Network, load: Load, n_queries: int, rank: int = 0) -> float:
    """Inner products of every example's gradient with ``n_queries`` matrices, and its norm.

    Of each layer and length the cheaper way is counted: with D (tokens, out) and X (tokens, in),
    ``sum(D * (X V^T))`` per matrix V and ``sum(D D^T * X X^T)``, or forming ``D^T X``. Matrices
    of a low rank, ``V = L R``, always take ``sum((D L) * (X R^T))``.
    """
    return sum(
        n * layers * _products(linear, length, n_queries, rank)
        for length, n in load.lengths.items()
        for linear, layers in net.linears.items()
        if linear.scored
    )


def _products(linear: Linear, tokens: int, n_queries: int, rank: int) -> float:
    if linear.is_cut_to(rank):
        thin = 2 * n_queries * tokens * rank * (linear.out_dim + linear.in_dim)
        return thin + _products(linear, tokens, 0, 0)
    return min(_ghost(linear, tokens, n_queries), _formed(linear, tokens, n_queries))


def _ghost(linear: Linear, tokens: int, n_queries: int) -> float:
    grams = linear.out_dim + (linear.in_dim if linear.own_input else 0)
    return 2 * n_queries * tokens * linear.weights + 2 * tokens**2 * grams


def _formed(linear: Linear, tokens: int, n_queries: int) -> float:
    return 2 * linear.weights * (tokens + n_queries + 1)


# --- stages ----------------------------------------------------------------------------------


def training(net: Network, load: Load, head_trained: bool) -> float:
    """Fine-tuning of all blocks, with logits at every position as trainers compute them.

    Args:
        net: The model.
        load: The texts, epochs counted.
        head_trained: Whether the head gets a weight gradient.
    """
    weight_gradients = net.weights() + (net.head if head_trained else 0)
    return one_pass(net, load, load.tokens) + 2 * weight_gradients * load.tokens


def lora_training(net: Network, load: Load, parameters: int) -> float:
    """Fine-tuning of low-rank updates: the weights themselves get no gradient.

    Args:
        net: The model.
        load: The texts, epochs counted.
        parameters: Numbers in the updates, each used forward, backward and for its gradient.
    """
    return one_pass(net, load, load.tokens) + 6 * parameters * load.tokens


def probe(net: Network, load: Load, directions: int = 0) -> float:
    """Recording layer inputs and output gradients, and how inputs move in some directions.

    The derivative of a forward pass takes three: the pass, its products with what moves, and those
    of the directions with the inputs.
    """
    return one_pass(net, load) + 3 * directions * forward(net, load, 0)


def query(net: Network, load: Load, unit: bool = False) -> float:
    """The mean gradient of some queries; of unit gradients, their norms are found before."""
    mean = one_pass(net, load) + 2 * net.scored_weights * load.tokens
    return mean + features(net, load, 0) if unit else mean


def features(
    net: Network,
    load: Load,
    n_queries: int,
    passes: int = 1,
    query_rank: int = 0,
    whitened: bool = False,
) -> float:
    """Inner products and norms of pool examples; each pass takes an equal share of the queries.

    Args:
        net: The model.
        load: The examples.
        n_queries: Query gradients.
        passes: Times the examples are passed.
        query_rank: Rank that query gradients are cut to; 0: whole.
        whitened: Whether norms are those in the metric of an inverse curvature.
    """
    share = -(-n_queries // passes)
    if whitened:
        entries = 2 * share * net.query_entries(query_rank) * load.tokens
        return passes * entries + eigenvalues(net, load, passes)
    return passes * (one_pass(net, load) + inner_products(net, load, share, query_rank))


def covariance(net: Network, load: Load, passes: int = 1, limit: int = UNSPLIT) -> float:
    """Second moments of inputs and output gradients, sides split above ``limit``."""
    products = sum(side**2 for side in factor_blocks(net, limit))
    return passes * one_pass(net, load) + 2 * products * load.tokens


def eigenbases(sides: Iterable[int]) -> float:
    """Eigenvectors of symmetric matrices."""
    return EIGEN * sum(side**3 for side in sides)


def eigenvalues(net: Network, load: Load, passes: int = 1, limit: int = UNSPLIT) -> float:
    """Squared gradients of every example in the eigenbases of the second moments."""
    rotations = sum(side**2 for side in factor_blocks(net, limit))
    products = rotations + net.scored_weights
    return passes * one_pass(net, load) + 2 * products * load.tokens


def solve(net: Network, n_queries: int) -> float:
    """Solving with Kronecker-factored curvature: into both eigenbases and back."""
    return n_queries * sum(
        4 * n * linear.weights * (linear.out_dim + linear.in_dim)
        for linear, n in net.linears.items()
        if linear.scored
    )


def datainf(net: Network, load: Load, n_queries: int, passes: int = 1) -> float:
    """Inner products with every example, then weighted sums of their gradients."""
    sums = 2 * n_queries * net.scored_weights * load.tokens
    return features(net, load, n_queries) + passes * one_pass(net, load) + sums


def factor_blocks(net: Network, limit: int) -> Iterator[int]:
    """Sides of all blocks of second moments; layers with one input share its moment."""
    for linear, n in net.linears.items():
        if linear.scored:
            sides = block_sides(linear.out_dim, limit)
            sides += block_sides(linear.in_dim, limit) if linear.own_input else []
            yield from sides * n


def reading(net: Network, shared: int, new: Iterable[int], logits: float) -> float:
    """A forward pass of texts that begin alike, what they share once.

    Args:
        net: The model.
        shared: Tokens at their beginning that are read once.
        new: Tokens of each text after them.
        logits: Positions whose logits are computed.
    """
    lengths = list(new)
    linear = net.weights() * (shared + sum(lengths)) + net.head * logits
    pairs = shared**2 + sum((shared + n) ** 2 - shared**2 for n in lengths)
    return 2 * linear + 4 * net.attention * pairs


def generation(net: Network, prompt: int, new_tokens: int) -> float:
    """One greedy answer with a key-value cache: the prompt at once, then token by token."""
    linear = net.weights() * (prompt + new_tokens) + net.head * (new_tokens + 1)
    pairs = prompt**2 + prompt * new_tokens + new_tokens**2 / 2
    return 2 * linear + 4 * net.attention * pairs


# --- alignment -------------------------------------------------------------------------------


class Anchoring(NamedTuple):
    """What an alignment step computes (IProX, arXiv:2602.17835, Eqs. 6 and 7).

    Attributes:
        hvp: How the Hessian-vector product is computed.
        exact: Whether the target's projection is differentiated.
        kl: Whether predictions are anchored.
        all_positions: Whether they are at every position rather than the supervised ones.
    """

    hvp: HessianProduct = "double_backward"
    exact: bool = True
    kl: bool = True
    all_positions: bool = False

    def logits(self, load: Load) -> float:
        """Positions whose logits are computed."""
        return load.tokens if self.all_positions else load.supervised


def alignment(
    target: Network,
    proxy: Network,
    train: Load,
    heldout: Load,
    how: Anchoring,
    *,
    candidates: int,
    compared: Load,
    chunk: int,
) -> float:
    """All of an alignment; changes of gauge between its steps are not counted.

    Args:
        target: The dense model.
        proxy: The model whose factors train.
        train: Examples trained on, repeats counted.
        heldout: Examples every candidate is measured on.
        how: What a step computes.
        candidates: Candidates measured, the start included.
        compared: The held-out examples whose gradients are compared pair by pair.
        chunk: Half the examples of a pass that compares gradients.
    """
    judged = heldout_objective(target, proxy, heldout, how) + geometry(proxy, compared, chunk)
    steps = alignment_step(target, proxy, train, how)
    return steps + geometry(target, compared, chunk) + candidates * judged


def recovery(target: Network, proxy: Network, load: Load) -> float:
    """Teaching a proxy the target's predictions at every token of ``load``."""
    learn = one_pass(proxy, load, load.tokens) + 2 * proxy.factor_weights * load.tokens
    return forward(target, load, load.tokens) + learn


def alignment_step(target: Network, proxy: Network, load: Load, how: Anchoring) -> float:
    """The objective's gradient on ``load``: the target's pass, the proxy's, and second order."""
    logits, tokens = how.logits(load), load.tokens
    observe = one_pass(target, load, logits)
    project = 4 * proxy.factor_weights * tokens * (2 if how.exact else 1)
    if how.hvp == "double_backward":
        return observe + project + _double_backward(proxy, load, logits)
    gradient = input_backward(proxy, load, logits) + 2 * proxy.factor_weights * tokens
    first_order = forward(proxy, load, logits) + gradient * (2 if how.kl else 1)
    if how.kl:  # the anchor needs the target's predictions before its gradients are compared
        observe += forward(target, load, logits)
    return observe + project + first_order + _hessian_vector(proxy, load, how.hvp)


def heldout_objective(target: Network, proxy: Network, load: Load, how: Anchoring) -> float:
    """The objective on held-out examples, without its gradient."""
    logits = how.logits(load)
    gradients = 6 * proxy.factor_weights * load.tokens  # the factors', and the target's projected
    return one_pass(target, load, logits) + one_pass(proxy, load, logits) + gradients


def geometry(net: Network, load: Load, chunk: int) -> float:
    """Inner products of all pairs of examples' gradients: every pair of chunks shares a pass."""
    if not load.n_examples:
        return 0.0
    chunks = math.ceil(load.n_examples / chunk)
    repeats = max(1, chunks - 1)
    together = min(load.n_examples, 2 * chunk)
    n_passes = repeats * load.n_examples / together
    rows = load.tokens / load.n_examples * together
    pairs = sum(
        layers
        * (
            2 * rows**2 * (linear.out_dim + linear.in_dim)
            if rows * (linear.out_dim + linear.in_dim) < linear.weights
            else 2 * (rows + together**2) * linear.weights
        )
        for linear, layers in net.linears.items()
        if linear.scored
    )
    return repeats * one_pass(net, load) + n_passes * pairs


def _hessian_vector(proxy: Network, load: Load, hvp: HessianProduct) -> float:
    """Second-order terms besides a first-order pass."""
    gradient = one_pass(proxy, load) + 2 * proxy.factor_weights * load.tokens
    if hvp == "central_diff":
        return 2 * gradient
    # forward over reverse: a product has two tangents, one when its weight is constant
    constant = (proxy.weights() - proxy.factor_weights) * load.tokens + proxy.head * load.supervised
    return 3 * gradient - 4 * constant


def _double_backward(proxy: Network, load: Load, logits: float) -> float:
    """Forward, first backward, and the backward pass through both.

    A product with a trained weight is made once forward, twice backward, four times backward
    through that, and twice more for what the forward pass is to the second loss: nine times. With
    a constant weight it is four times; attention's products, of two live operands, nine.
    """
    trained = 9 * proxy.factor_weights * load.tokens
    constant = (proxy.weights() - proxy.factor_weights) * load.tokens + proxy.head * logits
    return 2 * (trained + 4 * constant) + 9 * 4 * proxy.attention * load.pairs


# --- linear algebra --------------------------------------------------------------------------


def plain_svd(out_dim: int, in_dim: int, kept: int) -> float:
    """Truncated SVD of one weight through the Gram matrix of its shorter side."""
    short, long = sorted((out_dim, in_dim))
    return 2 * short**2 * long + EIGEN * short**3 + 2 * kept * out_dim * in_dim


def ipsvd_exact(out_dim: int, in_dim: int, tokens: int, kept: int) -> float:
    """The damped solution of one layer, from probe rows (tokens, out) and (tokens, in)."""
    short, long = sorted((out_dim, in_dim))
    root = 2 * tokens * short**2 + short**3 / 3 + short**2 * long  # moment, Cholesky, its product
    by_rows = tokens * short * (long + short)
    by_moment = short * long * (long + short) + tokens * long**2
    solved = EIGEN * short**3 + kept * short**2 + 2 * kept * out_dim * in_dim
    return root + 2 * min(by_rows, by_moment) + solved


def ipsvd_paper(out_dim: int, in_dim: int, tokens: int, kept: int) -> float:
    """The paper's solution of one layer on the probe spans (arXiv:2602.17835, appendix F)."""
    spans = [min(tokens, dim) for dim in (out_dim, in_dim)]
    moments = sum(_eigenpairs(tokens, dim) for dim in (out_dim, in_dim))
    core = 2 * spans[0] * in_dim * (out_dim + spans[1])
    kept = min(kept, *spans)
    back = 2 * kept * (spans[0] * out_dim + spans[1] * in_dim)
    outside = 4 * tokens * (2 * out_dim * in_dim)
    return moments + core + plain_svd(spans[0], spans[1], kept) + back + outside


def _eigenpairs(tokens: int, dim: int) -> float:
    """Eigenpairs of a second moment from its rows, through the smaller Gram matrix."""
    if tokens < dim:
        return 2 * tokens**2 * dim + EIGEN * tokens**3 + 2 * tokens**2 * dim
    return 2 * tokens * dim**2 + EIGEN * dim**3
