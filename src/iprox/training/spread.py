"""A training that is spread over several processes of one machine, a GPU each.

The processes are torchrun's. On GPUs accelerate shards weights, gradients and optimizer states
among them (FSDP, ``fully_shard``), block by block; on CPUs, where accelerate shards nothing, each
has them whole (DDP). The arguments go through a JSON file, the result through another.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from iprox.data.chat import Encoded
from iprox.errors import IproxError, NumericsError
from iprox.study.schema import FinetuneSection, WarmupSection

if TYPE_CHECKING:
    Settings = WarmupSection | FinetuneSection

SECTIONS = {cls.__name__: cls for cls in (WarmupSection, FinetuneSection)}

ARGUMENTS, METRICS, PROBLEM = "arguments.json", "metrics.json", "problem.txt"

TOLD = 30
"""Lines of the processes' output that are shown when one fails."""


def count() -> int:
    """Processes that this one trains together with, itself included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process writes what all have trained."""
    return os.environ.get("RANK", "0") == "0"


def train_spread(
    processes: int, examples: Sequence[Encoded], settings: Settings, **arguments: Any
) -> dict[str, int | float]:
    """Train in several processes, as :func:`iprox.training.sft.train_folder` does in one.

    Args:
        processes: How many; each takes its share of every batch.
        examples: What is learnt from.
        settings: Epochs, learning rate, batch and the rest.
        **arguments: The other arguments of ``train_folder``, as JSON has them.

    Raises:
        NumericsError: A process failed; the message says why, or has the end of what it printed.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        told = {
            "arguments": arguments,
            "examples": [asdict(example) for example in examples],
            "section": type(settings).__name__,
            "settings": settings.model_dump(),
        }
        (folder / ARGUMENTS).write_text(json.dumps(told), encoding="utf-8")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command = [*launcher, f"--nproc-per-node={processes}", "-m", __name__, scratch]
        last: deque[str] = deque(maxlen=TOLD)
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as running:
            assert running.stdout is not None
            for line in running.stdout:
                sys.stderr.write(line)
                last.append(line)
        if running.returncode:
            known = (folder / PROBLEM).is_file()
            told_by = (folder / PROBLEM).read_text(encoding="utf-8") if known else "".join(last)
            raise NumericsError(
                f"one of {processes} processes that trained together failed: {told_by}",
                where=arguments.get("label"),
            )
        metrics: dict[str, int | float] = json.loads((folder / METRICS).read_text())
        return metrics


def sharding(model: Any) -> dict[str, Any]:
    """Arguments of the Trainer that shard a model among processes with GPUs; none on a CPU.

    Args:
        model: A ``PreTrainedModel``, whose blocks are gathered one at a time.
    """
    if count() == 1 or not torch.cuda.is_available():
        return {}
    blocks = sorted(model._no_split_modules or [])
    wrap = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "transformer_layer_cls_to_wrap": blocks}
    return {"fsdp": True, "fsdp_config": {"version": 2, **wrap}}


def gathered(trainer: Any) -> dict[str, Tensor]:
    """All weights of a trained model on the first process; every process must ask.

    Args:
        trainer: The ``transformers.Trainer`` that trained it.
    """
    return dict(trainer.accelerator.get_state_dict(trainer.model_wrapped))


def main(folder: Path) -> None:
    """One of the processes."""
    from iprox.training.sft import train_folder

    told = json.loads((folder / ARGUMENTS).read_text(encoding="utf-8"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    arguments = told["arguments"]
    metrics = train_folder(
        Path(arguments.pop("source")),
        Path(arguments.pop("out")),
        [Encoded(**example) for example in told["examples"]],
        SECTIONS[told["section"]].model_validate(told["settings"]),
        **arguments,
    )
    if is_first():
        (folder / METRICS).write_text(json.dumps(metrics), encoding="utf-8")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except IproxError as error:
        (Path(sys.argv[1]) / PROBLEM).write_text(str(error), encoding="utf-8")
        raise
