"""DataInf: an inverse Fisher matrix by swapping the mean over examples with the inverse."""

from __future__ import annotations

from torch import Tensor

from iprox.errors import NumericsError


def swapped_inverse_weights(dots: Tensor, squared_norms: Tensor, damping: float) -> Tensor:
    """Weights of the examples' gradients in DataInf's solution (arXiv:2310.00902, Eq. 5).

    ``H^-1 v ~ 1/n sum_i (g_i g_i^T + l I)^-1 v = v / l + sum_i w_i g_i`` with, by Sherman and
    Morrison, ``w_i = -<g_i, v> / (n l (l + |g_i|^2))``. Exact for one example.

    Args:
        dots: <g_i, v>, (examples, queries).
        squared_norms: |g_i|^2, (examples,).
        damping: l, above 0.

    Returns:
        w, (queries, examples).

    Raises:
        NumericsError: The damping is not a finite number above 0.
    """
    if not 0 < damping < float("inf"):
        raise NumericsError(
            "DataInf needs damping: its solution begins with v / damping",
            value=damping,
            allowed="a finite number above 0",
            fix="raise curvature.damping, or exclude layers without gradients in proxy.layers",
        )
    return -(dots.mT / (damping + squared_norms)) / (len(dots) * damping)
