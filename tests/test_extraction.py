"""Layer extraction: block influence, which blocks stay, and the model that is left."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from artifacts import CHAT, job, random_examples, write_pool, write_split, write_task
from conftest import ARCHITECTURES, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from iprox.engine.blocks import block_influence
from iprox.engine.loss import Batch, hidden_states
from iprox.errors import ArtifactError, ConfigError, ModelError, NumericsError
from iprox.models.blocks import decoder_blocks, with_blocks
from iprox.models.load import load_model, load_tokenizer
from iprox.numerics.blocks import direction_changes, most_influential
from iprox.numerics.ranks import blocks_kept
from iprox.stages import extraction, features, fidelity, query
from iprox.stages.texts import pool_texts
from iprox.store.job import Job
from iprox.store.manifest import describe
from iprox.store.tables import read_table
from iprox.study.schema import ChatSection

EXAMPLES = random_examples(8)
PROBE = ["e003", "e000", "e004", "e001"]


@pytest.mark.parametrize(
    ("blocks", "sparsity", "kept"),
    [
        (28, 0.3, 20),
        (34, 0.3, 24),
        (36, 0.3, 25),
        (28, 0.9, 3),
        (5, 0.5, 3),  # halves go up
        (4, 0.99, 1),  # and one always stays
    ],
)
def test_how_many_blocks_stay(blocks: int, sparsity: float, kept: int) -> None:
    assert blocks_kept(blocks, sparsity) == kept


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 1.5])
def test_a_sparsity_outside_its_range_is_refused(sparsity: float) -> None:
    with pytest.raises(ConfigError, match="sparsity is out of range"):
        blocks_kept(28, sparsity)


def test_a_sparsity_that_drops_nothing_is_refused() -> None:
    assert blocks_kept(28, 0.02) == 27
    with pytest.raises(ConfigError, match=r"(?s)no block is dropped.*0\.0179"):
        blocks_kept(28, 0.01)


def test_the_most_influential_stay_in_order() -> None:
    influence = [0.5, 0.1, 0.9, 0.0, 0.3]
    assert most_influential(influence, 3) == [0, 2, 4]
    assert most_influential([0.2, 0.2, 0.2], 2) == [0, 1]
    with pytest.raises(NumericsError, match="block 1"):
        most_influential([0.1, float("nan"), 0.2], 1)


def test_a_change_of_direction_is_one_minus_the_cosine() -> None:
    before, after = torch.randn(2, 7, 5, dtype=torch.float64)
    expected = 1 - torch.nn.functional.cosine_similarity(before, after)
    torch.testing.assert_close(direction_changes(before, after), expected)
    assert not direction_changes(before, before).any()
    assert direction_changes(before, 3 * before).abs().max() < 1e-15
    torch.testing.assert_close(direction_changes(before, -before), torch.full((7,), 2.0).double())


def batch_of(lengths: list[int]) -> Batch:
    ids = torch.randint(4, 260, (len(lengths), max(lengths)))
    for row, length in enumerate(lengths):
        ids[row, length:] = 0
    return Batch(ids, ids.clone(), torch.tensor(lengths))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_block_influence_is_the_mean_over_real_tokens(architecture: str) -> None:
    model = tiny_model(architecture)
    batches = [batch_of([5, 9, 7]), batch_of([4])]
    changes: list[list[float]] = [[], []]
    for batch in batches:
        for row, length in enumerate(batch.lengths.tolist()):
            alone = Batch(
                *(t[row : row + 1, :length] for t in batch[:2]), batch.lengths[row : row + 1]
            )
            for place, (before, after) in enumerate(streams(model, alone)):
                cosines = torch.nn.functional.cosine_similarity(before, after)
                changes[place] += (1 - cosines).tolist()
    assert len(changes[0]) == 25
    found = block_influence(model, batches)
    np.testing.assert_allclose(found.numpy(), np.mean(changes, axis=1), rtol=1e-6, atol=1e-9)


def streams(model: Any, batch: Batch) -> list[tuple[Tensor, Tensor]]:
    """Residual stream (tokens, hidden) before and after each block, of one example."""
    n = model.config.num_hidden_layers
    states = [
        hidden_states(_without_norm(model, count), batch)[0].detach() for count in range(1, n + 1)
    ]
    first = model.get_input_embeddings()(batch.input_ids)[0].detach()
    return list(zip([first, *states[:-1]], states, strict=True))


def _without_norm(model: Any, count: int) -> Any:
    """The model's first blocks, and nothing after them."""
    smaller = with_blocks(model, range(count))
    smaller.base_model.norm = nn.Identity()
    return smaller


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_block_that_does_nothing_is_dropped_first(architecture: str) -> None:
    model = tiny_model(architecture, num_hidden_layers=4, **_windows(architecture, 4))
    silenced(decoder_blocks(model)[2])
    influence = block_influence(model, [batch_of([6, 8])])
    assert influence[2] == 0
    assert (influence[[0, 1, 3]] > 0).all()
    assert most_influential(influence.tolist(), 3) == [0, 1, 3]


def silenced(block: nn.Module) -> None:
    """Make a block the identity: nothing is added to the residual stream."""
    for name, parameter in block.named_parameters():
        if name.startswith(("self_attn.o_proj", "mlp.down_proj")):
            torch.nn.init.zeros_(parameter)


def _windows(architecture: str, blocks: int) -> dict[str, Any]:
    types = ["sliding_attention", "full_attention"]
    return (
        {"layer_types": [types[i // 2 % 2] for i in range(blocks)]}
        if architecture == "gemma3"
        else {}
    )


@pytest.mark.parametrize("kept", [[0, 2, 3], [1, 4], [5]], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_model_that_is_left_computes_with_the_kept_blocks(
    architecture: str, kept: list[int], tmp_path: Path
) -> None:
    model = tiny_model(architecture, num_hidden_layers=6, **_windows(architecture, 6))
    smaller = with_blocks(model, kept)
    smaller.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, torch.float64, "eager")
    assert loaded.config.num_hidden_layers == len(kept)
    # windows are longer than 16 tokens, where sliding attention differs from full
    ids = torch.randint(4, 260, (2, 40))
    by_hand = tiny_model(architecture, num_hidden_layers=6, **_windows(architecture, 6))
    by_hand.model.layers = nn.ModuleList([by_hand.model.layers[i] for i in kept])
    by_hand.config.num_hidden_layers = len(kept)
    if architecture == "gemma3":
        original = model.config.layer_types
        assert loaded.config.layer_types == [original[i] for i in kept]
        by_hand.config.layer_types = [original[i] for i in kept]
    with torch.no_grad():
        expected = by_hand(input_ids=ids, use_cache=False).logits
        found = loaded(input_ids=ids, use_cache=False).logits
        # rotary angles are in float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        # numbered anew, blocks find their place in a cache
        steps = loaded.generate(ids[:1, :20], max_new_tokens=4, do_sample=False, pad_token_id=0)
        greedy = ids[:1, :20]
        for _ in range(steps.shape[1] - 20):
            logits = loaded(input_ids=greedy, use_cache=False).logits
            greedy = torch.cat([greedy, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(steps, greedy)


def test_blocks_that_are_not_there_are_refused() -> None:
    model = tiny_model()
    for kept in ([], [0, 2], [1, 0], [0, 0]):
        with pytest.raises(ModelError, match="blocks to keep"):
            with_blocks(model, kept)
    model.base_model.layers = nn.Sequential(*model.base_model.layers)
    with pytest.raises(ModelError, match="no decoder blocks"):
        decoder_blocks(model)


# --- the stage -------------------------------------------------------------------------------


@pytest.fixture
def parents(tmp_path: Path) -> dict[str, Path]:
    warmup = tmp_path / "warmup"
    tiny_model(dtype=torch.float32, num_hidden_layers=4).save_pretrained(warmup)
    tiny_tokenizer().save_pretrained(warmup)
    weights = load_file(warmup / "model.safetensors")
    for name in weights:
        if name.startswith("model.layers.1.") and name.endswith(
            ("o_proj.weight", "down_proj.weight")
        ):
            weights[name] = torch.zeros_like(weights[name])
    save_file(weights, warmup / "model.safetensors", metadata={"format": "pt"})
    return {
        "pool": write_pool(tmp_path / "pool", EXAMPLES),
        "split": write_split(tmp_path / "split", "probe", PROBE),
        "warmup": warmup,
    }


def extract(out: Path, parents: dict[str, Path], sparsity: float) -> dict[str, Any]:
    settings = {"kind": "layers", "sparsity": sparsity}
    return extraction.make(job("extraction", out, parents, extraction=settings))


def test_the_stage_keeps_what_matters_most(tmp_path: Path, parents: dict[str, Path]) -> None:
    metrics = extract(tmp_path / "out", parents, 0.25)
    table = read_table(tmp_path / "out" / "blocks.parquet")
    assert table["kept"].tolist() == [True, False, True, True]
    assert table["place"].tolist() == [0, -1, 1, 2]
    assert table["influence"][1] == 0
    texts = pool_texts(parents["pool"], PROBE, tiny_tokenizer(), ChatSection(**CHAT))
    n_tokens = sum(map(len, texts.encoded))
    assert (metrics["blocks"], metrics["kept_blocks"], metrics["tokens"]) == (4, 3, n_tokens)
    target, smaller = load_model(parents["warmup"]), load_model(tmp_path / "out")
    count = {m: sum(p.numel() for p in m.parameters()) for m in (target, smaller)}
    norms = 2 * 32
    assert count[target] - count[smaller] == table["parameters"][1] + norms
    assert metrics["parameters"] == count[smaller]
    # the dropped block did nothing, so nothing changes
    ids = torch.randint(4, 260, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(smaller(input_ids=ids).logits, target(input_ids=ids).logits)
    assert load_tokenizer(tmp_path / "out")("red")["input_ids"] == tiny_tokenizer()("red").input_ids


def test_the_same_job_writes_the_same_bytes(tmp_path: Path, parents: dict[str, Path]) -> None:
    for name in ("a", "b"):
        extract(tmp_path / name, parents, 0.5)
    first, second = (describe("extraction", tmp_path / n).content for n in ("a", "b"))
    assert first == second


def test_mistakes_of_the_stage_are_named(tmp_path: Path, parents: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match="no block is dropped"):
        extract(tmp_path / "none", parents, 0.1)
    other = parents | {"split": write_split(tmp_path / "other", "align", PROBE)}
    with pytest.raises(ArtifactError, match="no examples"):
        extract(tmp_path / "out", other, 0.5)


def scored(folder: Path, name: str, model: Path, parents: dict[str, Path], task: Path) -> Path:
    """Features of the whole pool at a model, against the queries of a task there."""
    made = {"model": model, "task": task}
    query.make(job("query", folder / f"{name}-query", made))
    inputs = {"model": model, "pool": parents["pool"], "query/own": folder / f"{name}-query"}
    shards = job("features", folder / f"{name}-features", inputs, subset={"name": "all"})
    features.make(shards)
    (shards.out / "shard.zarr").rename(shards.out / "shard-00000.zarr")
    return shards.out


def test_everything_after_it_takes_it_as_any_proxy(
    tmp_path: Path, parents: dict[str, Path]
) -> None:
    extract(tmp_path / "quarter", parents, 0.25)  # drops the block that does nothing
    extract(tmp_path / "half", parents, 0.5)
    task = write_task(
        tmp_path / "task", [("s", "one red cat", "blue dog"), ("s", "two runs", "over bird")]
    )
    reference = scored(tmp_path, "target", parents["warmup"], parents, task)
    found = {}
    for name in ("quarter", "half"):
        passes = {
            "proxy": scored(tmp_path, name, tmp_path / name, parents, task),
            "target": reference,
        }
        settings = {"fidelity": {"bootstrap": 10}, "influence": {}}
        out = tmp_path / f"{name}-fidelity"
        out.mkdir()
        found[name] = fidelity.make(Job("fidelity", settings, passes, out))
    assert found["quarter"]["examples"] == len(EXAMPLES)
    assert found["quarter"]["loss_retention"] == pytest.approx(1, abs=1e-6)
    assert found["half"]["loss_retention"] != pytest.approx(1, abs=1e-6)
    assert -1 <= float(found["half"]["spearman"]) <= 1
