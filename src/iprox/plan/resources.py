"""What a job asks of a scheduler: memory, the GPU's memory and minutes, from one formula.

Memory and operations are those that ``iprox cost`` predicts (:mod:`iprox.plan.estimate`), from the
sizes of the model, the lengths of the texts and the tokens of a batch. Every request grows in
proportion to the attempt, so that a job killed for want of something is retried with more of it.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from iprox.errors import ConfigError, ModelError
from iprox.numerics.ranks import Architecture
from iprox.plan.encoders import sizes_of
from iprox.plan.estimate import (
    ENCODERS,
    LONGEST,
    PROCESS,
    TRAININGS,
    Estimator,
    Need,
    needs_model,
)
from iprox.plan.forecast import Rates
from iprox.plan.nodes import Node
from iprox.plan.sizes import find_architecture
from iprox.plan.volumes import CHARACTERS_PER_TOKEN, TOKENS, Volumes, target_of
from iprox.store.inputs import locate

MEGABYTE = 2**20

LEAST_MB = 1000
"""Least main memory: Snakemake and its script take half of it before the stage begins."""

BYTES_PER_EXAMPLE = {"pool": 8000, "report": 2000, "selection": 2000}
"""Main memory per pool example of stages that hold texts."""

CUDA_HOST = 3_000_000_000
"""Main memory of a process with CUDA's libraries, besides the weights it loads."""

UNKNOWN_POOL = 50_000
"""Examples of a pool whose size nothing tells before it is read."""

UNKNOWN_MODEL = Architecture(
    hidden=4096, blocks=32, ff=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256, tied=False
)
"""Sizes that are asked for while a model's are not known, because it is not downloaded yet:
those of a model of 8 billion parameters."""

RATES = {
    True: Rates(5e12, "assumed of a GPU", per_kind={False: 5e10}),
    False: Rates(2e10, "assumed of a core", per_kind={False: 2e9}),
}
"""By whether it is a GPU's: the speed that time limits rest on, far less than what is reached; of
eigensolvers the second number."""

SOLVERS = {"decomposition", "direction"}
"""Stages that pass no text through a model and yet compute on its device."""

TIME_FACTOR = 3
START_MIN = 10
STEP_MIN = 10
"""Minutes of a job: a multiple of the predicted time, a start, and rounded up to whole steps."""


def has_gpu() -> bool:
    """Whether this machine has a GPU of CUDA's; asked without loading its libraries."""
    return Path("/dev/nvidia0").exists()


@dataclass(frozen=True)
class Request:
    """What one job asks for at its first attempt.

    Attributes:
        mem_mb: Main memory.
        gpu_mem_mb: Memory of a GPU; 0 for a stage that needs none.
        runtime: Minutes after which the scheduler may end it.
    """

    mem_mb: int
    gpu_mem_mb: int
    runtime: int

    def times(self, attempt: int) -> Request:
        """What the attempt of this number asks for."""
        return Request(self.mem_mb * attempt, self.gpu_mem_mb * attempt, self.runtime * attempt)


@dataclass
class Requests:
    """Requests of all stages of a plan, each worked out once.

    Attributes:
        data_dir: Folder that the study's paths are relative to.
        root: The folder that holds ``results``.
        train_gpus: GPUs that a training is spread over, where there are any.
    """

    data_dir: Path
    root: Path = field(default_factory=Path)
    train_gpus: int = 1
    _made: dict[tuple[str, str, bool], Request] = field(default_factory=dict)
    _estimators: dict[tuple[str, str, bool, float | None], Estimator] = field(default_factory=dict)

    def of(self, node: Node, on_gpu: bool) -> Request:
        """The request of one job of a stage: a shard, if it is cut into shards.

        Args:
            node: The stage.
            on_gpu: Whether jobs with a model run on GPUs.
        """
        key = (node.stage, node.id, on_gpu)
        if key not in self._made:
            self._made[key] = self._work_out(node, on_gpu)
        return self._made[key]

    def _work_out(self, node: Node, on_gpu: bool) -> Request:
        jobs = node.shards * (self._gpus(node) if on_gpu else 1)
        seconds = RATES[on_gpu].seconds(node, self._need(node, on_gpu)) / jobs
        minutes = START_MIN + TIME_FACTOR * seconds / 60
        uses_gpu = on_gpu and uses_device(node)
        need = self._need(node, on_gpu, longest=uses_gpu)
        memory = self._host_memory(node) if uses_gpu else need.memory
        memory = max(memory, BYTES_PER_EXAMPLE.get(node.stage, 0) * self._examples(node))
        return Request(
            mem_mb=max(LEAST_MB, _round_up(memory / MEGABYTE, 100)),
            gpu_mem_mb=_round_up(need.memory / MEGABYTE, 1000) if uses_gpu else 0,
            runtime=_round_up(minutes, STEP_MIN),
        )

    def _need(self, node: Node, on_gpu: bool, longest: bool = False) -> Need:
        """What a stage takes; with ``longest``, where every text is as long as it may be.

        Nothing but more memory helps a job that meets the longest text on a GPU; on a CPU short
        texts are counted on, because its memory is shared with other jobs.
        """
        target = target_of(node)
        if target is None and node.stage not in ENCODERS:
            return Need()
        length = node.params.get("chat", {}).get("max_length", 0) / LONGEST if longest else 0
        return self._estimator(target, node, on_gpu, length or None).need(node)

    def _host_memory(self, node: Node) -> float:
        """Main memory of a job whose model is on a GPU.

        The weights in float32 pass through it, and so does what is gathered before it is
        written: what the same job would need on a CPU beyond the part that is on the GPU. Where
        a training is spread, each process reads the weights.
        """
        if node.stage in ENCODERS:
            weights = 4.0 * sizes_of(node).parameters
        else:
            weights = 4.0 * self._estimator(target_of(node), node, True, None).parameters
        on_disk = self._need(node, True).disk / node.shards
        processes = self._gpus(node)
        return processes * (PROCESS + CUDA_HOST + weights) + min(on_disk, weights)

    def _gpus(self, node: Node) -> int:
        """GPUs of one job."""
        return self.train_gpus if node.stage in TRAININGS else 1

    def _estimator(
        self, target: Node | None, node: Node, on_gpu: bool, length: float | None
    ) -> Estimator:
        pool = _pool_of(node)
        key = ("" if target is None else target.id, "" if pool is None else pool.id, on_gpu, length)
        if key not in self._estimators:
            arch = UNKNOWN_MODEL
            if target is not None:  # an encoder has none
                with suppress(ModelError):
                    arch, _ = find_architecture(target, self.data_dir, self.root)
            sizes = {} if pool is None else {pool.id: self._size(pool)}
            self._estimators[key] = Estimator(
                arch, Volumes([], sizes, length), on_gpu, self.train_gpus
            )
        return self._estimators[key]

    def _examples(self, node: Node) -> int:
        pool = _pool_of(node)
        return 0 if pool is None else self._size(pool)

    def _size(self, pool: Node) -> int:
        """Examples of a pool: as the study or its name says, else guessed from the file."""
        try:
            return Volumes([]).pool(pool)
        except ConfigError:
            path = pool.params["pool"]["path"]
            if path is None:
                return UNKNOWN_POOL
        found = locate(path, self.data_dir)
        files = [p for p in found.rglob("*") if p.is_file()] if found.is_dir() else [found]
        size = sum(file.stat().st_size for file in files)
        return max(1, size // (TOKENS * CHARACTERS_PER_TOKEN))


def uses_device(node: Node) -> bool:
    """Whether a stage's job computes on a GPU when there is one."""
    return needs_model(node) or node.stage in SOLVERS


def _pool_of(node: Node) -> Node | None:
    """The pool among a stage's ancestors, or the stage itself."""
    if node.stage == "pool":
        return node
    found = (_pool_of(parent) for parent in node.parents.values())
    return next((pool for pool in found if pool is not None), None)


def _round_up(value: float, step: int) -> int:
    return math.ceil(value / step) * step
