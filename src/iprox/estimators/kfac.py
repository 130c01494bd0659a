"""K-FAC: query gradients times the inverse of a Kronecker-factored Fisher matrix.

Layer by layer ``Q_S [ (Q_S^T V Q_A) / (n s a^T + l) ] Q_A^T``, with the eigenvectors Q and
eigenvalues a, s of the second moments of inputs and output gradients, n tokens per example and
damping l (Martens and Grosse, arXiv:1503.05671; as an influence function in IProX,
arXiv:2602.17835, section 5).
"""

from __future__ import annotations

from torch import Tensor

from iprox.estimators import Preconditioner
from iprox.models.device import pick_device
from iprox.numerics.kfac import Damping
from iprox.stages.curvature_store import CurvatureStore, open_curvature
from iprox.store.job import Job
from iprox.study.schema import CurvatureSection


def preconditioner(job: Job) -> Preconditioner:
    """Solves with the eigenvalues of the factors."""
    return solver(job, open_curvature(job.parents["curvature"]))


def solver(job: Job, curvature: CurvatureStore) -> Preconditioner:
    """Solves with a stored curvature and the job's damping."""
    section = job.section(CurvatureSection, "curvature")
    damping, device = Damping(section.damping, section.damping_mode), pick_device()

    def solve(layer: str, gradients: Tensor) -> tuple[Tensor, float]:
        of_layer = curvature.layer(layer, device)
        return of_layer.solve(gradients.to(device), damping), of_layer.damping(damping)

    return solve
