"""Nothing read from disk can run, and nothing secret is written to it."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from iprox.cli.artifact import open_artifact
from iprox.data.pools import read_rows
from iprox.errors import IproxError
from iprox.logs import log_to
from iprox.models.load import load_weights
from iprox.store.manifest import read_manifest
from iprox.study.load import read_yaml

ROOT = Path(__file__).parents[1]
SOURCES = [
    *sorted((ROOT / "src").rglob("*.py")),
    *sorted((ROOT / "workflow").rglob("*.py")),
    *sorted((ROOT / "envs").glob("*.py")),
]

FORBIDDEN = {
    "cloudpickle",
    "dill",
    "eval",
    "exec",
    "joblib.load",
    "marshal.loads",
    "os.popen",
    "os.system",
    "pd.read_pickle",
    "pickle.load",
    "pickle.loads",
    "torch.save",
    "yaml.full_load",
    "yaml.unsafe_load",
}


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of a called name; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def calls(path: Path) -> Iterator[tuple[str, dict[str, ast.expr], list[ast.expr]]]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            words = {k.arg: k.value for k in node.keywords if k.arg}
            yield dotted(node.func), words, node.args


def is_true(value: ast.expr | None) -> bool:
    return isinstance(value, ast.Constant) and value.value is True


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_source_calls_what_runs_data(path: Path) -> None:
    for name, words, args in calls(path):
        assert name not in FORBIDDEN, name
        if name == "torch.load":
            assert is_true(words.get("weights_only")), "torch.load needs weights_only=True"
        if name in ("np.load", "numpy.load"):
            assert not is_true(words.get("allow_pickle"))
        if name == "yaml.load":
            loader = words.get("Loader") or args[1]
            assert dotted(loader).endswith(("SafeLoader", "_PlainLoader", "_StudyLoader"))
        if name.startswith("subprocess."):
            assert not is_true(words.get("shell"))


def test_rules_run_scripts_and_no_shell_commands() -> None:
    for path in (ROOT / "workflow" / "rules").glob("*.smk"):
        assert "shell:" not in path.read_text()
        assert "run:" not in path.read_text().split()


def test_remote_code_is_off_unless_a_study_asks() -> None:
    from iprox.study.schema import TargetSection

    assert TargetSection().trust_remote_code is False
    for path in SOURCES:
        for _, words, _ in calls(path):
            value = words.get("trust_remote_code")
            assert value is None or not is_true(value), path


# --- readers of artifacts and inputs, given anything ------------------------------------------


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def weights(folder: Path, data: bytes) -> Any:
    (folder / "model.safetensors").write_bytes(data)
    return load_weights(folder)


def index_of_weights(folder: Path, data: bytes) -> Any:
    (folder / "model.safetensors.index.json").write_bytes(data)
    return load_weights(folder)


def manifest(folder: Path, data: bytes) -> Any:
    (folder / "manifest.json").write_bytes(data)
    return read_manifest(folder / "manifest.json")


def spec(folder: Path, data: bytes) -> Any:
    (folder / "spec.json").write_bytes(data)
    return open_artifact(folder)


def study(folder: Path, data: bytes) -> Any:
    (folder / "study.yaml").write_bytes(data)
    return read_yaml(folder / "study.yaml")


def pool(suffix: str) -> Callable[[Path, bytes], Any]:
    def read(folder: Path, data: bytes) -> Any:
        (folder / f"pool{suffix}").write_bytes(data)
        return read_rows(folder / f"pool{suffix}")

    return read


READERS = {
    "weights": weights,
    "index of weights": index_of_weights,
    "manifest": manifest,
    "spec": spec,
    "study": study,
    **{f"pool{suffix}": pool(suffix) for suffix in (".jsonl", ".json", ".csv", ".parquet")},
}
SEEDS = [b"", b"{}", b"[]", b"null", b'{"files": {}}', b"PAR1PAR1", b"a: b", b"\x00" * 16, b"\xff"]


@pytest.mark.parametrize("reader", READERS)
@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.one_of(st.binary(max_size=200), st.sampled_from(SEEDS), st.text(max_size=80)))
def test_readers_given_any_bytes_read_them_or_say_what_is_wrong(
    tmp_path: Path, reader: str, data: bytes | str
) -> None:
    raw = data.encode("utf-8", "surrogatepass") if isinstance(data, str) else data
    folder = tmp_path / reader
    folder.mkdir(exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            READERS[reader](folder, raw)
        except IproxError:
            pass  # anything else is a bug


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_no_reader_unpickles(tmp_path: Path, reader: str, protocol: int) -> None:
    bomb = pickle.dumps(Bomb(tmp_path / "owned"), protocol=protocol)
    try:
        READERS[reader](tmp_path, bomb)
    except IproxError:
        pass
    assert not (tmp_path / "owned").exists()
    pickle.loads(bomb)  # the bomb works
    assert (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".."])
def test_an_index_of_weights_cannot_leave_its_folder(tmp_path: Path, name: str) -> None:
    index = {"weight_map": {"x": name}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IproxError, match="outside its folder"):
        load_weights(tmp_path)


def test_a_checkpoint_saved_by_torch_is_not_opened(target_folder: Path, tmp_path: Path) -> None:
    import torch

    from iprox.stages.target import make
    from iprox.store.job import Job

    (target_folder / "model.safetensors").unlink()
    torch.save({"x": Bomb(tmp_path / "owned")}, target_folder / "pytorch_model.bin")
    job = Job("target", {"target": {"model": "target"}}, {}, tmp_path, data_dir=tmp_path)
    with pytest.raises(IproxError, match="no safetensors weights"):
        make(job)
    assert not (tmp_path / "owned").exists()


# --- secrets ----------------------------------------------------------------------------------

TOKEN = "hf_QmFzZTY0c2VjcmV0"
PASSWORD = "correct-horse-battery"

PROGRAM = """
import logging, sys
from pathlib import Path
from iprox.logs import log_to
from iprox.errors import DataError
import os
log = logging.getLogger("iprox.test")
with log_to(sys.argv[1], "test"):
    log.info("fetching with %s", os.environ["HF_TOKEN"])
    log.warning("from https://user:correct-horse-battery@example.org/simple")
    try:
        raise RuntimeError(f"401 for {os.environ['HF_TOKEN']}")
    except RuntimeError:
        log.exception("failed")
    where = "https://u:correct-horse-battery@h/x"
    raise DataError("no access", value=os.environ["HF_TOKEN"], where=where)
"""


def test_tokens_and_passwords_are_masked_in_logs_and_on_the_terminal(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "log.txt")],
        env=os.environ | {"HF_TOKEN": TOKEN},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    for text in ((tmp_path / "log.txt").read_text(), done.stdout + done.stderr):
        assert TOKEN not in text
        assert PASSWORD not in text
        assert "https://***@example.org/simple" in text
        assert "no access" in text


@pytest.mark.usefixtures("quiet")
def test_artifacts_hold_nothing_of_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from iprox.store.job import Job, Metrics
    from iprox.store.runner import Request, run_stage

    secrets = {
        "HF_TOKEN": TOKEN,
        "HUGGING_FACE_HUB_TOKEN": TOKEN + "2",
        "PIP_INDEX_URL": f"https://user:{PASSWORD}@example.org/simple",
        "AWS_SECRET_ACCESS_KEY": "aws-" + PASSWORD,
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)

    def make(job: Job) -> Metrics:
        (job.out / "a.txt").write_text("result")
        return {}

    spec = {"id": "x", "params": {}, "parents": {}, "stage": "toy"}
    folder, store = tmp_path / "results/toy/x", tmp_path / "results/.objects"
    with log_to(tmp_path / "results/logs/x.log"):
        run_stage(make, Request(spec, "c", {}, folder, store, tmp_path))
    written = [p for p in (tmp_path / "results").rglob("*") if p.is_file()]
    assert len(written) >= 4
    for path in written:
        content = path.read_bytes()
        for value in (TOKEN, PASSWORD):
            assert value.encode() not in content, path


def test_provenance_names_no_user_and_no_host(tmp_path: Path) -> None:
    import getpass
    import platform

    from iprox.store.runner import Request, provenance

    spec = {"id": "x", "params": {}, "parents": {}, "stage": "toy"}
    request = Request(spec, "c", {}, tmp_path, tmp_path, tmp_path)
    text = json.dumps(provenance(request, {}, 1.0))
    assert f'"{platform.node()}"' not in text
    assert f'"{getpass.getuser()}"' not in text
    assert str(tmp_path) not in text


def test_the_lock_pins_every_package_exactly() -> None:
    lines = (ROOT / "envs" / "lock.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert len(pins) > 100
    assert all(line.count("==") == 1 and " " not in line for line in pins)


def test_archives_cannot_write_outside_their_folder(tmp_path: Path) -> None:
    import tarfile
    from pathlib import PurePosixPath

    from iprox.data.sources import _extract

    archive = tmp_path / "evil.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name in ("../outside", "/tmp/outside-iprox", "pkg-1/data.json"):
            entry = tarfile.TarInfo(name)
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"data"))
    (tmp_path / "in").mkdir()
    _extract(archive, PurePosixPath("data.json"), tmp_path / "in" / "data.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evil.tar.gz", "in"]
    assert not Path("/tmp/outside-iprox").exists()


def test_every_pin_but_torch_has_the_digests_of_its_files() -> None:
    lock = (ROOT / "envs" / "lock.txt").read_text().splitlines()
    wanted = {canonical(pin) for pin in lock if pin and not pin.startswith("#")}
    found = digests("hashes.txt")
    assert {pin for pin in wanted - found.keys() if not pin.startswith("torch==")} == set()
    assert found.keys() - wanted == set()
    assert max(map(len, found.values())) > 20  # of every platform
    assert len(digests("models.txt")) == 2


def test_nothing_but_torch_is_installed_without_its_digest(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    subprocess.run(["sh", ROOT / "envs" / "install.sh", python], check=True)
    *hashed, last = (tmp_path / "calls").read_text().splitlines()
    assert last.endswith(f"--constraint {ROOT}/envs/lock.txt torch")
    assert all(" --no-deps " in call and " --require-hashes " in call for call in hashed)


def digests(name: str) -> dict[str, list[str]]:
    """Of a requirements file in ``envs``: pin -> digests of its files; none may be without."""
    text = (ROOT / "envs" / name).read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if not line.startswith("#"):
            pin, *options = line.split()
            found[canonical(pin)] = options
            assert options
            assert all(re.fullmatch("--hash=sha256:[0-9a-f]{64}", option) for option in options)
    return found


def canonical(pin: str) -> str:
    """A pin with its package's name as indexes compare names."""
    name, version = pin.split("==")
    return f"{re.sub(r'[-_.]+', '-', name).lower()}=={version}"
