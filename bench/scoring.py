"""Cost of exact scoring as a ratio to one plain pass.

Usage: python bench/scoring.py STUDY_FOLDER [RUN]

Times, in turn and in one process, on the texts of the study's own pool:

    floor   forward and backward with frozen weights, loss at response tokens only
    target  exact dots with two queries and norms, on the target
    proxy   the same on the proxy of RUN

and prints the median of each as a ratio to the floor. Absolute times of a shared machine mean
little; the ratio of things timed beside each other does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from iprox.data.batches import collate, token_batches
from iprox.data.chat import pad_id
from iprox.engine.loss import Batch, example_losses, input_embeddings
from iprox.engine.scoring import Scorer, batch_tokens
from iprox.models.device import pick_device, set_threads
from iprox.models.layers import scored_linears
from iprox.models.load import load_model, load_tokenizer
from iprox.stages.texts import pool_ids, pool_texts
from iprox.study.schema import ChatSection, LayersSection


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("study", type=Path, help="for example results/studies/demo")
    parser.add_argument("run", nargs="?", default="iprox", help="a run with a proxy")
    parser.add_argument("--examples", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    set_threads(args.threads)
    device = pick_device()
    target = load_model(args.study / "target", device=device)
    proxy = load_model(args.study / args.run / "proxy", device=device)
    batches = read_batches(args.study, args.examples, device)
    tasks = {
        "floor": lambda: [plain(target, batch) for batch in batches],
        "target": scoring(target, batches),
        "proxy": scoring(proxy, batches),
    }
    seconds = in_turn(tasks, args.repeats)
    tokens = sum(int(batch.lengths.sum()) for batch in batches)
    print(f"{args.examples} examples, {tokens} tokens, {args.threads} threads, {device}")
    for name, values in seconds.items():
        middle = statistics.median(values)
        ratio = middle / statistics.median(seconds["floor"])
        print(f"{name:7} {middle:7.2f} s  {tokens / middle:7.0f} tokens/s  {ratio:5.2f} x floor")


def read_batches(study: Path, n_examples: int, device: torch.device) -> list[Batch]:
    """The first examples of the study's pool, as the features stage batches them."""
    tokenizer, pool = load_tokenizer(study / "target"), study / "pool"
    chat = ChatSection(max_length=512)
    encoded = pool_texts(pool, pool_ids(pool)[:n_examples], tokenizer, chat).encoded
    groups = token_batches([len(e) for e in encoded], batch_tokens(device))
    pad = pad_id(tokenizer)
    return [Batch(*collate([encoded[i] for i in group], pad)).to(device) for group in groups]


def plain(model: Any, batch: Batch) -> None:
    """One forward and one backward pass with frozen weights."""
    embeds = input_embeddings(model, batch)
    torch.autograd.backward(example_losses(model, batch, embeds=embeds).sum(), inputs=[embeds])


def scoring(model: Any, batches: list[Batch]) -> Callable[[], object]:
    """Exact scores against two random queries."""
    layers = scored_linears(model, LayersSection())
    queries = {
        n: torch.randn(2, *layer.weight.shape).to(layer.weight) for n, layer in layers.items()
    }
    scorer = Scorer(model, layers, queries)
    return lambda: [scorer.score(batch) for batch in batches]


def in_turn(tasks: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every task, run in turn so that a drifting machine hits all alike."""
    for task in tasks.values():
        task()
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return seconds


if __name__ == "__main__":
    main()
