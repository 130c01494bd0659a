"""Scores in bfloat16 rank examples as those in float32 do."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ARCHITECTURES, tiny_model
from oracles import random_batch
from scipy.stats import spearmanr
from torch import Tensor, nn

from iprox.data.batches import collate, token_batches
from iprox.data.chat import Encoded, encode
from iprox.data.pools import build_pool
from iprox.data.sources import resolve
from iprox.data.tasks import build_task
from iprox.engine.gradients import mean_gradient
from iprox.engine.loss import Batch, hidden_states
from iprox.engine.packed import pack, packed_states
from iprox.engine.residual import wide_residuals
from iprox.engine.scoring import Scorer
from iprox.models.layers import scored_linears
from iprox.stages.target import load_target
from iprox.study.schema import LayersSection, PoolSection, TargetSection, TaskSection

LENGTHS, PROMPTS = [21, 13], [7, 11]


@torch.no_grad()
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_wide_residual_stream_is_closer_to_the_exact_states(architecture: str) -> None:
    changes = {} if architecture == "gemma3" else {"num_hidden_layers": 8}
    narrow = tiny_model(architecture, dtype=torch.bfloat16, **changes)
    exact = copy.deepcopy(narrow).double()
    batch = random_batch(LENGTHS, PROMPTS)
    expected = packed_states(exact, pack(batch))
    plain = torch.cat([hidden_states(narrow, batch)[i, :n] for i, n in enumerate(LENGTHS)])
    wide = packed_states(narrow, pack(batch))
    assert wide.dtype == torch.float32
    error = {name: float((s - expected).norm()) for name, s in [("plain", plain), ("wide", wide)]}
    assert error["wide"] < 0.9 * error["plain"]


def test_hooks_are_gone_afterwards_and_other_precisions_are_left_alone() -> None:
    model = tiny_model(dtype=torch.bfloat16)
    with wide_residuals(model):
        assert any(m._forward_hooks for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    with wide_residuals(model.float()):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_layers_that_read_the_stream_itself_get_rows_of_their_precision() -> None:
    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.first = nn.Embedding(7, 4), nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)

        def forward(self, ids: Tensor) -> Tensor:
            stream = self.embed(ids)
            assert stream.dtype == torch.float32
            return self.norm(stream + self.first(stream))

    class Model(nn.Module):
        dtype = torch.bfloat16

        def __init__(self) -> None:
            super().__init__()
            self.base_model = Body()

        def get_input_embeddings(self) -> nn.Module:
            return self.base_model.embed

    model = Model().to(torch.bfloat16)
    with wide_residuals(model):
        assert model.base_model(torch.arange(5)).isfinite().all()


@pytest.mark.model
@pytest.mark.usefixtures("smollm2_package")
def test_smollm2_ranks_in_bfloat16_as_in_float32(tmp_path: Path, shared_data: Path) -> None:
    """Both passes have the same weights, which bfloat16 holds exactly, as most checkpoints'."""
    model, tokenizer = load_target(TargetSection(model="smollm2-135m"), tmp_path, tmp_path)
    model = model.to(torch.bfloat16).float().eval().requires_grad_(False)
    section = PoolSection(path="dolly/dolly_15k.parquet", limit=100, max_chars=700)
    pool = build_pool(resolve(section, shared_data, tmp_path), section).candidates
    texts = [encode(list(c.messages), tokenizer, "tokenizer", 256) for c in pool]
    texts = [t for t in texts if t.supervised and len(t) < 220][:72]
    assert len(texts) >= 64
    queries = _queries(model, tokenizer, tmp_path)
    exact = _cosines(model, queries, texts)
    rough = _cosines(model.to(torch.bfloat16), queries, texts)
    for column in range(exact.shape[1]):
        assert spearmanr(exact[:, column], rough[:, column]).statistic >= 0.999


def _queries(model: Any, tokenizer: Any, folder: Path) -> dict[str, Tensor]:
    """Mean gradients of MMLU and BBH examples, layer -> (2, out, in)."""
    layers = scored_linears(model, LayersSection())
    tasks = [
        TaskSection(name="mmlu", kind="mmlu", queries=16),
        TaskSection(name="bbh", kind="bbh", queries=5, shots=0),
    ]
    means = []
    for task in tasks:
        examples = [
            encode(q.messages, tokenizer, "tokenizer", 512, prefix=q.prefix, eos=q.eos)
            for q in build_task(task, folder).queries
        ]
        weight = torch.full((1,), 1 / len(examples), dtype=torch.float64)
        batches = [(_batch([e]), weight, None) for e in examples if e.supervised]
        means.append(mean_gradient(model, layers, batches))
    return {name: torch.stack([mean[name] for mean in means]) for name in layers}


def _cosines(model: Any, queries: dict[str, Tensor], texts: list[Encoded]) -> Tensor:
    """Cosines up to the queries' norms, (examples, tasks)."""
    scorer = Scorer(model, scored_linears(model, LayersSection()), queries)
    cosines = torch.zeros(len(texts), 2, dtype=torch.float64)
    for group in token_batches([len(t) for t in texts], 512):
        scores = scorer.score(_batch([texts[i] for i in group]))
        cosines[group] = scores.dots / scores.squared_norms.sqrt()[:, None]
    return cosines


def _batch(examples: list[Encoded]) -> Batch:
    return Batch(*collate(examples, 0))
