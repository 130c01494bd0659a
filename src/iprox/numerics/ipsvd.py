"""IPSVD: low-rank factors of a weight that disturb the loss of single tokens least.

Replacing a weight W (out, in) by W + E changes the loss of a token with layer input x and output
gradient d by dᵀ E x to first order. With x and d taken as independent (the step K-FAC makes too),
its mean square is ‖C_d^½ E C_x^½‖²_F, where C_x = E[x xᵀ] (in, in) and C_d = E[d dᵀ] (out, out).
IPSVD (arXiv:2602.17835, Eq. 5) minimises the damped form of it over matrices of a given rank:

    ‖R_d (W - L R) R_x‖_F,   R_x = (C_x + λ_x I)^½,   R_d = (C_d + λ_d I)^½

by the truncated SVD of S = R_d W R_x (Eckart & Young 1936). With S = P Σ Qᵀ, one side's inverse
root suffices, because P Pᵀ S R_x⁻¹ = P Pᵀ R_d W:

    left form   L = R_d⁻¹ P,     R = Pᵀ R_d W
    right form  L = W R_x Q,     R = Qᵀ R_x⁻¹

The left form is used when out <= in, else the right form, so that P (or Q) comes from the smaller
of S Sᵀ and Sᵀ S. That product needs the other side's C + λI only, never its root. Nor need the root
be symmetric: any F with F Fᵀ = C + λI in place of R (Fᵀ W, F⁻ᵀ P) rotates P and changes neither
L, R nor Σ. A Cholesky factor costs a fraction of the eigenpairs.

All arithmetic is in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from iprox.errors import ConfigError, NumericsError

DampingMode = Literal["relative", "absolute"]
Mode = Literal["exact", "paper"]
Objective = Literal["tracin", "influence"]
Gauge = Literal["balanced", "paper"]

FLOAT64_LIMIT = 4096
"""Symmetric matrices up to this side are diagonalised in float64, larger ones in float32."""

RESIDUAL_LIMIT = 1e-4
"""Largest accepted ‖M V - V E‖ / ‖M‖ of a float32 eigendecomposition."""


class Factors(NamedTuple):
    """A low-rank stand-in for a weight: W ≈ left @ right."""

    left: Tensor  # (out, rank)
    right: Tensor  # (rank, in)


@dataclass(frozen=True, eq=False)
class Directions:
    """Nested low-rank solutions: ``left[:, :r] @ right[:r]`` is the one of rank r.

    Attributes:
        left: (out, k).
        right: (k, in).
        singular_values: Those of S, descending, (min(out, in),); zeros where there are none.
        floor: Norm of the part of S that no rank reaches; 0 for exact solutions.
        rank_effective: Number of singular values that stand out of rounding. Columns of ``left``
            and rows of ``right`` beyond it are zero in mode ``paper``.
        form: Which factor carries the singular values: ``left`` form has them in ``right``,
            ``right`` form in ``left``.
        fallback: Why plain SVD was used instead of what was asked; None when it was not.
    """

    left: Tensor
    right: Tensor
    singular_values: Tensor
    rank_effective: int
    form: Literal["left", "right"]
    floor: float = 0.0
    fallback: str | None = None

    @property
    def total_norm(self) -> float:
        """‖S‖_F, which truncation errors are relative to."""
        return math.hypot(float(self.singular_values.norm()), self.floor)


@dataclass(frozen=True, eq=False)
class DampedRoot:
    """C + λI of one side of a layer, its symmetric square root and the root's inverse.

    With U (dim, k) and c (k,) the eigenpairs of C that stand out of rounding, every power is

        (C + λI)^p = λ^p I + U diag((c + λ)^p - λ^p) Uᵀ,

    the identity plus rank k. With fewer rows than dimensions U comes from the (N, N) Gram matrix of
    the rows and nothing (dim, dim) is formed. Eigenpairs, C itself and its Cholesky factor are
    computed when they are first needed, and kept.

    Build with :meth:`from_rows`, :meth:`from_covariance` or :meth:`identity`.

    Attributes:
        dim: Number of inputs or outputs of the layer.
        lam: λ, in the units of C.
        rows: Observations divided by √N, (N, dim); None when only C is known.
        accumulated: C (dim, dim) when there are no rows.
    """

    dim: int
    lam: float
    rows: Tensor | None = None
    accumulated: Tensor | None = None

    @classmethod
    def from_rows(cls, rows: Tensor, damping: float, mode: DampingMode = "relative") -> DampedRoot:
        """Damped moment of observed inputs or output gradients, C = rowsᵀ rows / N.

        Args:
            rows: One observation a row, (N, dim).
            damping: λ itself (``absolute``), or as a multiple of the mean eigenvalue tr(C) / dim
                (``relative``; the solution then does not depend on the scale of the rows).
            mode: How ``damping`` is read.

        Raises:
            NumericsError: A row is not finite, there are no rows, or damping is 0 and C singular.
        """
        rows = rows.double()
        count, dim = rows.shape
        if count == 0:
            raise NumericsError("there are no probe rows", value=tuple(rows.shape))
        wrong = (~rows.isfinite().all(dim=1)).nonzero().flatten().tolist()
        if wrong:
            raise NumericsError(
                f"{len(wrong)} of {count} probe rows are not finite",
                value=f"first bad row: {wrong[0]}",
                fix="probe in float32, and check the warm-up's loss for divergence",
            )
        lam = _absolute(damping, mode, float(rows.square().mean()))
        return cls(dim, lam, rows=rows / math.sqrt(count))._checked()

    @classmethod
    def from_covariance(
        cls, covariance: Tensor, damping: float, mode: DampingMode = "relative"
    ) -> DampedRoot:
        """Damped moment from an accumulated C (dim, dim); arguments as :meth:`from_rows`.

        Raises:
            NumericsError: C is not finite, or damping is 0 and C singular.
        """
        covariance = covariance.double()
        if not bool(covariance.isfinite().all()):
            raise NumericsError("a second moment is not finite", value=tuple(covariance.shape))
        dim = covariance.shape[0]
        lam = _absolute(damping, mode, float(covariance.trace()) / dim)
        return cls(dim, lam, accumulated=(covariance + covariance.T) / 2)._checked()

    @classmethod
    def identity(cls, dim: int, like: Tensor) -> DampedRoot:
        """A side whose directions all count the same: C = I, undamped.

        With it in place of the output gradients' moment the solution weights errors of the layer's
        outputs by how often their inputs occur, as SVD-LLM (arXiv:2403.07378) does.

        Args:
            dim: Number of outputs (or inputs) of the layer.
            like: A tensor on the device to use.
        """
        # full rank by construction, so no eigenpairs are needed to check it
        return cls(dim, 0.0, accumulated=torch.eye(dim, dtype=torch.float64, device=like.device))

    def _checked(self) -> DampedRoot:
        if self.lam == 0 and not self.is_zero and self.rank < self.dim:
            raise NumericsError(
                "damping 0 needs second moments of full rank",
                value=f"rank {self.rank} of {self.dim}",
                fix="set proxy.damping above 0, or probe more tokens",
            )
        return self

    @property
    def is_zero(self) -> bool:
        """Whether every observation is exactly zero."""
        kept = self.rows if self.rows is not None else self.accumulated
        return kept is None or not bool(kept.any())

    @property
    def gram(self) -> Literal["tokens", "features"]:
        """The smaller Gram matrix, which gives eigenpairs: of tokens (N, N) or features (C)."""
        return "tokens" if self.rows is not None and len(self.rows) < self.dim else "features"

    @cached_property
    def covariance(self) -> Tensor:
        """C, (dim, dim)."""
        if self.rows is not None:
            return self.rows.T @ self.rows
        assert self.accumulated is not None
        return self.accumulated

    @cached_property
    def eigenpairs(self) -> tuple[Tensor, Tensor]:
        """U (dim, k) and c (k,): eigenpairs of C above rounding, largest first."""
        if self.rows is None or self.gram == "features":
            values, vectors = symmetric_eigen(self.covariance)
            k = _n_resolved(values, self.dim)
            return vectors[:, :k], values[:k]
        values, vectors = symmetric_eigen(self.rows @ self.rows.T)
        k = _n_resolved(values, self.dim)
        return self.rows.T @ (vectors[:, :k] / values[:k].sqrt()), values[:k]

    @property
    def vectors(self) -> Tensor:
        """U, an orthonormal basis of what was observed, (dim, k)."""
        return self.eigenpairs[0]

    @property
    def root_values(self) -> Tensor:
        """Eigenvalues of the root on ``vectors``, √(c + λ), (k,)."""
        return (self.eigenpairs[1] + self.lam).sqrt()

    @property
    def rank(self) -> int:
        """Numerical rank k of C."""
        return len(self.eigenpairs[1])

    @property
    def known_rank(self) -> int | None:
        """Numerical rank of C if eigenpairs have been needed so far, else None."""
        return self.rank if "eigenpairs" in self.__dict__ else None

    def power(self, matrix: Tensor, exponent: float) -> Tensor:
        """(C + λI)^exponent @ matrix, for a matrix (dim, columns).

        Raises:
            NumericsError: The exponent is negative, λ is 0 and C is zero.
        """
        vectors, values = self.eigenpairs
        if self.lam == 0 and len(values) < self.dim and exponent < 0:
            raise NumericsError("a second moment that is zero has no inverse", value=self.dim)
        outside = 0.0 if len(values) == self.dim else self.lam**exponent
        inside = (values + self.lam) ** exponent - outside
        product = vectors @ (inside[:, None] * (vectors.T @ matrix))
        return product + outside * matrix if outside else product

    def apply(self, matrix: Tensor) -> Tensor:
        """(C + λI)^½ @ matrix; the root is symmetric, so ``apply(M.T).T`` is M @ (C + λI)^½."""
        return self.power(matrix, 0.5)

    def apply_inverse(self, matrix: Tensor) -> Tensor:
        """(C + λI)^-½ @ matrix."""
        return self.power(matrix, -0.5)

    @cached_property
    def cholesky(self) -> Tensor:
        """Lower triangular F with F Fᵀ = C + λI, (dim, dim).

        Raises:
            NumericsError: λ is so small that C + λI is singular to rounding.
        """
        damped = self.covariance.clone()
        damped.diagonal().add_(self.lam)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        if int(failed):
            raise NumericsError(
                "a damped second moment is singular to rounding",
                value=f"damping {self.lam:.1e} beside a largest eigenvalue of "
                f"{float(self.eigenpairs[1][0]):.1e}",
                fix="raise proxy.damping",
            )
        return factor

    def apply_moment(self, matrix: Tensor) -> Tensor:
        """(C + λI) @ matrix, without eigenpairs."""
        if self.rows is None:
            return self.covariance @ matrix + self.lam * matrix
        return self.rows.T @ (self.rows @ matrix) + self.lam * matrix

    def quadratic(self, matrix: Tensor) -> Tensor:
        """matrixᵀ (C + λI) matrix, (columns, columns), without eigenpairs."""
        damping = self.lam * (matrix.T @ matrix)
        if self.rows is None or self._covariance_is_cheaper(matrix.shape[1]):
            return matrix.T @ (self.covariance @ matrix) + damping
        projected = self.rows @ matrix  # (N, columns)
        return projected.T @ projected + damping

    def _covariance_is_cheaper(self, columns: int) -> bool:
        """Whether C, formed first if it is not yet, takes fewer operations than the rows."""
        assert self.rows is not None
        count, each = len(self.rows), columns * (self.dim + columns)
        forming = 0 if "covariance" in self.__dict__ else count * self.dim**2
        return self.dim * each + forming < count * each


def decompose(
    weight: Tensor,
    input_root: DampedRoot,
    grad_root: DampedRoot,
    mode: Mode = "exact",
    objective: Objective = "tracin",
    max_rank: int | None = None,
) -> Directions:
    """Influence-preserving low-rank solutions of all ranks up to ``max_rank``.

    A layer whose observed inputs or gradients are all zero has no weighting to preserve: it gets
    plain SVD, and ``fallback`` of the result says so.

    Args:
        weight: W, (out, in).
        input_root: Moment of the layer's inputs, dim = in.
        grad_root: Moment of the gradients of its outputs, dim = out.
        mode: ``exact`` solves the damped problem. ``paper`` follows the paper's appendix F: both
            roots are cut to the spans of the probe rows, so what W does outside them is lost and
            no rank above the number of rows is reached.
        objective: ``tracin`` weights errors by the roots (Eq. 5), ``influence`` by their inverses
            (appendix E), which only mode ``exact`` can.
        max_rank: Number k of directions kept; min(out, in) when absent.

    Raises:
        NumericsError: W is not finite, shapes do not fit, or ``max_rank`` is out of range.
        ConfigError: Objective ``influence`` is asked of mode ``paper``.
    """
    weight, kept = _check(weight, max_rank)
    if weight.shape != (grad_root.dim, input_root.dim):
        raise NumericsError(
            "a weight does not fit its probe rows",
            value=tuple(weight.shape),
            allowed=(grad_root.dim, input_root.dim),
        )
    if mode == "paper" and objective == "influence":
        raise ConfigError(
            "objective influence needs the exact solution: it weights most what no probe row spans",
            where="proxy.objective, proxy.mode",
            value="objective influence with mode paper",
            fix="set proxy.mode to exact, or proxy.objective to tracin",
        )
    zero = [n for n, r in (("inputs", input_root), ("output gradients", grad_root)) if r.is_zero]
    if zero:
        return replace(plain_svd(weight, kept), fallback=f"{' and '.join(zero)} are all zero")
    if mode == "paper":
        return _core_directions(weight, input_root, grad_root, kept)
    if weight.shape[0] <= weight.shape[1]:
        return _left_form(weight, grad_root, input_root, objective, kept)
    return _transposed(_left_form(weight.T, input_root, grad_root, objective, kept))


def plain_svd(weight: Tensor, max_rank: int | None = None) -> Directions:
    """Nested truncated SVD of the weight itself, (out, in), which knows no data.

    Raises:
        NumericsError: W is not finite, or ``max_rank`` is out of range.
    """
    weight, kept = _check(weight, max_rank)
    if weight.shape[0] > weight.shape[1]:
        return _transposed(plain_svd(weight.T, kept))
    basis, singular, effective = _leading(weight @ weight.T, kept)
    basis = basis * _signs(basis)
    return Directions(basis, basis.T @ weight, singular, effective, "left")


def truncation_error(singular_values: Tensor, floor: float, rank: int) -> float:
    """‖S - S_r‖_F / ‖S‖_F of the solution of a rank, by Eckart & Young.

    Args:
        singular_values: Those of S, descending.
        floor: Norm of the part of S that no rank reaches.
        rank: r.
    """
    total = math.hypot(float(singular_values.norm()), floor)
    return math.hypot(float(singular_values[rank:].norm()), floor) / total if total else 0.0


def truncate(directions: Directions, rank: int, gauge: Gauge = "balanced") -> Factors:
    """Factors of one rank out of nested directions, in the given gauge.

    All gauges have the same product; they differ in how the factors share its scale, and with it in
    the gradients of the factors.

    Args:
        directions: Result of :func:`decompose` or :func:`plain_svd`.
        rank: From 1 to the number of directions.
        gauge: ``balanced`` as :func:`balance`; ``paper`` gives each factor the square roots of the
            singular values of S (components that are zero to rounding are set to zero).

    Raises:
        NumericsError: The rank is out of range.
    """
    available = directions.left.shape[1]
    if not 1 <= rank <= available:
        raise NumericsError(
            "a rank is out of range",
            value=rank,
            allowed=f"1 to {available}",
            fix="raise proxy.sparsity, or lower proxy.rank_multiple",
        )
    left, right = directions.left[:, :rank], directions.right[:rank]
    if gauge == "balanced":
        return balance(left, right)
    singular = directions.singular_values[:rank].to(left)
    kept = torch.arange(rank, device=left.device) < directions.rank_effective
    up = torch.where(kept, singular, 0).sqrt()
    down = torch.where(kept, 1 / up, 0)
    scale_left, scale_right = (up, down) if directions.form == "left" else (down, up)
    return Factors(left * scale_left, scale_right[:, None] * right)


def balance(left: Tensor, right: Tensor) -> Factors:
    """The same product with factors of equal scale: leftᵀ left = right rightᵀ, diagonal.

    In this gauge the gradients of the factors, and with them influence scores, do not depend on the
    scale of the loss the moments were measured with.

    Args:
        left: (out, rank), rank at most min(out, in).
        right: (rank, in).

    Returns:
        Factors in the dtype of ``left``; computed in float64.

    Raises:
        NumericsError: A factor is not finite.
    """
    left_unit, right_unit = _unit(left), _unit(right)  # else the product of large factors overflows
    basis_left, r_left = torch.linalg.qr(left.double() / left_unit)
    basis_right, r_right = torch.linalg.qr(right.double().T / right_unit)
    u, s, vh = torch.linalg.svd(r_left @ r_right.T)
    s = torch.where(s > len(s) * torch.finfo(s.dtype).eps * s[0], s, 0)  # zero columns stay zero
    root = s.sqrt() * (math.sqrt(left_unit) * math.sqrt(right_unit))
    new_left, new_right = basis_left @ (u * root), (root[:, None] * vh) @ basis_right.T
    signs = _signs(new_left)
    return Factors((new_left * signs).to(left.dtype), (signs[:, None] * new_right).to(left.dtype))


def symmetric_eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, largest first, and eigenvectors of a symmetric positive semidefinite matrix.

    Sides above ``FLOAT64_LIMIT`` are solved in float32 after division by the mean eigenvalue, so
    that squares of small gradients do not underflow, and the residual is checked.

    Args:
        matrix: (n, n), float64.

    Returns:
        Values (n,), rounding below zero cut off, and vectors (n, n), both float64.

    Raises:
        NumericsError: The matrix is not finite, the solver does not converge, or it is too
            inaccurate in float32.
    """
    side = len(matrix)
    scale = float(matrix.trace()) / side
    if not math.isfinite(scale):
        raise NumericsError("a second moment is not finite", value=f"trace {scale * side}")
    if scale <= 0:
        return matrix.new_zeros(side), torch.eye(side).to(matrix)
    scaled = (matrix / scale).to(_eigen_dtype(side))
    try:
        values, vectors = torch.linalg.eigh(scaled)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise NumericsError("an eigendecomposition failed", value=str(error)) from None
    if side > FLOAT64_LIMIT:
        residual = float((scaled @ vectors - vectors * values).norm() / scaled.norm())
        if not residual <= RESIDUAL_LIMIT:
            raise NumericsError(
                "an eigendecomposition in float32 is too inaccurate",
                value=f"relative residual {residual:.1e} of a matrix of side {side}",
                allowed=f"at most {RESIDUAL_LIMIT:.0e}",
                fix="raise proxy.damping",
            )
    return values.flip(0).clamp(min=0).double() * scale, vectors.flip(1).double()


def _left_form(
    weight: Tensor, root: DampedRoot, other: DampedRoot, objective: Objective, kept: int
) -> Directions:
    """Exact solution from the side of W's rows, the smaller one; ``other`` weights its columns."""
    factor = root.cholesky
    if objective == "tracin":
        weighted = factor.T @ weight  # (out, in)
        basis, singular, effective = _leading(other.quadratic(weighted.T), kept)
        left = torch.linalg.solve_triangular(factor.T, basis, upper=True)
    else:
        weighted = torch.linalg.solve_triangular(factor, weight, upper=False)
        basis, singular, effective = _leading(weighted @ other.power(weighted.T, -1), kept)
        left = factor @ basis
    signs = _signs(left)
    return Directions(left * signs, (basis * signs).T @ weighted, singular, effective, "left")


def _core_directions(
    weight: Tensor, input_root: DampedRoot, grad_root: DampedRoot, kept: int
) -> Directions:
    """Solution on the probe spans (arXiv:2602.17835, appendix F), padded with zeros to ``kept``."""
    u_x, u_d = input_root.vectors, grad_root.vectors
    root_x, root_d = input_root.root_values, grad_root.root_values
    core = root_d[:, None] * (u_d.T @ weight @ u_x) * root_x  # (k_d, k_x)
    inner = plain_svd(core, min(kept, *core.shape))
    effective = min(inner.rank_effective, kept)
    left = u_d @ (inner.left / root_d[:, None])
    right = (inner.right / root_x) @ u_x.T
    # ‖S‖² = tr(Wᵀ (C_d + λ_d I) W (C_x + λ_x I)), with the parts of S outside the spans
    total = (grad_root.apply_moment(weight) * input_root.apply_moment(weight.T).T).sum()
    floor = math.sqrt(max(0.0, float(total - inner.singular_values.square().sum())))
    singular = weight.new_zeros(min(weight.shape))
    singular[: len(inner.singular_values)] = inner.singular_values
    return Directions(
        _padded(left[:, :effective], (len(left), kept)),
        _padded(right[:effective], (kept, right.shape[1])),
        singular,
        inner.rank_effective,
        inner.form,
        floor,
    )


def _leading(gram: Tensor, kept: int) -> tuple[Tensor, Tensor, int]:
    """Leading left singular vectors of S, all its singular values, and how many are not rounding.

    Args:
        gram: S Sᵀ.
        kept: Number of vectors.
    """
    values, vectors = symmetric_eigen((gram + gram.T) / 2)
    singular = values.sqrt()
    # values carry an error of a few eps of the largest, singular values the root of that
    zero = 1e-7 if len(gram) <= FLOAT64_LIMIT else 1e-3
    effective = int((singular > zero * singular[0]).sum())
    return vectors[:, :kept], singular, effective


def _transposed(directions: Directions) -> Directions:
    """Solutions for W from those for Wᵀ."""
    form: Literal["left", "right"] = "right" if directions.form == "left" else "left"
    return replace(directions, left=directions.right.T, right=directions.left.T, form=form)


def _check(weight: Tensor, max_rank: int | None) -> tuple[Tensor, int]:
    """The weight in float64 and the number of directions to keep."""
    if not bool(weight.isfinite().all()):
        raise NumericsError(
            "a weight is not finite",
            value=f"{int((~weight.isfinite()).sum())} of {weight.numel()} values",
            fix="check the warm-up's loss for divergence",
        )
    limit = min(weight.shape)
    kept = limit if max_rank is None else max_rank
    if not 1 <= kept <= limit:
        raise NumericsError("a rank is out of range", value=kept, allowed=f"1 to {limit}")
    return weight.double(), kept


def _absolute(damping: float, mode: DampingMode, mean_eigenvalue: float) -> float:
    """λ in the units of the second moment."""
    return damping * mean_eigenvalue if mode == "relative" else damping


def _n_resolved(values: Tensor, dim: int) -> int:
    """Number of leading eigenvalues that stand out of the rounding of the solver."""
    eps = torch.finfo(_eigen_dtype(len(values))).eps
    return int((values > max(len(values), dim) * eps * values[0]).sum())


def _eigen_dtype(side: int) -> torch.dtype:
    return torch.float64 if side <= FLOAT64_LIMIT else torch.float32


def _unit(factor: Tensor) -> float:
    """An even power of two near the largest entry: division by it and its root round nothing.

    Raises:
        NumericsError: The factor is not finite.
    """
    largest = float(factor.abs().max())
    if not math.isfinite(largest):
        raise NumericsError(
            "a factor is not finite, so it cannot be balanced",
            value=f"{int((~factor.isfinite()).sum())} of {factor.numel()} entries",
            fix="lower the learning rate of what trained it",
        )
    _, exponent = math.frexp(largest)
    return math.ldexp(1.0, max(exponent // 2 * 2 - 2, -1022)) if largest else 1.0


def _signs(columns: Tensor) -> Tensor:
    """±1 per column, so that its largest entry times the sign is positive: equal on any machine."""
    largest = columns.gather(0, columns.abs().argmax(dim=0, keepdim=True))[0]
    return torch.where(largest < 0, -1.0, 1.0).to(columns)


def _padded(matrix: Tensor, shape: tuple[int, int]) -> Tensor:
    """The matrix with zeros to the right and below."""
    padded = matrix.new_zeros(shape)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded
