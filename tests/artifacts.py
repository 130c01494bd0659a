"""Small parent artifacts for tests of stages, and stage jobs on them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import torch
from conftest import tiny_tokenizer
from oracles import exact_model

from iprox.data.pools import text_hash
from iprox.models.layers import scored_linears
from iprox.stages.passes import Reader
from iprox.store.job import Job
from iprox.store.tables import write_table
from iprox.study.schema import LayersSection

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
CHAT = {"template": "tulu", "max_length": 64}


def turns(prompt: str, response: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": response}]


def write_pool(folder: Path, examples: dict[str, tuple[str, str]]) -> Path:
    """A pool of (prompt, response) by id."""
    folder.mkdir()
    ids = sorted(examples)
    table = pa.table(
        {
            "example_id": pa.array(ids),
            "messages": pa.array([turns(*examples[i]) for i in ids], MESSAGES),
            "text_hash": pa.array([text_hash(turns(*examples[i])) for i in ids]),
        }
    )
    write_table(folder / "pool.parquet", table)
    return folder


def write_split(folder: Path, name: str, ids: Sequence[str]) -> Path:
    folder.mkdir()
    rows = {"example_id": list(ids), "split": name, "position": range(len(ids))}
    write_table(folder / "split.parquet", pd.DataFrame(rows))
    return folder


def write_task(folder: Path, queries: Sequence[tuple[str, str, str]]) -> Path:
    """A task of (subtask, prompt, completion)."""
    folder.mkdir()
    table = pa.table(
        {
            "example_id": [f"q{i}" for i in range(len(queries))],
            "subtask": [subtask for subtask, _, _ in queries],
            "messages": pa.array([turns(p, c) for _, p, c in queries], MESSAGES),
            "prefix": [""] * len(queries),
            "eos": [False] * len(queries),
        }
    )
    write_table(folder / "queries.parquet", table)
    return folder


def exact_reader() -> Reader:
    """A tiny model in true float64, as stages get it from ``open_reader``."""
    model = exact_model()
    layers = scored_linears(model, LayersSection())
    return Reader(model, tiny_tokenizer(), layers, torch.device("cpu"))


def job(
    stage: str,
    out: Path,
    parents: dict[str, Path],
    rows: tuple[int, int] | None = None,
    **params: Any,
) -> Job:
    """A job of ``stage`` that writes into a new folder ``out``."""
    out.mkdir()
    standard = {
        "chat": CHAT,
        "compute": {"attention": "sdpa", "dtype": "float32"},
        "influence": {},
        "layers": {},
    }
    return Job(stage, standard | params, parents, out, rows)


WORDS = "red green blue one two three four cat dog bird runs sleeps sings under over".split()


def random_examples(n: int, seed: int = 0) -> dict[str, tuple[str, str]]:
    """Examples of a few words each, of different lengths."""
    generator = torch.Generator().manual_seed(seed)

    def text(most: int) -> str:
        length = int(torch.randint(1, most, (1,), generator=generator))
        picks = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[i] for i in picks)

    return {f"e{i:03d}": (text(4), text(6)) for i in range(n)}
