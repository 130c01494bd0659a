"""Digest of the code a stage runs: its module and every project module it imports.

Comments, docstrings and formatting do not count, so editing them reruns nothing; an edit to
logic reruns exactly the stages that reach it.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
PACKAGE = "iprox"

SHARED = ("iprox.store.runner", "iprox.store.manifest")
"""Modules every stage runs through."""

NEUTRAL = frozenset(
    {
        "iprox",
        "iprox.errors",
        "iprox.logs",
        "iprox.models.flops",
        "iprox.numerics.flops",
        "iprox.progress",
        "iprox.study.schema",
        "iprox.study.scorers",
    }
)
"""Modules that cannot change a result: messages, progress and counts of operations, and the
schema with its lists of names, whose effect on a stage is its parameters, which are part of its
identity anyway. A count of operations that a stage stores is that of the code it was made with."""


@cache
def code_hash(module: str, script: Path | None = None) -> str:
    """Digest of a stage's code.

    Args:
        module: Dotted name, for example ``iprox.stages.factors``.
        script: The rule's script, counted in as well.

    Returns:
        12 hex digits.
    """
    modules = reachable((module, *SHARED))
    parts = sorted((name, _tree(name)) for name in modules)
    parts += [(path.name, path.read_text(encoding="utf-8")) for path in _templates(modules)]
    if script is not None:
        parts.append(("script", ast.dump(_strip(ast.parse(script.read_text(encoding="utf-8"))))))
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def reachable(roots: tuple[str, ...]) -> set[str]:
    """Project modules that ``roots`` import, directly or not, themselves included."""
    seen: set[str] = set()
    todo = [root for root in roots if _file(root) is not None]
    missing = [root for root in roots if _file(root) is None]
    if missing:
        raise ValueError(f"no module {missing[0]} under {SOURCE}")
    while todo:
        name = todo.pop()
        if name in seen or name in NEUTRAL:
            continue
        seen.add(name)
        todo += _imports(name)
    return seen


def _file(module: str) -> Path | None:
    base = SOURCE.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


def _templates(modules: set[str]) -> list[Path]:
    """Pages, styles and page scripts that lie beside the modules."""
    folders = {path.parent for path in map(_file, modules) if path is not None}
    return sorted(p for f in folders for p in f.iterdir() if p.suffix in (".html", ".css", ".js"))


@cache
def _parsed(module: str) -> ast.Module:
    path = _file(module)
    assert path is not None
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _tree(module: str) -> str:
    return ast.dump(_strip(_parsed(module)))


@cache
def _imports(module: str) -> list[str]:
    """Project modules named in the import statements of a module, nested ones included."""
    found: set[str] = set()
    for node in ast.walk(_parsed(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(module, node)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    ours = {name for name in found if name.split(".")[0] == PACKAGE}
    return sorted(name for name in ours if _file(name) is not None)


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    path = _file(module)
    is_package = path is not None and path.name == "__init__.py"
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + (1 if is_package else 0)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _strip(tree: ast.Module) -> ast.Module:
    """The tree without docstrings."""
    tree = ast.parse(ast.unparse(tree))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
    return tree
