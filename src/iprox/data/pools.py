"""Candidate pools: files of several shapes read into one schema.

Every candidate ends as ``example_id, source, category, messages, text_hash, prompt_hash``. Records
keep the file and line they came from until then, so that an error can say where it is.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import logging
import sys
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from iprox.data.sources import DATA_SUFFIXES, Source, load_hub
from iprox.errors import DataError
from iprox.study.schema import Hub, PoolSection

log = logging.getLogger(__name__)

Message = dict[str, str]
"""One turn: ``{"role": ..., "content": ...}``."""

ROLES = ("system", "user", "assistant")
SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
}
ID_FIELDS = ("id", "example_id")

MAX_LINE_BYTES = 64 * 2**20
"""Longest line of a JSONL file that is read: a file without line breaks is not held whole."""

MESSAGES_TYPE = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
POOL_SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("source", pa.string()),
        ("category", pa.string()),
        ("messages", MESSAGES_TYPE),
        ("text_hash", pa.string()),
        ("prompt_hash", pa.string()),
    ]
)


@dataclass(frozen=True)
class Row:
    """One record as it was read.

    Attributes:
        fields: Its fields.
        file: Name of its file as the ``source`` column gives it.
        where: File and line, row or item, for messages.
    """

    fields: Mapping[str, Any]
    file: str
    where: str


@dataclass(frozen=True)
class Candidate:
    """One example of a pool."""

    example_id: str
    source: str
    category: str
    messages: tuple[Message, ...]
    row: Row

    @property
    def n_chars(self) -> int:
        """Characters of all turns together."""
        return sum(len(m["content"]) for m in self.messages)

    @property
    def has_response(self) -> bool:
        """Whether the last turn is the assistant's and not blank."""
        last = self.messages[-1]
        return last["role"] == "assistant" and bool(last["content"].strip())


@dataclass(frozen=True)
class Pool:
    """A pool in its final order, and what was left out of it.

    Attributes:
        candidates: Sorted by ``example_id``.
        format: Shape of the records, given or detected.
        counts: Records read, left out (by reason) and kept.
    """

    candidates: list[Candidate]
    format: str
    counts: dict[str, int]


def build_pool(source: Source, section: PoolSection) -> Pool:
    """Read a source and leave out what the section says.

    The order is: empty responses, duplicate ids, long examples, then the seeded sample. The
    result does not depend on the order of records in their files, except that of two records
    with one explicit id the first is kept.

    Args:
        source: Where the records are.
        section: Format, limits and what to do with empty and duplicate ones.

    Raises:
        DataError: A file or record cannot be used, or nothing is left.
    """
    found, shape = read_candidates(source, section.format)
    filled = _drop_empty(found, section.on_empty)
    unique = _drop_duplicates(filled, section.on_duplicate)
    most = sys.maxsize if section.max_chars is None else section.max_chars
    short = [c for c in unique if c.n_chars <= most]
    kept = sample(short, section.limit, section.seed)
    counts = {
        "n_read": len(found),
        "n_empty": len(found) - len(filled),
        "n_duplicate": len(filled) - len(unique),
        "n_too_long": len(unique) - len(short),
        "n_not_sampled": len(short) - len(kept),
        "n_examples": len(kept),
    }
    if not kept:
        raise DataError(
            "no example of the pool is left",
            where=source.origin,
            value=counts,
            fix="see what left them out: empty responses, pool.max_chars or pool.on_duplicate",
        )
    left_out = {k.removeprefix("n_").replace("_", " "): v for k, v in list(counts.items())[1:-1]}
    log.info(
        "%d examples of %d records in the shape %s; left out: %s",
        len(kept),
        len(found),
        shape,
        ", ".join(f"{n} {reason}" for reason, n in left_out.items()),
    )
    return Pool(kept, shape, counts)


def read_candidates(source: Source, shape: str = "auto") -> tuple[list[Candidate], str]:
    """All records of a source as candidates, in reading order, and their shape.

    Args:
        source: Where the records are.
        shape: Name of a shape in :data:`SHAPES`, or auto to take the first record's.

    Raises:
        DataError: A file cannot be read, a record has not the shape, or a field is not text.
    """
    rows = list(_source_rows(source))
    if shape == "auto":
        shape = detect(rows[0])
        log.info("detected records of the shape %s", shape)
    parsed = [(row, _messages(row, shape)) for row in rows]
    return _identified(parsed, source.label), shape


def pool_table(pool: Pool) -> pa.Table:
    """The pool as an Arrow table with the columns of :data:`POOL_SCHEMA`."""
    rows = [
        {
            "example_id": c.example_id,
            "source": c.source,
            "category": c.category,
            "messages": list(c.messages),
            "text_hash": text_hash(c.messages),
            "prompt_hash": text_hash(c.messages[:-1]) if len(c.messages) > 1 else "",
        }
        for c in pool.candidates
    ]
    return pa.Table.from_pylist(rows, schema=POOL_SCHEMA)


def draw_key(seed: int, draw: str, example_id: str) -> str:
    """Sort key of an example in a seeded draw: a hash, so that no order of files matters.

    Args:
        seed: The config's seed.
        draw: Name of the draw; draws of different names are independent.
        example_id: The example.
    """
    return hashlib.sha256(f"{seed}\x1f{draw}\x1f{example_id}".encode()).hexdigest()


def sample(candidates: Iterable[Candidate], limit: int | None, seed: int) -> list[Candidate]:
    """At most ``limit`` of the candidates, drawn by :func:`draw_key`, sorted by ``example_id``."""
    drawn = sorted(candidates, key=lambda c: draw_key(seed, "pool", c.example_id))
    return sorted(drawn[:limit], key=lambda c: c.example_id)


def text_hash(messages: Sequence[Message]) -> str:
    """Sha256 of all turns' text, equal for texts that differ in case, spacing or Unicode form."""
    text = "\n".join(m["content"] for m in messages)
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return hashlib.sha256(plain.encode()).hexdigest()


def content_id(label: str, messages: Sequence[Message]) -> str:
    """Id of an example without one: ``<label>-`` and 16 hex digits of its messages' sha256."""
    canonical = json.dumps(
        [[m["role"], m["content"]] for m in messages], ensure_ascii=False, separators=(",", ":")
    )
    return f"{label}-{hashlib.sha256(canonical.encode()).hexdigest()[:16]}"


# --- files -> rows -------------------------------------------------------------------------


def read_rows(path: Path, name: str | None = None) -> list[Row]:
    """Records of one JSONL, JSON, CSV or Parquet file.

    Args:
        path: The file.
        name: What to call it in messages and in the ``source`` column; its path if absent.

    Raises:
        DataError: The file cannot be read or decoded, is not what its name says, or is empty.
    """
    name = name or str(path)
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError("unknown kind of data file", where=name, allowed=", ".join(DATA_SUFFIXES))
    try:
        rows = list(reader(path, name))
    except (OSError, pa.ArrowException) as error:
        raise DataError(
            "a data file cannot be read",
            where=name,
            value=str(error).replace(str(path), path.name),
            fix="write or download the file again",
        ) from None
    if not rows:
        raise DataError("a data file has no records", where=name, fix="remove it, or fill it")
    return rows


def hub_rows(hub: Hub, origin: str | None = None) -> list[Row]:
    """Records of a hub data set.

    Args:
        hub: The data set.
        origin: What to call it in the ``source`` column; its name if absent.

    Raises:
        DataError: It cannot be loaded, or is empty.
    """
    records = load_hub(hub)
    if not records:
        raise DataError("a hub data set has no records", where=hub.name)
    return [Row(r, origin or hub.name, f"{hub.name}: row {i}") for i, r in enumerate(records)]


def _source_rows(source: Source) -> Iterator[Row]:
    if source.hub is not None:
        yield from hub_rows(source.hub, source.origin)
    for name, path in source.files:
        yield from read_rows(path, name)


def _jsonl_rows(path: Path, name: str) -> Iterator[Row]:
    with path.open("rb") as file:
        lines = iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")
        for number, raw in enumerate(lines, start=1):
            where = f"{name}:{number}"
            if len(raw) > MAX_LINE_BYTES:
                raise DataError(
                    "a line is too long to be one example",
                    where=where,
                    value=f"more than {MAX_LINE_BYTES:,} bytes",
                    allowed="one JSON object a line",
                    fix="put a line break after each record",
                )
            line = _decode(raw, name, first_line=number).strip()
            if line:
                yield Row(_object(_parse_json(line, name, number), where), name, where)


def _json_rows(path: Path, name: str) -> Iterator[Row]:
    text = _decode(path.read_bytes(), name)
    if not text.strip():
        return
    records = _parse_json(text, name, first_line=1)
    if not isinstance(records, list):
        raise DataError(
            "a JSON pool must be a list of records",
            where=name,
            value=type(records).__name__,
            fix="write [ {...}, {...} ], or one record a line in a .jsonl file",
        )
    for i, record in enumerate(records, start=1):
        where = f"{name}: item {i}"
        yield Row(_object(record, where), name, where)


def _csv_rows(path: Path, name: str) -> Iterator[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(_decode(path.read_bytes(), name), newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(
                "a CSV file repeats a column",
                where=f"{name}:1",
                value=header,
                fix="give each column a name of its own",
            )
        start = reader.line_num + 1
        for values in reader:
            where, start = f"{name}:{start}", reader.line_num + 1
            if not values:  # an empty line
                continue
            if len(values) != len(header):
                raise DataError(
                    "a CSV record has not as many fields as the header",
                    where=where,
                    value=f"{len(values)} fields",
                    allowed=f"{len(header)}: {', '.join(header)}",
                    fix="quote fields that contain commas or line breaks",
                )
            yield Row(dict(zip(header, values, strict=True)), name, where)
    except csv.Error as error:
        raise DataError(
            "invalid CSV",
            where=f"{name}:{reader.line_num}",
            value=str(error),
            fix="close every quote, and double quotes inside quoted fields",
        ) from None


def _parquet_rows(path: Path, name: str) -> Iterator[Row]:
    for i, fields in enumerate(pq.read_table(path).to_pylist()):
        yield Row(fields, name, f"{name}: row {i}")


_READERS: dict[str, Callable[[Path, str], Iterator[Row]]] = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".csv": _csv_rows,
    ".parquet": _parquet_rows,
}


def _decode(raw: bytes, name: str, first_line: int = 1) -> str:
    try:
        return raw.decode("utf-8-sig" if first_line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw[: error.start].count(b"\n")
        raise DataError(
            "a data file is not UTF-8",
            where=f"{name}:{line}",
            value=raw[error.start : error.start + 8],
            fix="convert the file to UTF-8",
        ) from None


def _parse_json(text: str, name: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        many = error.msg == "Extra data"
        raise DataError(
            "invalid JSON",
            where=f"{name}:{first_line + error.lineno - 1}",
            value=f"{error.msg}: {error.doc[error.pos : error.pos + 40]}",
            fix="a file of one record a line is named .jsonl" if many else "correct this line",
        ) from None
    except RecursionError:
        raise DataError(
            "JSON is nested too deeply",
            where=f"{name}:{first_line}",
            allowed="records whose fields are texts or lists of turns",
        ) from None


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise DataError(
            "a record must be a JSON object", where=where, value=record, allowed="{...}"
        )
    return record


# --- rows -> messages ----------------------------------------------------------------------


def _alpaca(row: Row) -> list[Message]:
    return _single_turn(row, "instruction", "input", "output")


def _dolly(row: Row) -> list[Message]:
    return _single_turn(row, "instruction", "context", "response")


def _prompt_response(row: Row) -> list[Message]:
    response = "response" if "response" in row.fields else "completion"
    return _single_turn(row, "prompt", None, response)


def _single_turn(row: Row, ask: str, extra: str | None, response: str) -> list[Message]:
    """User turn: the instruction, a blank line, the input, as in Stanford Alpaca's data."""
    parts = [_text(row, ask), _text(row, extra) if extra else ""]
    prompt = "\n\n".join(p for p in parts if p.strip())
    if not prompt:
        raise DataError("a record asks nothing", where=row.where, value={ask: row.fields[ask]})
    system = _text(row, "system")
    turns = [("system", system)] if system.strip() else []
    turns += [("user", prompt), ("assistant", _text(row, response))]
    return [{"role": role, "content": text} for role, text in turns]


def _messages_shape(row: Row) -> list[Message]:
    return _turns(row, "messages", "role", "content", {r: r for r in ROLES})


def _sharegpt(row: Row) -> list[Message]:
    return _turns(row, "conversations", "from", "value", SHAREGPT_ROLES)


@dataclass(frozen=True)
class Shape:
    """How a kind of record becomes messages.

    Attributes:
        needs: Fields a record must have; of ``a|b`` one is enough.
        parse: Makes the messages.
    """

    needs: tuple[str, ...]
    parse: Callable[[Row], list[Message]]

    def missing(self, fields: Mapping[str, Any]) -> list[str]:
        """Needed fields that a record does not have."""
        return [n for n in self.needs if not any(f in fields for f in n.split("|"))]


SHAPES = {
    "messages": Shape(("messages",), _messages_shape),
    "sharegpt": Shape(("conversations",), _sharegpt),
    "alpaca": Shape(("instruction", "output"), _alpaca),
    "dolly": Shape(("instruction", "response"), _dolly),
    "prompt_response": Shape(("prompt", "response|completion"), _prompt_response),
}
"""Known shapes, in the order in which they are tried."""


def detect(row: Row) -> str:
    """Name of the first shape whose fields a record has.

    Raises:
        DataError: It fits none.
    """
    for name, shape in SHAPES.items():
        if not shape.missing(row.fields):
            return name
    raise DataError(
        "a record has no known shape",
        where=row.where,
        value=f"fields {', '.join(map(str, row.fields))}",
        allowed="; ".join(f"{n}: {', '.join(s.needs)}" for n, s in SHAPES.items()),
        fix="rename the fields",
    )


def _messages(row: Row, shape: str) -> tuple[Message, ...]:
    missing = SHAPES[shape].missing(row.fields)
    if missing:
        others = [n for n, s in SHAPES.items() if not s.missing(row.fields)]
        what = "a record has another shape than the rest" if others else "a record lacks a field"
        raise DataError(
            what,
            where=row.where,
            value=f"{others[0]}" if others else f"no {', '.join(missing)}",
            allowed=f"{shape}: {', '.join(SHAPES[shape].needs)}",
            fix="give all records of a pool one shape",
        )
    return tuple(SHAPES[shape].parse(row))


def _turns(row: Row, field: str, role: str, content: str, roles: dict[str, str]) -> list[Message]:
    turns = row.fields[field]
    if not isinstance(turns, list) or not turns:
        raise DataError(
            f"{field} must be a list of turns", where=row.where, value=turns, allowed="[{...}, ...]"
        )
    messages = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict) or role not in turn or content not in turn:
            raise DataError(
                "a turn lacks a field",
                where=f"{row.where}, {field}[{i}]",
                value=turn,
                allowed=f"{{{role}, {content}}}",
            )
        if turn[role] not in roles:
            raise DataError(
                "a turn has an unknown role",
                where=f"{row.where}, {field}[{i}].{role}",
                value=turn[role],
                allowed=", ".join(roles),
            )
        text = _checked_text(turn[content], f"{row.where}, {field}[{i}].{content}")
        messages.append({"role": roles[turn[role]], "content": text})
    return messages


def _text(row: Row, field: str) -> str:
    """A field's text; absent and null are the empty string."""
    return _checked_text(row.fields.get(field), f"{row.where}, field {field}")


def _checked_text(value: Any, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError("a field is not text", where=where, value=value, allowed="a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            "a text has half of a surrogate pair, which is not Unicode text",
            where=where,
            value=value[error.start : error.start + 8],
            fix="correct the \\u escapes of this field",
        ) from None
    return value


# --- messages -> candidates ----------------------------------------------------------------


def _identified(parsed: Iterable[tuple[Row, tuple[Message, ...]]], label: str) -> list[Candidate]:
    """Candidates with ids: their own, or one made from their content."""
    candidates: list[Candidate] = []
    unnamed: dict[str, list[int]] = {}
    for row, messages in parsed:
        example_id = explicit_id(row)
        if not example_id:
            example_id = content_id(label, messages)
            unnamed.setdefault(example_id, []).append(len(candidates))
        category = _text(row, "category")
        candidates.append(Candidate(example_id, row.file, category, messages, row))
    for example_id, places in unnamed.items():
        # Equal content: numbered by what else tells them apart, not by their order in the file.
        places.sort(key=lambda i: (candidates[i].category, candidates[i].source))
        for n, i in enumerate(places[1:], start=1):
            candidates[i] = replace(candidates[i], example_id=f"{example_id}-{n}")
    return candidates


def explicit_id(row: Row) -> str:
    """A record's own id, from its field ``id`` or ``example_id``; empty if it has none.

    Raises:
        DataError: The id is neither text nor an integer.
    """
    for field in ID_FIELDS:
        value = row.fields.get(field)
        if value is None or value == "":
            continue
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise DataError(
                "an id is neither text nor an integer",
                where=f"{row.where}, field {field}",
                value=value,
            )
        return _checked_text(str(value), f"{row.where}, field {field}")
    return ""


def _drop_empty(candidates: list[Candidate], on_empty: str) -> list[Candidate]:
    kept = [c for c in candidates if c.has_response]
    if on_empty == "error" and len(kept) < len(candidates):
        first = next(c for c in candidates if not c.has_response)
        raise DataError(
            "an example has no response",
            where=first.row.where,
            value=f"{len(candidates) - len(kept)} of {len(candidates)} examples",
            fix="remove them, or set pool.on_empty: drop",
        )
    return kept


def _drop_duplicates(candidates: list[Candidate], on_duplicate: str) -> list[Candidate]:
    first: dict[str, Candidate] = {}
    for candidate in candidates:
        seen = first.setdefault(candidate.example_id, candidate)
        if seen is not candidate and on_duplicate == "error":
            raise DataError(
                "two examples have one id",
                where=f"{candidate.row.where} and {seen.row.where}",
                value=candidate.example_id,
                fix="make the ids unique, or set pool.on_duplicate: drop to keep the first",
            )
    return list(first.values())
