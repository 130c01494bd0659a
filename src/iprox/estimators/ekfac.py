"""EK-FAC: K-FAC with the eigenvalues measured anew in its eigenbases.

Layer by layer ``Q_S [ (Q_S^T V Q_A) / (Lambda + l) ] Q_A^T`` with
``Lambda = E[(Q_S^T G Q_A)^2]``, a mean over examples' gradients G (George et al.,
arXiv:1806.03884; for language models Grosse et al., arXiv:2308.03296).
"""

from __future__ import annotations

from iprox.estimators import Preconditioner
from iprox.estimators.kfac import solver
from iprox.stages.curvature_store import open_curvature
from iprox.store.job import Job


def preconditioner(job: Job) -> Preconditioner:
    """Solves with the corrected eigenvalues."""
    return solver(job, open_curvature(job.parents["curvature"], job.parents["eigenvalues"]))
