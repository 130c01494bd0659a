"""The study file described for editors and for people: a JSON schema and a table of all keys.

Both are generated from the classes of :mod:`iprox.study.schema`, so a key is written down
once. ``iprox schema --write`` stores them in the repository and a test compares the two.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from iprox.errors import ConfigError

SCHEMA_FILE = Path("workflow/schemas/config.schema.json")
README_FILE = Path("config/README.md")
BEGIN = "<!-- keys: written by `iprox schema --write`; do not edit below -->"
END = "<!-- end of keys -->"

Schema = dict[str, Any]


def json_schema() -> Schema:
    """JSON schema (draft 2020-12) of a study file; unknown keys are refused at every level.

    Defaults stand in the descriptions and not in ``default``: a validator that fills those in
    would put a default over the value of a preset.
    """
    raw = _raw_schema()
    definitions: Schema = raw["$defs"]
    properties = raw["properties"]
    shared = {
        key: _described(spec) if key in raw["required"] else _or_nothing(_described(spec))
        for key, spec in properties.items()
    }
    sections = {name: _closed(spec) for name, spec in definitions.items()}
    sections["TaskSection"] = _task(sections["TaskSection"])
    grids = {f"{name}Grid": _grid(definitions[name], definitions) for name in _run_sections(raw)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "IProX-flow study",
        "description": raw["description"],
        "type": "object",
        "additionalProperties": False,
        "required": raw["required"],
        "properties": shared | {"tasks": _tasks(shared["tasks"]), "runs": _runs(shared["runs"])},
        "$defs": sections | grids | {"Run": _run(raw, definitions)},
    }


def key_table() -> str:
    """Markdown tables of every key: path, type or choices, default and meaning, by section."""
    raw = _raw_schema()
    definitions: Schema = raw["$defs"]
    overridable = _run_keys()
    general = {k: s for k, s in raw["properties"].items() if _section_of(s, definitions) is None}
    parts = [_heading("The study", "Keys at the top of the file."), _rows("", general, raw)]
    for key, spec in raw["properties"].items():
        section = _section_of(spec, definitions) or _item_section(spec, definitions)
        if section is None:
            continue
        note = "A run may override these keys." if key in overridable else "The same for all runs."
        path = f"{key}[]." if spec.get("type") == "array" else f"{key}."
        parts.append(_heading(f"`{key}`", f"{section['description']} {note}"))
        parts.append(_rows(path, section["properties"], section, definitions))
    parts += [
        _heading("Presets", "What `preset:` sets; all other keys keep their default."),
        _presets(),
    ]
    return "\n\n".join(parts) + "\n"


def schema_text() -> str:
    """The JSON schema as it is stored: indented, with a final newline."""
    return json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"


def readme_text(current: str) -> str:
    """``config/README.md`` with the text between its markers replaced by the table of keys.

    Raises:
        ConfigError: The markers are not there, or not in order.
    """
    head, found_begin, rest = current.partition(BEGIN)
    _, found_end, tail = rest.partition(END)
    if not (found_begin and found_end):
        raise ConfigError(
            "the table of keys has no place in this file",
            where=README_FILE,
            allowed=f"a line {BEGIN} and after it a line {END}",
        )
    return f"{head}{BEGIN}\n\n{key_table()}\n{END}{tail}"


def write_documents(root: Path) -> list[Path]:
    """Write the JSON schema and the table of keys below the project's folder.

    Returns:
        The two files written.

    Raises:
        ConfigError: ``root`` is not the folder of this project.
    """
    readme, schema = root / README_FILE, root / SCHEMA_FILE
    if not readme.is_file():
        raise ConfigError(
            "the schema can only be written in the folder of the workflow",
            where=root.resolve(),
            allowed=f"a folder with {README_FILE}",
            fix="change to the folder of the Snakefile, or print the schema without --write",
        )
    text = readme_text(readme.read_text(encoding="utf-8"))
    schema.parent.mkdir(parents=True, exist_ok=True)
    schema.write_text(schema_text(), encoding="utf-8")
    readme.write_text(text, encoding="utf-8")
    return [schema, readme]


# --- the JSON schema -------------------------------------------------------------------------


_BOUNDS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum"}
"""Pydantic's names of bounds, which it leaves untranslated on a union of numbers."""


def _raw_schema() -> Schema:
    """Pydantic's own schema of a study."""
    from iprox.study.schema import StudyConfig

    def translated(part: Any) -> Any:
        if isinstance(part, list):
            return [translated(item) for item in part]
        if not isinstance(part, dict):
            return part
        union = "anyOf" in part
        return {_BOUNDS.get(k, k) if union else k: translated(v) for k, v in part.items()}

    return dict(translated(StudyConfig.model_json_schema()))


def _run_keys() -> frozenset[str]:
    from iprox.study.schema import RunConfig

    return frozenset(RunConfig.model_fields)


def _run_sections(raw: Schema) -> list[str]:
    """Names of the section classes that a run may override, nested ones included."""
    definitions: Schema = raw["$defs"]
    pending = [_reference(raw["properties"][key]) for key in sorted(_run_keys())]
    found: list[str] = []
    while pending:
        name = pending.pop()
        if name is not None and name not in found:
            found.append(name)
            pending += [_reference(spec) for spec in definitions[name]["properties"].values()]
    return sorted(found)


def _reference(spec: Schema) -> str | None:
    """Name of the class a property refers to: directly, or beside null."""
    for option in [spec, *spec.get("anyOf", [])]:
        if "$ref" in option:
            return str(option["$ref"]).rsplit("/", 1)[-1]
    return None


def _closed(definition: Schema) -> Schema:
    """One section class without titles, its defaults told in words."""
    properties = {key: _described(spec) for key, spec in definition["properties"].items()}
    return {**_without(definition, "title"), "properties": properties}


def _described(spec: Schema) -> Schema:
    """A property with its default moved into the description."""
    plain = _without(spec, "title", "default")
    default = spec.get("default")
    if "$ref" not in spec and default is not None:
        description = spec.get("description", "")
        plain["description"] = f"{description} Default: {_yaml(default)}.".strip()
    return plain


def _or_nothing(spec: Schema) -> Schema:
    """A key that may stand empty: YAML's null, which a section of comments only amounts to."""
    value, nothing = _without(spec, "description"), {"type": "null"}
    if nothing in value.get("anyOf", []):
        return spec
    description = {"description": spec["description"]} if "description" in spec else {}
    return {**description, "anyOf": [value, nothing]}


def _grid(definition: Schema, definitions: Schema) -> Schema:
    """A section class inside a run: each key takes its value, or a list of values.

    A key whose value is itself a list takes that list; the preset of a run is one name.
    """
    properties: Schema = {}
    for key, spec in definition["properties"].items():
        described = _described(spec)
        name = _reference(spec)
        if name is not None and name in definitions:
            properties[key] = {**described, "$ref": f"#/$defs/{name}Grid"}
        elif spec.get("type") == "array" or key == "preset":
            properties[key] = described
        else:
            properties[key] = _value_or_list(described)
    return {
        **_without(definition, "title", "required"),
        "properties": properties,
    }


def _value_or_list(spec: Schema) -> Schema:
    value = _without(spec, "description")
    several = {"type": "array", "minItems": 1, "items": value}
    return {"description": spec.get("description", ""), "anyOf": [value, several]}


def _run(raw: Schema, definitions: Schema) -> Schema:
    """One entry of ``runs``: any section a run may override, each value possibly a grid."""
    keys = _run_keys()
    chosen = {key: spec for key, spec in raw["properties"].items() if key in keys}
    shape = {
        "description": "Overrides of one run.",
        "type": "object",
        "additionalProperties": False,
    }
    return _grid({**shape, "properties": chosen}, definitions)


def _tasks(spec: Schema) -> Schema:
    """Tasks are known names, or mappings."""
    from iprox.study.load import KNOWN_TASKS

    names = {"enum": sorted(KNOWN_TASKS)}
    return {**spec, "items": {"anyOf": [names, spec["items"]]}}


def _task(section: Schema) -> Schema:
    """A task's mapping may leave out the kind when the project knows the name."""
    from iprox.study.load import KNOWN_TASKS

    known = {"properties": {"name": {"enum": sorted(KNOWN_TASKS)}}}
    return {**section, "required": ["name"], "if": known, "else": {"required": ["kind"]}}


def _runs(spec: Schema) -> Schema:
    """Runs by name; a name that could not be a folder is refused."""
    (pattern,) = spec.get("patternProperties") or {spec["propertyNames"]["pattern"]: None}
    kept = _without(spec, "propertyNames", "patternProperties")
    run = {"anyOf": [{"$ref": "#/$defs/Run"}, {"type": "null"}]}
    return {**kept, "additionalProperties": False, "patternProperties": {pattern: run}}


def _without(spec: Schema, *keys: str) -> Schema:
    return {key: value for key, value in spec.items() if key not in keys}


# --- the table of keys -----------------------------------------------------------------------


def _heading(title: str, text: str) -> str:
    return f"### {title}\n\n{text}"


def _section_of(spec: Schema, definitions: Schema) -> Schema | None:
    name = _reference(spec)
    return None if name is None else definitions[name]


def _item_section(spec: Schema, definitions: Schema) -> Schema | None:
    return _section_of(spec["items"], definitions) if spec.get("type") == "array" else None


def _rows(prefix: str, properties: Schema, owner: Schema, definitions: Schema | None = None) -> str:
    lines = ["| Key | Type or choices | Default | Meaning |", "| --- | --- | --- | --- |"]
    return "\n".join(lines + list(_lines(prefix, properties, owner, definitions or {})))


def _lines(prefix: str, properties: Schema, owner: Schema, definitions: Schema) -> Iterator[str]:
    for key, spec in properties.items():
        nested = _section_of(spec, definitions) if definitions else None
        default = _default(spec, required=key in owner.get("required", []))
        kind = "section" if nested else _kind(spec)
        meaning = spec.get("description", "")
        cells = [f"`{prefix}{key}`", kind, "see below" if nested and default else default, meaning]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
        if nested:
            yield from _lines(f"{prefix}{key}.", nested["properties"], nested, definitions)


def _default(spec: Schema, required: bool) -> str:
    if required:
        return "required"
    default = spec.get("default")
    return "" if default is None else f"`{_yaml(default)}`"


def _yaml(value: Any) -> str:
    """A value as one would write it in YAML (where ``1e-5`` would be text, ``1.0e-5`` a number)."""
    if isinstance(value, str):
        return value
    if isinstance(value, float) and "e" in repr(value):
        mantissa, exponent = repr(value).split("e")
        return f"{float(mantissa)}e{int(exponent)}"
    return json.dumps(value)


def _presets() -> str:
    """A row for each key that some preset sets, a column for each preset."""
    from iprox.study.load import flatten
    from iprox.study.presets import PRESETS
    from iprox.study.schema import RunConfig

    values = {name: flatten(preset) for name, preset in PRESETS.items()}
    values["default"] = flatten(RunConfig.model_validate({}).model_dump())
    keys = sorted({key for name in PRESETS if name != "default" for key in values[name]})
    lines = [f"| Key | {' | '.join(f'`{name}`' for name in PRESETS)} |"]
    lines.append(f"| --- |{' --- |' * len(PRESETS)}")
    for key in keys:
        cells = [values[name].get(key, values["default"][key]) for name in PRESETS]
        lines.append(f"| `{key}` | {' | '.join(f'`{_yaml(cell)}`' for cell in cells)} |")
    return "\n".join(lines)


def _kind(spec: Schema) -> str:
    """A property's type in words: choices, or a type with its range."""
    if "enum" in spec:
        return _either([f"`{_yaml(choice)}`" for choice in spec["enum"]])
    if "const" in spec:
        return f"`{_yaml(spec['const'])}`"
    if "anyOf" in spec:
        return _either([_kind(s) for s in spec["anyOf"] if s.get("type") != "null"]) + _range(spec)
    if "$ref" in spec:
        return "mapping"
    if spec.get("type") == "array":
        return f"list of {_plural(_kind(spec['items']))}"
    names = {"string": "text", "object": "mapping", "boolean": "`true` or `false`"}
    kind = str(spec.get("type", "any"))
    return names.get(kind, kind) + _range(spec)


def _plural(kind: str) -> str:
    word, *bounds = kind.split(" ", 1)
    return " ".join([word if word == "text" else f"{word}s", *bounds])


def _range(spec: Schema) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "exclusiveMaximum": "<", "maximum": "≤"}
    bounds = [f"{sign} {_yaml(spec[key])}" for key, sign in signs.items() if key in spec]
    return f" {', '.join(bounds)}" if bounds else ""


def _either(choices: list[str]) -> str:
    unique = list(dict.fromkeys(choices))
    return " or ".join([", ".join(unique[:-1]), unique[-1]] if len(unique) > 1 else unique)
