"""The digest of a stage's code: what changes it and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from iprox.plan import code


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    package = tmp_path / "iprox"
    for name in ("", "stages", "numerics", "store"):
        (package / name).mkdir(exist_ok=True)
        (package / name / "__init__.py").write_text("")
    (package / "store" / "runner.py").write_text("x = 1\n")
    (package / "store" / "manifest.py").write_text("x = 1\n")
    (package / "errors.py").write_text("x = 1\n")
    (package / "numerics" / "far.py").write_text("def far():\n    return 1\n")
    (package / "numerics" / "near.py").write_text("from iprox.numerics import far\n")
    (package / "stages" / "one.py").write_text(
        '"""One."""\nfrom iprox.errors import x\n\ndef make():\n'
        "    from iprox.numerics.near import far\n    return far\n"
    )
    (package / "stages" / "two.py").write_text("import json\n")
    monkeypatch.setattr(code, "SOURCE", tmp_path)
    forget()
    yield package
    forget()


def forget() -> None:
    for function in (code.code_hash, code._parsed, code._tree, code._imports):
        function.cache_clear()


def digest(name: str = "iprox.stages.one", script: Path | None = None) -> str:
    forget()
    return code.code_hash(name, script)


def test_docstrings_comments_and_formatting_do_not_count(project: Path) -> None:
    before = digest()
    path = project / "stages" / "one.py"
    path.write_text(
        '"""Other words."""\n# a comment\n\n'
        + path.read_text().split("\n", 1)[1].replace("    ", "        ")
    )
    assert digest() == before


@pytest.mark.parametrize(
    "module", ["stages/one.py", "numerics/near.py", "numerics/far.py", "store/runner.py"]
)
def test_logic_counts_wherever_it_is_imported_from(project: Path, module: str) -> None:
    before, other = digest(), digest("iprox.stages.two")
    path = project / module
    path.write_text(path.read_text() + "y = 2\n")
    assert digest() != before
    assert (digest("iprox.stages.two") == other) == (module != "store/runner.py")


def test_messages_do_not_count(project: Path) -> None:
    before = digest()
    (project / "errors.py").write_text("x = 2\n")
    assert digest() == before


def test_the_script_counts(project: Path, tmp_path: Path) -> None:
    script = tmp_path / "rule.py"
    script.write_text("run(1)\n")
    first = digest(script=script)
    script.write_text("# note\nrun(1)\n")
    assert digest(script=script) == first
    script.write_text("run(2)\n")
    assert digest(script=script) != first


def test_an_unknown_module_is_an_error(project: Path) -> None:
    with pytest.raises(ValueError, match="iprox.stages.three"):
        digest("iprox.stages.three")


def test_real_stages_do_not_reach_each_other() -> None:
    forget()
    reached = code.reachable(("iprox.stages.factors",))
    assert "iprox.stages.pool" not in reached
    assert "iprox.numerics.ipsvd" in reached


def test_a_page_beside_the_code_counts(project: Path) -> None:
    before = digest()
    (project / "stages" / "page.html").write_text("<p>")
    assert digest() != before
