"""IProX-flow: choose fine-tuning data by gradient influence, through proxies of the target.

Importing this package loads neither torch nor transformers; what needs them is loaded when
it is first used.
"""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "load_proxy"]


def __getattr__(name: str) -> Any:
    """Load ``load_proxy`` on first use, so that ``import iprox`` stays free of torch."""
    if name == "load_proxy":
        from iprox.models.load import load_proxy

        return load_proxy
    raise AttributeError(f"module 'iprox' has no attribute {name!r}")
