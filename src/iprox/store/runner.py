"""Runs one stage: reuses its outputs if they were made before, else makes them; then records them.

Outputs are made in a scratch folder inside the content store, digested, renamed to their key,
and hard-linked into the artifact's folder, the manifest last. The key is a digest of the
stage's parameters, its code, its parents' *contents* and the versions of the numeric
libraries, so a stage that is run again after an upstream change without consequences costs a
few links. Kill it anywhere: what is not renamed does not exist, and what is not in a manifest
is not finished.
"""

from __future__ import annotations

import errno
import fcntl
import importlib.metadata
import json
import logging
import os
import platform
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import iprox
from iprox.errors import ArtifactError
from iprox.logs import log_to
from iprox.progress import loops, throughput
from iprox.store.job import Job, Metrics
from iprox.store.manifest import (
    MANIFEST,
    PROVENANCE,
    SPEC,
    Manifest,
    check,
    describe,
    digest_json,
    dump_json,
    list_files,
    problems,
    read_manifest,
)

log = logging.getLogger(__name__)

Make = Callable[[Job], Metrics]

NUMERIC_LIBRARIES = ("torch", "transformers", "numpy", "tokenizers")
SHARD = "shard.zarr"
OWNER_WRITES = stat.S_IRUSR | stat.S_IWUSR | stat.S_IRGRP | stat.S_IROTH
"""Mode of outputs. Snakemake refuses to rerun a job whose outputs their owner cannot write to; what
is edited in place all the same is found by its digest before it is used."""

OF_GROUP = stat.S_IRWXG | stat.S_ISGID
"""What of the store's mode its group may do with every result; ``S_ISGID`` keeps the group."""

RATE = "_per_s"
"""How the names of metrics end that are rates."""


@dataclass(frozen=True)
class Request:
    """What the workflow asks for.

    Attributes:
        spec: ``{"id", "stage", "params", "parents"}`` of the stage.
        code: Digest of the stage's code.
        parents: Role -> folder of the parent artifact.
        folder: Where the artifact goes.
        store: The content store.
        data_dir: Folder that paths in the study are relative to.
        shard: Number of this shard and how many there are, for a stage cut into shards.
        gpus: GPUs of the job.
    """

    spec: Mapping[str, Any]
    code: str
    parents: Mapping[str, Path]
    folder: Path
    store: Path
    data_dir: Path
    shard: tuple[int, int] | None = None
    gpus: int = 1

    @property
    def prefix(self) -> str:
        """What this job's own describing files are called: a shard has its own manifest."""
        return "" if self.shard is None else f"shard-{self.shard[0]:05d}."


def run_rule(rule: Any, make: Make) -> None:
    """Run a stage from a workflow rule.

    Args:
        rule: The object that the workflow injects into its scripts: ``input`` (parents'
            manifests by role), ``output.manifest``, ``params`` (``spec``, ``code``, ``parents``,
            ``shards``), ``config``, ``log``, ``resources``, ``threads``, ``wildcards``.
        make: The stage function.
    """
    spec = rule.params.spec
    label = f"{spec['stage']} {spec['id'].rsplit('-', 1)[0]}"
    with log_to(rule.log[0], label):
        gpus = int(getattr(rule.resources, "gpu", 0))
        if "torch" in sys.modules:  # a stage that does not use torch does not wait for it
            import torch

            from iprox.models.device import claim_gpus, set_threads

            set_threads(rule.threads)
            if gpus:
                claim_gpus(gpus, torch.cuda.device_count())
            gpus = gpus if torch.cuda.is_available() else 1
        folder = Path(rule.output.manifest).parent
        shard = getattr(rule.wildcards, "shard", None)
        run_stage(
            make,
            Request(
                spec=spec,
                code=rule.params.code,
                parents={role: Path(path).parent for role, path in rule.params.parents.items()},
                folder=folder,
                store=folder.parent.parent / ".objects",
                data_dir=Path(rule.config.get("data_dir") or "."),
                shard=None if shard is None else (int(shard), int(rule.params.shards)),
                gpus=max(1, gpus),
            ),
        )


def run_stage(make: Make, request: Request) -> Path:
    """Bring one artifact into being.

    Returns:
        The path of its manifest.

    Raises:
        ArtifactError: A parent is corrupted, or the stage wrote nothing.
    """
    contents = {role: check(folder).content for role, folder in sorted(request.parents.items())}
    rows = None if request.shard is None else _shard_rows(request)
    key = digest_json(
        {
            "code": request.code,
            "contents": contents,
            "inputs": _raw_inputs(request),
            "params": request.spec["params"],
            "rows": rows,
            "stage": request.spec["stage"],
            "versions": versions(NUMERIC_LIBRARIES),
        }
    )
    kept = request.store / key[:2] / key
    if not _usable(kept):
        _make(make, request, rows, kept)
    else:
        log.info("nothing to compute: equal inputs, parameters and code gave this before")
    return _place(kept, request)


def _make(make: Make, request: Request, rows: tuple[int, int] | None, kept: Path) -> None:
    """Run the stage in a scratch folder and rename the result to its key."""
    request.store.mkdir(parents=True, exist_ok=True)
    with suppress(FileExistsError):
        kept.parent.mkdir()
        _share(kept.parent, request.store)
    scratch = Path(tempfile.mkdtemp(prefix=f".tmp-{kept.name[:12]}-", dir=kept.parent))
    try:
        with _progress_folder(kept) as progress:
            out = _compute(make, request, rows, scratch, progress)
            _share(out, request.store)
            try:
                out.rename(kept)
            except OSError:
                if not _usable(kept):
                    raise
                log.info("another job finished the same computation first; its result is used")
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _compute(
    make: Make,
    request: Request,
    rows: tuple[int, int] | None,
    scratch: Path,
    progress: Path | None,
) -> Path:
    """Run the stage and write its manifest and provenance; the folder of its outputs."""
    out = scratch / "out"
    out.mkdir()
    job = Job(
        stage=request.spec["stage"],
        params=request.spec["params"],
        parents=dict(request.parents),
        out=out,
        rows=rows,
        data_dir=request.data_dir,
        cache_dir=request.store.parent / ".cache",
        strict=True,
        progress=progress,
        gpus=request.gpus,
    )
    _watch_device_memory()
    start = time.monotonic()
    with loops() as ended:
        metrics = make(job)
    seconds = time.monotonic() - start
    metrics = {**throughput(ended), **metrics}
    if request.shard is not None:
        (out / SHARD).rename(out / f"shard-{request.shard[0]:05d}.zarr")
    manifest = describe(job.stage, out)
    if not manifest.files:
        raise ArtifactError("a stage finished without writing anything", where=job.stage)
    (out / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    (out / PROVENANCE).write_text(
        dump_json(provenance(request, metrics, seconds)), encoding="utf-8"
    )
    _flush(out)
    return out


@contextmanager
def _progress_folder(kept: Path) -> Iterator[Path | None]:
    """What this user's killed job left for its next attempt, of equal inputs, parameters, code.

    Two checkouts may compute the same at once: the folder is the first one's, locked, and the
    other starts anew and keeps nothing. It is removed when the computation is finished.

    Yields:
        The folder; None while another job has it.
    """
    folder = kept.with_name(f".tmp-progress-{os.getuid()}-{kept.name}")
    folder.mkdir(exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("another job is at the same computation: this one keeps no checkpoints")
            yield None
            return
        try:
            yield folder
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            with suppress(OSError):  # something was kept
                folder.rmdir()
    finally:
        os.close(handle)


def _share(folder: Path, store: Path) -> None:
    """Let the group do with a folder and all in it what it may do with the store.

    Whatever this user's umask: otherwise the next user could neither read a result, nor put one
    beside it, nor replace it when it is damaged.
    """
    allowed = store.stat().st_mode & OF_GROUP
    for parent, _, names in os.walk(folder):
        inside = Path(parent)
        inside.chmod(stat.S_IMODE(inside.stat().st_mode) | allowed)
        for name in names:
            path = inside / name
            path.chmod(stat.S_IMODE(path.stat().st_mode) | allowed & stat.S_IRGRP)


def _usable(kept: Path) -> bool:
    """Whether a result is in the store, whole. A damaged one is removed, so that it is remade."""
    if not kept.is_dir():
        return False
    try:
        wrong = problems(kept, read_manifest(kept / MANIFEST))
    except ArtifactError as error:
        wrong = [str(error)]
    if wrong:
        log.warning("a kept result is damaged and will be made again: %s", wrong[0])
        shutil.rmtree(kept)
        return False
    return True


def _place(kept: Path, request: Request) -> Path:
    """Link a result into the artifact's folder: files, provenance, spec, and the manifest last."""
    folder, prefix = request.folder, request.prefix
    folder.mkdir(parents=True, exist_ok=True)
    manifest_path = folder / f"{prefix}{MANIFEST}"
    manifest_path.unlink(missing_ok=True)
    wanted = read_manifest(kept / MANIFEST).files
    for name in _own_files(folder, request):
        if name not in wanted:
            (folder / name).unlink()
    for name in wanted:
        _link(kept / name, folder / name)
    _write(folder / f"{prefix}{PROVENANCE}", (kept / PROVENANCE).read_text(encoding="utf-8"))
    _write(folder / f"{prefix}{SPEC}", dump_json(dict(request.spec)))
    _write(manifest_path, (kept / MANIFEST).read_text(encoding="utf-8"))
    return manifest_path


def _own_files(folder: Path, request: Request) -> list[str]:
    """Files in the artifact's folder that this job is responsible for."""
    files = list_files(folder)
    if request.shard is None:
        return files
    return [name for name in files if name.startswith(f"shard-{request.shard[0]:05d}.zarr/")]


def _link(source: Path, target: Path) -> None:
    """Hard-link a file into place with a new time, so that it counts as made now.

    A store shared between users or file systems holds files that cannot be linked: those of
    another owner (Linux refuses that, `fs.protected_hardlinks`) or device. They are copied.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
        target.chmod(OWNER_WRITES)
        os.utime(target)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES, errno.EXDEV):
            raise
        target.unlink(missing_ok=True)
        shutil.copyfile(source, target)
        target.chmod(OWNER_WRITES)


def _write(path: Path, text: str) -> None:
    """Write a small file beside its place and rename it in."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _flush(folder: Path) -> None:
    """Ask the operating system to put everything under ``folder`` on the disk."""
    for parent, _, names in os.walk(folder):
        for name in names:
            with (Path(parent) / name).open("rb") as stream:
                os.fsync(stream.fileno())


def _shard_rows(request: Request) -> tuple[int, int]:
    """First and one-past-last row of this shard; shards differ by at most one row."""
    from iprox.store.tables import count_rows

    assert request.shard is not None
    number, total = request.shard
    if "split" in request.parents:
        n_rows = count_rows(request.parents["split"] / "split.parquet")
    else:
        n_rows = count_rows(request.parents["pool"] / "pool.parquet")
    return n_rows * number // total, n_rows * (number + 1) // total


def _raw_inputs(request: Request) -> dict[str, str]:
    """Digests of the files outside ``results/`` that a stage reads: its code key sees edits."""
    from iprox.store.inputs import raw_input_digests

    return raw_input_digests(request.spec["params"], request.data_dir)


def gather_rule(rule: Any) -> None:
    """Join the shards of a stage: one manifest over all of them.

    Args:
        rule: As in :func:`run_rule`; ``input`` are the shards' manifests, in order.
    """
    spec = rule.params.spec
    with log_to(rule.log[0], f"{spec['stage']} {spec['id'].rsplit('-', 1)[0]}"):
        gather(Path(rule.output.manifest).parent, [Path(p) for p in rule.input], spec)


def gather(folder: Path, shards: list[Path], spec: Mapping[str, Any]) -> None:
    """Write the manifest of a stage made of shards, and remove shards of an older cut.

    Raises:
        ArtifactError: A shard is corrupted.
    """
    parts = [read_manifest(path) for path in shards]
    files = {name: entry for part in parts for name, entry in part.files.items()}
    manifest = Manifest(spec["stage"], files)
    wrong = problems(folder, manifest)
    if wrong:
        raise ArtifactError(f"{len(wrong)} files of the shards are wrong", where=wrong[0])
    keep = {path.name.removesuffix(f".{MANIFEST}") for path in shards}
    for path in sorted(folder.glob("shard-*")):
        if path.name.split(".")[0] not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    made = [
        json.loads(p.with_name(p.name.replace(MANIFEST, PROVENANCE)).read_text()) for p in shards
    ]
    _write(folder / PROVENANCE, dump_json(_joined(made)))
    _write(folder / SPEC, dump_json(dict(spec)))
    _write(folder / MANIFEST, manifest.to_json())


def _joined(made: list[dict[str, Any]]) -> dict[str, Any]:
    """Provenance of a whole: counts are summed, rates averaged over time, peaks the largest."""
    metrics: dict[str, Any] = {}
    for part in made:
        for name, value in part["metrics"].items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                weight = part["metrics"].get("loop_s", 0) if name.endswith(RATE) else 1
                metrics[name] = metrics.get(name, 0) + value * weight
            else:
                metrics[name] = value
    if metrics.get("loop_s"):
        rates = {n: round(v / metrics["loop_s"], 3) for n, v in metrics.items() if n.endswith(RATE)}
        metrics |= rates
    peaks = {n for part in made for n in part if n.startswith("peak_")}
    return {
        **made[0],
        "metrics": metrics,
        **{name: max(part.get(name, 0) for part in made) for name in peaks},
        "seconds": round(sum(part["seconds"] for part in made), 3),
        "shards": len(made),
    }


def provenance(request: Request, metrics: Metrics, seconds: float) -> dict[str, Any]:
    """How a result came about. Differs between runs, so it is no part of any digest."""
    return {
        "code": request.code,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "git_revision": _git_revision(),
        "host": {
            "cpus": os.cpu_count(),
            "device": _device(),
            "machine": platform.machine(),
            "threads": _threads(),
        },
        "metrics": metrics,
        "peak_memory_bytes": _peak_memory(),
        **_peak_device_memory(),
        "seconds": round(seconds, 3),
        "versions": {"iprox": iprox.__version__, "python": platform.python_version()}
        | versions((*NUMERIC_LIBRARIES, "safetensors", "zarr", "pyarrow", "pandas", "datasets")),
    }


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Installed versions, without build labels such as ``+cpu``."""
    return {name: importlib.metadata.version(name).split("+")[0] for name in packages}


def _peak_memory() -> int:
    """Largest resident size of this process so far, in bytes.

    On Linux of the program that runs now; ``getrusage`` would count the one that started it.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _watch_device_memory() -> None:
    """Let the peak of the device's memory begin now."""
    if _on_cuda():
        import torch

        torch.cuda.reset_peak_memory_stats()


def _peak_device_memory() -> dict[str, int]:
    """Most memory that tensors took on the CUDA device, in bytes; nothing without one."""
    if not _on_cuda():
        return {}
    import torch

    return {"peak_device_memory_bytes": int(torch.cuda.max_memory_allocated())}


def _on_cuda() -> bool:
    if "torch" not in sys.modules:
        return False
    from iprox.models.device import pick_device

    return pick_device().type == "cuda"


def _threads() -> int:
    """CPU threads the stage computed with."""
    if "torch" not in sys.modules:
        return 1
    import torch

    return torch.get_num_threads()


def _device() -> str:
    """Name of the device the stage ran on."""
    if "torch" not in sys.modules:
        return "cpu"
    from iprox.models.device import pick_device

    device = pick_device()
    if device.type != "cuda":
        return device.type
    import torch

    return torch.cuda.get_device_name(device)


def _git_revision() -> str | None:
    """Revision of the checkout the code runs from, or None for an installed package."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "rev-parse", "HEAD"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()
