"""What is in each kind of artifact and file, as facts and tables.

``STAGE_VIEWS`` names, for every stage, the files it is looked at through and the function that
does it; ``FILE_VIEWS`` does the same for any file by its ending. A new kind is one entry.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iprox.cli.artifact import read_json
from iprox.cli.render import Facts, Table, cut, human_bytes
from iprox.errors import ArtifactError
from iprox.store.manifest import PROVENANCE, SPEC

if TYPE_CHECKING:
    import pandas as pd

Blocks = Iterator[Facts | Table]
View = Callable[[Path, int], Blocks]

EXAMPLES = 3
"""Examples shown in full sentences: enough to see what the data look like."""


def stage_blocks(stage: str, folder: Path, rows: int) -> Blocks:
    """The tables of one stage folder; a file that is absent is said to be.

    Args:
        stage: Name of the stage.
        folder: Its folder.
        rows: Rows shown per table.
    """
    for pattern, view in STAGE_VIEWS.get(stage, ()):
        found = [folder] if pattern == "." else sorted(folder.glob(pattern))
        if not found:
            yield Facts(pattern, {"file": "absent"})
        for path in found:
            yield from view(path, rows)


def path_blocks(stage: str, folder: Path, inner: Path, rows: int) -> Blocks:
    """The tables of one file inside a stage folder: the stage's own view of it, or by its kind."""
    for pattern, view in STAGE_VIEWS.get(stage, ()):
        if fnmatch(inner.as_posix(), pattern):
            yield from view(folder / inner, rows)
            return
    yield from file_blocks(folder / inner, rows)


def file_blocks(path: Path, rows: int) -> Blocks:
    """The tables of any file or store, by its ending.

    Raises:
        ArtifactError: Nothing is known about this kind of file.
    """
    if (path / "zarr.json").is_file():
        is_array = read_json(path / "zarr.json").get("node_type") == "array"
        return array(path, rows) if is_array else store(path, rows)
    if (path / "config.json").is_file():
        return model(path, rows)
    if path.is_dir():
        return listing(path, rows)
    view = FILE_VIEWS.get(path.suffix)
    if view is None:
        raise ArtifactError(
            "this kind of file cannot be shown",
            where=path,
            value=path.suffix or path.name,
            allowed=", ".join(sorted(FILE_VIEWS)),
        )
    return view(path, rows)


# --- data ------------------------------------------------------------------------------------


def pool(path: Path, rows: int) -> Blocks:
    """Counts, lengths and three examples of a candidate pool."""
    table = _read(path)
    lengths = table["messages"].map(lambda turns: sum(len(turn["content"]) for turn in turns))
    turns = table["messages"].map(len)
    yield Facts(
        "pool",
        {
            "examples": len(table),
            "distinct texts": _distinct(table, "text_hash"),
            **{f"characters, {name}": n for name, n in _quantiles(lengths).items()},
            "turns": f"{turns.min()} to {turns.max()}" if len(table) else None,
        },
    )
    yield from _metadata(path)
    for column in ("source", "category"):
        yield from _counts(table, [column], rows)
    yield _examples(table)


def queries(path: Path, rows: int) -> Blocks:
    """Queries by subtask, and three of them."""
    table = _read(path)
    unsupervised = int((table["prefix"] != "").sum()) if "prefix" in table else None
    yield Facts("queries", {"queries": len(table), "with an unsupervised prefix": unsupervised})
    yield from _metadata(path)
    yield from _counts(table, ["subtask"], rows, "queries per subtask")
    yield _examples(table, "examples of queries")


def test_items(path: Path, rows: int) -> Blocks:
    """Test items by kind and subtask, and three of them."""
    table = _read(path)
    yield Facts("test", {"items": len(table)})
    yield from _counts(table, ["kind", "subtask"], rows, "test items per kind and subtask")
    yield _examples(table, "examples of test items")


def split(path: Path, rows: int) -> Blocks:
    """How many examples are in which split, and the first of each."""
    table = _read(path)
    yield from _metadata(path)
    yield from _counts(table, ["split"], rows, "examples per split")
    yield _head(table, rows, "split")


def ranking(path: Path, rows: int) -> Blocks:
    """Settings, and both ends of every task's ranking."""
    import numpy as np

    table = _read(path)
    yield from _metadata(path)
    for task, group in table.groupby("task", sort=True):
        finite = group["score"][np.isfinite(group["score"])]
        ends = (finite.min(), finite.median(), finite.max()) if len(finite) else (None,) * 3
        names = ("lowest score", "median score", "highest score")
        without = {"without a score": len(group) - len(finite)}
        yield Facts(
            f"{task}", {"examples": len(group), **dict(zip(names, ends, strict=True))} | without
        )
        shown = group.sort_values("rank")[["rank", "example_id", "score"]]
        yield _frame(shown.head(rows), f"{task}: first")
        yield _frame(shown.tail(rows), f"{task}: last")


def selection(path: Path, rows: int) -> Blocks:
    """How many examples each task keeps, and the best of them."""
    table = _read(path)
    kept = {"rows": len(table), "distinct examples": _distinct(table, "example_id")}
    yield Facts("selection", kept)
    yield from _counts(table, ["task"], rows, "examples per task")
    yield _head(table, rows, "selection")


def items(path: Path, rows: int) -> Blocks:
    """Test items of an evaluation: means of what was measured, and the first rows."""
    table = _read(path)
    measured = [c for c in table.columns if table[c].dtype.kind in "fb"]
    yield Facts("items", {"items": len(table)} | {f"mean {c}": table[c].mean() for c in measured})
    yield _head(table, rows, "items")


# --- models ----------------------------------------------------------------------------------

_SIZES = (
    "architectures",
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
)


def model(path: Path, rows: int) -> Blocks:
    """Architecture, parameters and, for a proxy, ranks of a model folder."""
    config = read_json(path / "config.json")
    tensors = [t for file in sorted(path.glob("*.safetensors")) for t in tensor_headers(file)]
    facts = {name.replace("_", " "): config.get(name) for name in _SIZES if name in config}
    yield Facts(
        "model",
        facts
        | {
            "parameters": sum(math.prod(shape) for _, shape, _ in tensors) or "absent",
            "dtype": sorted({dtype for _, _, dtype in tensors}),
            "tokenizer": "yes" if (path / "tokenizer.json").is_file() else "absent",
        },
    )
    about = read_json(path / "proxy.json")
    if about:
        yield from _ranks(about)


def _ranks(about: Mapping[str, Any]) -> Blocks:
    """Ranks of a proxy's layers, summed up by the layer's name within its block."""
    ranks = about.get("ranks", {})
    by_kind: dict[str, list[int]] = {}
    for layer, rank in ranks.items():
        by_kind.setdefault(layer.rsplit(".", 1)[-1], []).append(rank)
    others = {key: value for key, value in about.items() if key != "ranks"}
    yield Facts("proxy", {"factorised layers": len(ranks), **others})
    rows = [[kind, len(r), min(r), max(r)] for kind, r in sorted(by_kind.items())]
    yield Table("ranks", ["layer", "layers", "lowest rank", "highest rank"], rows)


def training_log(path: Path, rows: int) -> Blocks:
    """First and last losses of a training log."""
    table = _read(path)
    yield Facts(path.name, {"steps": len(table)})
    yield from _metadata(path)
    yield _frame(table.head(1), f"{path.name}: first")
    yield _frame(table.tail(rows), f"{path.name}: last")


def alignment(path: Path, rows: int) -> Blocks:
    """The held-out candidates of an alignment, the chosen one, and the last training steps."""
    table = _read(path)
    facts: dict[str, Any] = {"rows": len(table)}
    if "chosen" in table:
        facts["chosen step"] = table.loc[
            table["chosen"].fillna(False).astype(bool), "step"
        ].tolist()
    yield Facts(path.name, facts)
    yield from _metadata(path)
    if "split" not in table:
        yield _frame(table.tail(rows), "last rows")
        return
    for name, group in table.groupby("split", sort=True):
        yield _frame(group.dropna(axis=1, how="all").tail(rows), f"{name}: last")


def alignment_layers(path: Path, rows: int) -> Blocks:
    """Gradient cosines of the layers, before the alignment and at the last candidate."""
    table = _read(path)
    yield from _metadata(path)
    if not len(table) or "step" not in table:
        yield _head(table, rows, "cosines of the layers")
        return
    for step in dict.fromkeys((table["step"].min(), table["step"].max())):
        yield _head(table[table["step"] == step], rows, f"cosines of the layers at step {step}")


def tensor_headers(path: Path) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and dtype of every tensor in a safetensors file, without reading any.

    Raises:
        ArtifactError: The file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as handle:
            slices = {name: handle.get_slice(name) for name in sorted(handle.keys())}
            return [(n, tuple(s.get_shape()), str(s.get_dtype())) for n, s in slices.items()]
    except (OSError, SafetensorError) as error:
        raise ArtifactError("tensors cannot be read", where=path, value=str(error)) from None


def tensors(path: Path, rows: int) -> Blocks:
    """Shapes and dtypes of a safetensors file, and its settings."""
    headers = tensor_headers(path)
    facts = {"tensors": len(headers), "numbers": sum(math.prod(shape) for _, shape, _ in headers)}
    yield Facts(path.name, {**facts, "size": human_bytes(path.stat().st_size)})
    yield from _settings(path)
    table = [[name, _shape(shape), dtype] for name, shape, dtype in headers]
    yield _some(path.name, ["tensor", "shape", "dtype"], table, rows)


def _settings(path: Path) -> Blocks:
    """Settings in the metadata of a safetensors file."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as handle:
        metadata = dict(handle.metadata() or {})
    text = metadata.pop("iprox", "{}")
    try:
        settings = json.loads(text)
    except ValueError:
        settings = {"iprox": text}
    if settings or metadata:
        yield Facts(f"{path.name}: settings", {**metadata, **flat(settings)})


# --- stores ----------------------------------------------------------------------------------


def store(path: Path, rows: int) -> Blocks:
    """Attributes and arrays of a Zarr store."""
    from iprox.store.arrays import open_store

    group = open_store(path)
    attrs = dict(group.attrs)
    yield Facts(path.name, {"size": human_bytes(_folder_bytes(path)), **_small(attrs)})
    yield from _attribute_tables(attrs, rows)
    yield _arrays_table(group, rows, f"{path.name}: arrays")


def array(path: Path, rows: int) -> Blocks:
    """Shape, attributes and first values of one array of a Zarr store."""
    import zarr

    stored = zarr.open_array(str(path), mode="r")
    _, shape, dims, dtype = _array_row(path.name, stored)
    facts = {"shape": shape, "dimensions": dims, "dtype": dtype, **flat(dict(stored.attrs))}
    yield Facts(path.name, facts)
    head = stored[:rows] if stored.shape else [stored[...]]
    yield Table("first values", ["value"], [[_cell(value)] for value in head])


_SPECTRUM = (
    "layer",
    "out",
    "in",
    "rank_effective",
    "values",
    "largest",
    "floor",
    "input_lam",
    "grad_lam",
    "kernel",
    "fallback",
)
"""What of a spectrum's attributes is shown for each layer; the array itself has them all."""


def spectra(path: Path, rows: int) -> Blocks:
    """Layers of a decomposition: shape, damping, kernel, error floor and largest singular value."""
    from iprox.store.arrays import open_store

    group = open_store(path)
    yield Facts(path.name, {"size": human_bytes(_folder_bytes(path)), **_small(dict(group.attrs))})
    layers = []
    for name, array in _arrays(group):
        top = float(array[0]) if array.shape and array.shape[0] else None
        about = {"layer": name.split("/", 1)[-1], "values": array.shape[0], "largest": top}
        about |= dict(array.attrs)
        layers.append({key: about[key] for key in _SPECTRUM if key in about})
    yield _records(layers, rows, "layers")


def layers(path: Path, rows: int) -> Blocks:
    """Layers of a set of factors: shape, rank, error and kernel, and totals."""
    table = _read(path)
    totals: dict[str, Any] = {"layers": len(table)}
    if "kept_dense" in table:
        totals["kept dense"] = int(table["kept_dense"].sum())
    if {"parameters", "parameters_dense"} <= set(table.columns):
        after, before = int(table["parameters"].sum()), int(table["parameters_dense"].sum())
        totals |= {"parameters": after, "parameters before": before}
        totals["sparsity"] = 1 - after / before if before else None
    yield Facts("totals", totals)
    yield from _metadata(path)
    yield _head(table, rows, "layers")


def agreement(path: Path, rows: int) -> Blocks:
    """What a proxy keeps and what it costs, in short, and every measure of every task."""
    table = _read(path)
    yield Facts("in short", headline(table) | {"time ratio": measured_time_ratio(path.parent)})
    yield from whole_table(path, rows)


HEADLINE = {
    "spearman": "Spearman with the target",
    "unseen_spearman": "on examples it was not made from",
    "length_spearman": "lengths only",
    "above_length": "above lengths",
    "parameters_ratio": "parameters ratio",
    "flops_ratio": "FLOPs ratio",
}
"""Fidelity metrics that come first, and how they are called there."""


def headline(table: pd.DataFrame) -> dict[str, float]:
    """Means over tasks of the metrics that come first, as far as they were measured."""
    if not {"task", "metric", "value"} <= set(table.columns):
        return {}
    means = table[table["task"] == "mean"].set_index("metric")["value"]
    return {said: float(means[name]) for name, said in HEADLINE.items() if name in means.index}


def measured_time_ratio(folder: Path) -> float | None:
    """Seconds per token of the two passes that a fidelity compares, the proxy's over the target's.

    From their provenance: times are no results, and no part of the artifact. None when a pass
    is not there or did not record its rate.
    """
    folder = folder.resolve()
    parents = read_json(folder / SPEC).get("parents", {})
    rates = []
    for role in ("target", "proxy"):
        about = parents.get(role, {"stage": "-", "id": "-"})
        made = read_json(folder.parent.parent / about["stage"] / about["id"] / PROVENANCE)
        rates.append(made.get("metrics", {}).get("tokens_per_s"))
    return rates[0] / rates[1] if all(rates) else None


def layer_fidelity(path: Path, rows: int) -> Blocks:
    """How much of its influence each kind of layer keeps, and the layers that keep least."""
    table = _read(path)
    means = table[table["task"] == "mean"]
    if not len(means):
        yield Facts(path.name, {"layers": 0})
        return
    kinds = means.assign(kind=[name.rsplit(".", 1)[-1] for name in means["layer"]])
    by_kind = kinds.groupby("kind", sort=False).agg(
        layers=("layer", "size"),
        spearman=("spearman", "mean"),
        lowest=("spearman", "min"),
        share=("share", "sum"),
    )
    yield _frame(by_kind.reset_index(), "influence kept, by kind of layer")
    least = means.sort_values("spearman", kind="stable").drop(columns="task")
    yield _head(least, rows, "layers that keep least")


def features(path: Path, rows: int) -> Blocks:
    """Shards of a scoring pass, its columns, and which kernel each kind of layer used and why."""
    from iprox.store.arrays import open_store

    stores = {shard.name: open_store(shard) for shard in sorted(path.glob("shard-*.zarr"))}
    if not stores:
        yield Facts("shards", {"shard-*.zarr": "absent"})
        return
    counts = {name: _shard_counts(group) for name, group in stores.items()}
    kinds = dict.fromkeys(kind for count in counts.values() for kind in count)
    totals = {kind: sum(count.get(kind, 0) for count in counts.values()) for kind in kinds}
    yield Facts("features", {"shards": len(stores), **totals})
    first = next(iter(stores.values()))
    if "columns" in first and "query_norms" in first:
        pairs = zip(first["columns"][...], first["query_norms"][...], strict=True)
        body = [[str(name), norm] for name, norm in pairs]
        yield _some("columns", ["column", "query norm"], body, rows)
    attrs = dict(first.attrs)
    yield Facts("settings", _small(attrs))
    if (path / "sketch.parquet").is_file():
        error = {str(k): v for k, v in _read(path / "sketch.parquet").iloc[0].items()}
        yield Facts("cosines of sketches against exact ones", error)
    yield from _attribute_tables(attrs, rows)
    yield _arrays_table(first, rows, f"arrays of {next(iter(stores))}")
    if len(counts) > 1:
        yield _records([{"shard": n} | count for n, count in counts.items()], rows, "shards")


def _shard_counts(group: Any) -> dict[str, int]:
    """Examples and tokens of one shard, and its examples that cannot be scored."""
    counts = {}
    if "example_id" in group:
        counts["examples"] = int(group["example_id"].shape[0])
    if "tokens" in group:
        counts["tokens"] = int(group["tokens"][...].sum())
    if "supervised" in group:
        counts["without supervised tokens"] = int((group["supervised"][...] == 0).sum())
    return counts


def query_gradients(path: Path, rows: int) -> Blocks:
    """Groups of queries with the norm of their gradient, and each layer's shape and norm."""
    from iprox.store.arrays import open_store

    group = open_store(path)
    attrs = dict(group.attrs)
    settings = {k: v for k, v in attrs.items() if k not in ("layers", "n_queries")}
    yield Facts(path.name, {"size": human_bytes(_folder_bytes(path)), **_small(settings)})
    if "group" in group and "norms" in group:
        names, norms = [str(n) for n in group["group"][...]], group["norms"][...].tolist()
        sizes = attrs.get("n_queries", {})
        body = [[n, sizes.get(n), norm] for n, norm in zip(names, norms, strict=True)]
        yield _some("groups of queries", ["group", "queries", "norm"], body, rows)
    if "gradients" in group:
        arrays = list(_arrays(group["gradients"]))
        body = [[name, _shape(a.shape), _norm(a)] for name, a in arrays[:rows]]
        note = _more(len(body), len(arrays))
        yield Table("layers", ["layer", "shape (groups, out, in)", "norm"], body, note)
    else:
        yield _arrays_table(group, rows, f"{path.name}: arrays")
    yield from _attribute_tables(settings, rows)


def _norm(array: Any) -> float:
    """Norm of a stored array, read a slice at a time."""
    import numpy as np

    slices = (array[i].astype(np.float64) for i in range(array.shape[0]))
    return math.sqrt(sum(float(np.vdot(part, part)) for part in slices))


def _arrays(group: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Path and array of every array below a group, sorted."""
    for name, array in sorted(group.arrays()):
        yield f"{prefix}{name}", array
    for name, child in sorted(group.groups()):
        yield from _arrays(child, f"{prefix}{name}/")


def _arrays_table(group: Any, rows: int, title: str) -> Table:
    """Name, shape, dimensions and dtype of every array of a store."""
    body = [_array_row(name, stored) for name, stored in _arrays(group)]
    return _some(title, ["array", "shape", "dimensions", "dtype"], body, rows)


def _array_row(name: str, array: Any) -> list[Any]:
    dims = ", ".join(str(d) for d in array.metadata.dimension_names or ())
    dtype = str(array.dtype)
    return [name, _shape(array.shape), dims, "string" if dtype.startswith("String") else dtype]


LONG = 12
"""Attributes with more entries than this become tables, or are counted."""


def _attribute_tables(attrs: Mapping[str, Any], rows: int) -> Blocks:
    """Attributes that are lists of mappings, or long mappings, as tables of their own."""
    for key, value in attrs.items():
        if _is_records(value):
            yield _records(value, rows, key)
        elif _is_nested(value):
            yield _records([{"name": k} | v for k, v in value.items()], rows, key)
        elif isinstance(value, dict) and len(value) > LONG:
            body = [[name, _cell(entry)] for name, entry in value.items()]
            yield _some(key, ["name", "value"], body, rows)


def _small(attrs: Mapping[str, Any]) -> dict[str, Any]:
    """Attributes that are not tables, by dotted key; long lists are counted."""
    kept = {k: v for k, v in attrs.items() if not _is_records(v) and not _is_nested(v)}
    short = {k: v for k, v in kept.items() if not (isinstance(v, dict) and len(v) > LONG)}
    return {
        key: f"{len(value)} values" if isinstance(value, list) and len(value) > LONG else value
        for key, value in flat(short).items()
    }


def _is_records(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)


def _is_nested(value: Any) -> bool:
    if not isinstance(value, dict) or not value:
        return False
    return all(isinstance(v, dict) for v in value.values())


# --- plain files -----------------------------------------------------------------------------


def parquet(path: Path, rows: int) -> Blocks:
    """Columns, metadata and first rows of any table."""
    from iprox.store.tables import read_arrow

    table = read_arrow(path)
    facts = {"rows": table.num_rows, "size": human_bytes(path.stat().st_size)}
    yield Facts(path.name, facts)
    yield from _metadata(path)
    columns = [[column.name, str(column.type)] for column in table.schema]
    yield Table("columns", ["column", "type"], columns)
    yield _head(table.slice(0, rows).to_pandas(), rows, "first rows", total=table.num_rows)


def json_file(path: Path, rows: int) -> Blocks:
    """Keys and values of a JSON file; nested ones by dotted key."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError("a file is not JSON", where=path, value=str(error)) from None
    values = flat(content) if isinstance(content, dict) else {"value": content}
    kept = dict(list(values.items())[: max(rows, 1) * 20])
    note = {"...": f"{len(values) - len(kept)} more"} if len(kept) < len(values) else {}
    yield Facts(path.name, kept | note)


def jsonl(path: Path, rows: int) -> Blocks:
    """Number of lines and the first of them."""
    first: list[dict[str, Any]] = []
    count = 0
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            count += 1
            if len(first) < rows:
                first.append(_json_line(line, path, count))
    yield Facts(path.name, {"lines": count})
    yield _records(first, rows, "first lines", total=count)


def _json_line(line: str, path: Path, number: int) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except ValueError as error:
        raise ArtifactError("not JSON", where=f"{path}:{number}", value=str(error)) from None
    return content if isinstance(content, dict) else {"value": content}


def metrics(path: Path, rows: int) -> Blocks:
    """Metrics of an evaluation: value, interval and number of items each."""
    content = read_json(path)
    measured = {k: v for k, v in content.items() if isinstance(v, dict) and "value" in v}
    others = {k: v for k, v in content.items() if k not in measured}
    yield _records([{"metric": k} | v for k, v in measured.items()], len(measured), "metrics")
    if others:
        yield Facts("about", flat(others))


def text(path: Path, rows: int) -> Blocks:
    """First lines of a text file."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        kept = [[number, cut(line, 140)] for number, line in enumerate(islice(lines, rows), 1)]
    yield Table(path.name, ["line", "text"], kept)


def listing(path: Path, rows: int) -> Blocks:
    """Files below a folder."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    table = [[p.relative_to(path).as_posix(), human_bytes(p.stat().st_size)] for p in files]
    yield _some(path.name, ["file", "size"], table, rows)


def to_open(path: Path, rows: int) -> Blocks:
    """Files of a report that a person opens."""
    kinds = ("index.html", "tables/*", "figures/*")
    files = [p for kind in kinds for p in sorted(path.glob(kind)) if p.is_file()]
    table = [[str(p), human_bytes(p.stat().st_size)] for p in files]
    yield Table("to open", ["file", "size"], table)


def whole_table(path: Path, rows: int) -> Blocks:
    """All rows of a small table."""
    yield from _metadata(path)
    table = _read(path)
    yield _head(table, max(rows, 200), path.stem)


def first_lines(path: Path, rows: int) -> Blocks:
    """Three lines of a file of examples."""
    return jsonl(path, min(rows, EXAMPLES))


def decomposed(path: Path, rows: int) -> Blocks:
    """Size of the directions; the layers stand in the spectra."""
    headers = tensor_headers(path)
    numbers = sum(math.prod(shape) for _, shape, _ in headers)
    yield Facts(path.name, {"tensors": len(headers), "numbers": numbers})
    yield from _settings(path)


STAGE_VIEWS: dict[str, tuple[tuple[str, View], ...]] = {
    "pool": (("pool.parquet", pool),),
    "task": (("queries.parquet", queries), ("test.parquet", test_items)),
    "target": ((".", model),),
    "split": (("split.parquet", split),),
    "warmup": ((".", model), ("log.parquet", training_log)),
    "checkpoint": ((".", model),),
    "probe": (("probe.zarr", store),),
    "decomposition": (("spectra.zarr", spectra), ("directions.safetensors", decomposed)),
    "sparsity": (("chosen.json", json_file), ("tried.parquet", whole_table)),
    "factors": (("layers.parquet", layers), ("factors.safetensors", decomposed)),
    "proxy": (
        (".", model),
        ("alignment.parquet", alignment),
        ("alignment_layers.parquet", alignment_layers),
    ),
    "extraction": (("blocks.parquet", whole_table), (".", model)),
    "covariance": (("shard-*.zarr", store),),
    "curvature": (("curvature.zarr", store),),
    "eigenvalues": (("shard-*.zarr", store),),
    "direction": (("query.zarr", query_gradients),),
    "query": (("query.zarr", query_gradients),),
    "features": ((".", features),),
    "query_sketches": (("rows.zarr", store),),
    "backbone": ((".", model),),
    "encoder": ((".", model), ("quality.parquet", whole_table), ("epochs.parquet", whole_table)),
    "embeddings": ((".", features),),
    "head": (("quality.parquet", whole_table), ("rows.zarr", store)),
    "query_embeddings": (("rows.zarr", store),),
    "ranking": (("ranking.parquet", ranking),),
    "fidelity": (("fidelity.parquet", agreement), ("layers.parquet", layer_fidelity)),
    "selection": (("selection.parquet", selection), ("selected.jsonl", first_lines)),
    "diversity": (("diversity.parquet", whole_table),),
    "finetune": ((".", model), ("log.parquet", training_log)),
    "evaluation": (("metrics.json", metrics), ("items.parquet", items)),
    "synthetic": (("retention.parquet", whole_table),),
    "small": (("start", model), ("full", model)),
    "retrain": (("losses.parquet", whole_table),),
    "faithfulness": (("faithfulness.parquet", whole_table),),
    "facts": (("methods.parquet", whole_table),),
    "retrieval": (("retrieval.parquet", whole_table),),
    "paper_table": (("table.parquet", whole_table),),
    "report": ((".", to_open),),
}

TEXTS = (".csv", ".html", ".jinja", ".log", ".md", ".svg", ".tex", ".txt", ".yaml")

FILE_VIEWS: dict[str, View] = {
    **dict.fromkeys(TEXTS, text),
    ".parquet": parquet,
    ".safetensors": tensors,
    ".json": json_file,
    ".jsonl": jsonl,
}


# --- helpers ---------------------------------------------------------------------------------


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys, empty mappings kept."""
    result: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result


def _read(path: Path) -> pd.DataFrame:
    from iprox.store.tables import read_table

    return read_table(path)


def _metadata(path: Path) -> Blocks:
    from iprox.store.tables import read_metadata

    settings = read_metadata(path)
    if settings:
        yield Facts(f"{path.name}: settings", flat(settings))


def _distinct(table: pd.DataFrame, column: str) -> int | None:
    return int(table[column].nunique()) if column in table else None


def _quantiles(values: pd.Series) -> dict[str, Any]:
    names = {"shortest": 0.0, "median": 0.5, "90 %": 0.9, "longest": 1.0}
    return {name: int(values.quantile(q)) for name, q in names.items()} if len(values) else {}


def _counts(table: pd.DataFrame, columns: list[str], rows: int, title: str = "") -> Blocks:
    """How often each value (or combination) occurs, most frequent first."""
    known = [column for column in columns if column in table]
    if not known:
        return
    counts = table.groupby(known, sort=True, dropna=False).size()
    ordered = counts.sort_values(ascending=False, kind="stable").reset_index()
    body = ordered.to_numpy(dtype=object).tolist()
    yield _some(title or f"examples per {known[0]}", [*known, "examples"], body, rows)


def _examples(table: pd.DataFrame, title: str = "examples") -> Table:
    """Three examples: the first request and the last response, cut."""
    body = []
    for row in table.head(EXAMPLES).to_dict("records"):
        turns = list(row["messages"])
        last = turns[-1]["content"] if len(turns) > 1 else row.get("answer", "")
        body.append([row["example_id"], cut(turns[0]["content"], 100), cut(str(last), 100)])
    return Table(title, ["example_id", "first turn", "last turn"], body)


def _head(table: pd.DataFrame, rows: int, title: str, total: int | None = None) -> Table:
    return _frame(table.head(rows), title, len(table) if total is None else total)


def _frame(table: pd.DataFrame, title: str, total: int | None = None) -> Table:
    """A data frame, long texts cut; the note says how many rows are not shown."""
    body = [[_cell(value) for value in row] for row in table.to_numpy(dtype=object).tolist()]
    return Table(title, [str(c) for c in table.columns], body, _more(len(body), total))


def _records(
    records: Iterable[Mapping[str, Any]], rows: int, title: str, total: int | None = None
) -> Table:
    """Mappings as rows; a key that some lack is empty there."""
    listed = list(records)
    columns = list(dict.fromkeys(key for record in listed for key in record))
    body = [[_cell(record.get(column)) for column in columns] for record in listed[:rows]]
    return Table(title, columns, body, _more(len(body), len(listed) if total is None else total))


def _some(title: str, columns: list[str], body: list[list[Any]], rows: int) -> Table:
    return Table(title, columns, body[:rows], _more(len(body[:rows]), len(body)))


def _more(shown: int, total: int | None) -> str:
    left = 0 if total is None else total - shown
    return f"{left:,} more row{'s' * (left > 1)}; --rows N shows more" if left > 0 else ""


def _cell(value: Any) -> Any:
    """A value of a table, short enough for a cell."""
    if isinstance(value, str):
        return cut(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | dict):
        return cut(json.dumps(value, ensure_ascii=False, default=str))
    return value


def _shape(shape: Iterable[int]) -> str:
    return f"({', '.join(str(n) for n in shape)})"


def _folder_bytes(path: Path) -> int:
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
