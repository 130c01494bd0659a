"""Environment variables that every job of the workflow inherits."""

from __future__ import annotations

import os
from pathlib import Path


def prepare_jobs(source: Path) -> None:
    """Set what jobs inherit from the process that plans them.

    Args:
        source: Folder of this package's sources. A job in an environment made of the lock alone
            finds the package there.
    """
    known = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(source), *([known] if known else [])])
    # Jobs write progress lines of their own; libraries' bars of several jobs would mix.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
