"""What is done to query gradients before the pool is scored against them, a file each.

A score is ``<P g(query), g(example)>``; an estimator is P. It never sees the pool. A file holds
one function, ``preconditioner(job)``, and its name is registered in :mod:`iprox.study.estimators`
with the parents that the function reads.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Preconditioner = Callable[[str, Tensor], tuple[Tensor, float]]
"""Called once for every layer with its name and query gradients (groups, out, in); returns P times
them, and the damping of this layer as a number. One that passes texts has an attribute ``metrics``
with their counts and FLOPs, for provenance; one whose directions are for another model than the
query's has an attribute ``about`` with what the direction's root attributes say instead."""
