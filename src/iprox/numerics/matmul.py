"""Products of float32 matrices on a CPU, by the fastest library that is exact there.

PyTorch takes them from MKL, which on AMD processors leaves half of the vector width unused;
oneDNN, which PyTorch ships too, uses all of it and is 2.2 times as fast (Zen 5, 64 to 1,536
columns). PyTorch has no switch of that name: it asks oneDNN when products of float32 matrices
may be taken in bfloat16. Without matrix units for bfloat16 oneDNN takes them in float32 all the
same, which is tried out here before the switch is left on.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_SWITCH: Any = torch.backends.mkldnn

EXACT = 1e-6
"""Relative error of a product up to which it counts as one in float32."""


def use_fastest() -> str:
    """Take large products from the fastest exact library from now on; returns its name."""
    if _onednn_is_better():
        _SWITCH.matmul.fp32_precision = "bf16"
        return "oneDNN"
    return "default"


def is_from_onednn() -> bool:
    """Whether products of float32 matrices come from oneDNN at the moment."""
    return bool(_SWITCH.matmul.fp32_precision == "bf16")


@contextmanager
def vector_products() -> Iterator[None]:
    """Within this context products with vectors are as fast as they are by default.

    oneDNN takes 3 to 15 times as long for them.
    """
    before = _SWITCH.matmul.fp32_precision
    _SWITCH.matmul.fp32_precision = "none"
    try:
        yield
    finally:
        _SWITCH.matmul.fp32_precision = before


@functools.cache
def _onednn_is_better() -> bool:
    """Whether this is an AMD processor with 512-bit vectors on which oneDNN stays exact.

    Decided by what the machine is, never by a measurement, so that every process on it computes
    the same bytes.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or _vendor() != "AuthenticAMD":
        return False
    before = _SWITCH.matmul.fp32_precision
    _SWITCH.matmul.fp32_precision = "bf16"
    try:
        return _error() < EXACT
    finally:
        _SWITCH.matmul.fp32_precision = before


def _vendor() -> str:
    """Maker of the processor as Linux reports it, or an empty text."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    values = (line.split(":")[1].strip() for line in lines if line.startswith("vendor_id"))
    return next(values, "")


def _error() -> float:
    """Relative error of a float32 product as it is taken now."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 192, generator=generator) for _ in range(2))
    exact = a.double() @ b.double().mT
    return float((a @ b.mT - exact).norm() / exact.norm())
