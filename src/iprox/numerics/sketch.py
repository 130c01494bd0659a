"""Fixed linear maps from the gradients of all layers to a few numbers that keep inner products.

For every kind of sketch ``S`` here, ``E[<S g, S g'>] = <g, g'>`` over the seed, where ``g`` are
the weight gradients of all layers together. All random numbers are functions of the seed, the
layer's name and a counter: a sketch is the same in every process and on every device, and does
not depend on how the work is cut into batches and blocks or on which layers come first.

As in :mod:`iprox.numerics.ghost`, a layer's gradient is ``G = D^T X (out, in)`` with inputs
``X (tokens, in)`` and output gradients ``D (tokens, out)``, zero at padding.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

Shapes = Mapping[str, tuple[int, int]]
"""Layer -> (out, in)."""

BLOCK_COORDINATES = 2**16
"""Coordinates of a gradient that a count sketch hashes at once. Changes no result."""

BLOCK_ENTRIES = 2**20
"""Entries of a random matrix that exist at once. Changes results in the last digits only."""


class Sketch(ABC):
    """A linear map from the gradients of ``shapes`` to ``dim`` numbers.

    Args:
        shapes: Layer -> (out, in).
        dim: Numbers in a sketch.
        seed: Seed of the map.
        device: Where gradients are.
    """

    kind: str

    def __init__(self, shapes: Shapes, dim: int, seed: int, device: torch.device) -> None:
        self.shapes = {name: (out, inn) for name, (out, inn) in shapes.items()}
        self.dim, self.seed, self.device = dim, seed, device

    @abstractmethod
    def add_rows(self, layer: str, x: Tensor, d: Tensor, into: Tensor) -> None:
        """Add the sketches of one layer's gradients, given by their rows.

        Args:
            layer: Name of the layer.
            x: Its inputs, (examples, tokens, in), in the precision of ``into``.
            d: Its output gradients, (examples, tokens, out), likewise.
            into: (examples, dim), changed in place.
        """

    @abstractmethod
    def add_gradients(self, layer: str, gradients: Tensor, into: Tensor) -> None:
        """Add the sketches of one layer's gradients.

        Args:
            layer: Name of the layer.
            gradients: (gradients, out, in), in the precision of ``into``.
            into: (gradients, dim), changed in place.
        """

    def about(self) -> dict[str, Any]:
        """Settings that tell this map from any other over the same layers."""
        return {"kind": self.kind, "dim": self.dim, "seed": self.seed}


class Blockwise(Sketch):
    """A sketch that takes gradients coordinate by coordinate, some rows of a matrix at a time."""

    def add_rows(self, layer: str, x: Tensor, d: Tensor, into: Tensor) -> None:
        """Form the gradients block by block, and add their sketches."""
        for rows in self.row_blocks(layer):
            self.add_block(layer, rows.start, (d[..., rows].mT @ x).flatten(1), into)

    def add_gradients(self, layer: str, gradients: Tensor, into: Tensor) -> None:
        """Add the sketches of gradients, block by block."""
        for rows in self.row_blocks(layer):
            self.add_block(layer, rows.start, gradients[:, rows].flatten(1), into)

    def row_blocks(self, layer: str) -> Iterator[slice]:
        """Rows of a layer's gradient that are taken together."""
        out, inn = self.shapes[layer]
        size = max(1, self._block_coordinates() // inn)
        for start in range(0, out, size):
            yield slice(start, min(start + size, out))

    def _counters(self, layer: str, first_row: int, n: int) -> Tensor:
        """Places of ``n`` coordinates in the flattened gradient of a layer."""
        start = first_row * self.shapes[layer][1]
        return torch.arange(start, start + n, device=self.device)

    @abstractmethod
    def _block_coordinates(self) -> int:
        """Coordinates of a block."""

    @abstractmethod
    def add_block(self, layer: str, first_row: int, block: Tensor, into: Tensor) -> None:
        """Add the sketch of some rows of a layer's gradients, (gradients, rows * in)."""


class CountSketch(Blockwise):
    """``out[h(i)] += s(i) g[i]`` with one hash ``h`` and one sign ``s`` over all coordinates.

    Charikar, Chen and Farach-Colton (ICALP 2002). The variance of ``<S g, S g'>`` is
    ``(|g|^2 |g'|^2 + <g, g'>^2 - 2 sum_i g_i^2 g'_i^2) / dim``: about 1 / sqrt(dim) for cosines.
    The gradient of an example is formed, a block at a time.
    """

    kind = "countsketch"

    def _block_coordinates(self) -> int:
        return BLOCK_COORDINATES

    def add_block(self, layer: str, first_row: int, block: Tensor, into: Tensor) -> None:
        """Add every coordinate, with its sign, to its bucket."""
        words = mix(self._counters(layer, first_row, block.shape[1]), layer_key(self.seed, layer))
        bucket = (_shifted(words, 33) * self.dim) >> 31  # 31 bits, scaled to 0 ... dim - 1
        sign = (words & 1).mul_(2).sub_(1)
        into.scatter_add_(1, bucket.expand(len(block), -1), block * sign)


class RandomProjection(Blockwise):
    """``P g / sqrt(dim)`` with independent entries of mean 0 and variance 1.

    The projection of LESS (arXiv:2402.04333) and TRAK (arXiv:2303.14186). ``P`` has ``dim``
    rows and as many columns as the model has scored weights; it never exists as a whole. Each
    block is made once for all examples of a batch.

    Args:
        shapes: Layer -> (out, in).
        dim: Rows of ``P``.
        seed: Seed of ``P``.
        device: Where gradients are.
        distribution: ``rademacher`` (signs) or ``gaussian``.
    """

    kind = "random"

    def __init__(
        self, shapes: Shapes, dim: int, seed: int, device: torch.device, distribution: str
    ) -> None:
        super().__init__(shapes, dim, seed, device)
        self.distribution = distribution

    def about(self) -> dict[str, Any]:
        """Settings, with the distribution."""
        return super().about() | {"distribution": self.distribution}

    def _block_coordinates(self) -> int:
        return BLOCK_ENTRIES // self.dim

    def add_block(self, layer: str, first_row: int, block: Tensor, into: Tensor) -> None:
        """Add the products with these coordinates' columns of ``P``."""
        counters = self._counters(layer, first_row, block.shape[1])
        draw = signs if self.distribution == "rademacher" else normals
        matrix = draw(counters, self.dim, layer_key(self.seed, layer))  # (coordinates, dim)
        into.add_(block @ matrix.to(block.dtype), alpha=1 / math.sqrt(self.dim))


class FreshLora(Sketch):
    """A count sketch of ``G A^T``, the gradients of freshly initialised LoRA adapters.

    Influcoder's teacher (arXiv:2606.13668). With the weight ``W + c B A`` and ``B = 0``, as LoRA
    starts, the gradient of ``A (rank, in)`` is zero and that of ``B`` is ``c G A^T (out, rank)``:
    it needs no adapters. Entries of ``A`` are uniform as LoRA initialises them, but of variance
    ``1 / rank``, so that ``E[A^T A] = I`` and inner products are unbiased; LoRA's own scale,
    which falls with a layer's width, would weight layers by it.

    Args:
        shapes: Layer -> (out, in).
        dim: Numbers in a sketch.
        rank: Rows of ``A``; a layer whose input is narrower keeps its own ``G``.
        seed: Seed of ``A`` and of the count sketch.
        device: Where gradients are.
    """

    kind = "lora"

    def __init__(
        self, shapes: Shapes, dim: int, rank: int, seed: int, device: torch.device
    ) -> None:
        super().__init__(shapes, dim, seed, device)
        self.rank = rank
        self.maps = {n: self._map(n) for n, (_, inn) in self.shapes.items() if inn > rank}
        thin = {n: (out, min(inn, rank)) for n, (out, inn) in self.shapes.items()}
        self.counted = CountSketch(thin, dim, seed, device)

    def about(self) -> dict[str, Any]:
        """Settings, with the rank."""
        return super().about() | {"rank": self.rank}

    def _map(self, layer: str) -> Tensor:
        """``A`` of a layer, (rank, in)."""
        inn = self.shapes[layer][1]
        key = layer_key(self.seed, f"{layer}\nlora")
        uniform = uniforms(torch.arange(self.rank * inn), key).view(self.rank, inn)
        return ((2 * uniform - 1) * math.sqrt(3 / self.rank)).to(self.device)

    def add_rows(self, layer: str, x: Tensor, d: Tensor, into: Tensor) -> None:
        """Add sketches of ``D^T (X A^T)``; no gradient is formed."""
        a = self.maps.get(layer)
        self.counted.add_rows(layer, x if a is None else x @ a.mT.to(x.dtype), d, into)

    def add_gradients(self, layer: str, gradients: Tensor, into: Tensor) -> None:
        """Add sketches of ``G A^T``."""
        a = self.maps.get(layer)
        thin = gradients if a is None else gradients @ a.mT.to(gradients.dtype)
        self.counted.add_gradients(layer, thin, into)


class Logra(Sketch):
    """``P_out G P_in^T`` for each layer, (rank, rank), taken from the rows of X and D alone.

    LoGRA (arXiv:2405.13954, section 4.1). ``P_in (rank, in)`` and ``P_out (rank, out)`` have
    random orthonormal rows, so that ``E[P^T P] = (rank / width) I``; features are multiplied by
    ``sqrt(out in) / rank``, which makes inner products unbiased and layers of different shapes
    comparable. A side that is narrower than the rank keeps its whole width. The features of the
    layers follow each other in the order of the layers' names.

    Args:
        shapes: Layer -> (out, in).
        rank: Rank on each side of a layer.
        seed: Seed of the projections.
        device: Where gradients are.
    """

    kind = "logra"

    def __init__(self, shapes: Shapes, rank: int, seed: int, device: torch.device) -> None:
        self.rank = rank
        self.places: dict[str, slice] = {}
        stop = 0
        for name, (out, inn) in sorted(shapes.items()):
            start, stop = stop, stop + min(rank, out) * min(rank, inn)
            self.places[name] = slice(start, stop)
        super().__init__(shapes, stop, seed, device)
        self.maps = {name: self._maps(name) for name in self.shapes}

    def about(self) -> dict[str, Any]:
        """Settings; the rank stands for the size."""
        return {"kind": self.kind, "rank": self.rank, "seed": self.seed}

    def _maps(self, layer: str) -> tuple[Tensor, Tensor]:
        """``P_out`` and ``P_in`` of a layer, with the scale in the former."""
        maps = []
        for side, width in zip(("out", "in"), self.shapes[layer], strict=True):
            key = layer_key(self.seed, f"{layer}\n{side}")
            frame = orthonormal_rows(min(self.rank, width), width, key)
            maps.append(frame * math.sqrt(width / len(frame)))
        return maps[0].to(self.device), maps[1].to(self.device)

    def add_rows(self, layer: str, x: Tensor, d: Tensor, into: Tensor) -> None:
        """Add ``(D P_out^T)^T (X P_in^T)``; no gradient is formed."""
        p_out, p_in = (p.to(into.dtype) for p in self.maps[layer])
        features = (d @ p_out.mT).mT @ (x @ p_in.mT)  # (examples, rank, rank)
        into[:, self.places[layer]] += features.flatten(1)

    def add_gradients(self, layer: str, gradients: Tensor, into: Tensor) -> None:
        """Add ``P_out G P_in^T``."""
        p_out, p_in = (p.to(into.dtype) for p in self.maps[layer])
        into[:, self.places[layer]] += (p_out @ gradients @ p_in.mT).flatten(1)


def layer_key(seed: int, layer: str) -> int:
    """A 64-bit key (signed) of a layer's random numbers."""
    digest = hashlib.sha256(f"{seed}\n{layer}".encode()).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


def mix(counters: Tensor, key: int) -> Tensor:
    """Random 64-bit words at places of a stream: SplitMix64 (Steele, Lea and Flood, 2014).

    Args:
        counters: Places, int64.
        key: The stream.

    Returns:
        Words, int64, of the same shape. Products wrap around, the same on every device.
    """
    words = (counters + 1).mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    words ^= _shifted(words, 30)
    words *= _signed(0xBF58476D1CE4E5B9)
    words ^= _shifted(words, 27)
    words *= _signed(0x94D049BB133111EB)
    words ^= _shifted(words, 31)
    return words


def signs(counters: Tensor, columns: int, key: int) -> Tensor:
    """Independent fair signs as float32, (counters, columns), the same wherever they are made."""
    per_row = -(-columns // 64)
    places = counters[:, None] * per_row + torch.arange(per_row, device=counters.device)
    halves = mix(places, key).view(torch.int32)  # (counters, 2 * per_row)
    shifts = torch.arange(32, device=counters.device, dtype=torch.int32)
    bits = halves[:, :, None] << shifts  # (counters, 2 * per_row, 32)
    bits.bitwise_and_(-(2**31)).bitwise_or_(0x3F800000)  # the sign bit of 1.0f
    return bits.view(torch.float32).flatten(1)[:, :columns]


def uniforms(counters: Tensor, key: int) -> Tensor:
    """Independent uniform numbers in [0, 1) as float64, (counters,)."""
    return _shifted(mix(counters, key), 11).double() * 2.0**-53


def normals(counters: Tensor, columns: int, key: int) -> Tensor:
    """Independent standard normal numbers in float32, (counters, columns), by Box and Muller."""
    per_row = -(-columns // 2)
    places = counters[:, None] * per_row + torch.arange(per_row, device=counters.device)
    words = mix(places, key)
    radius = (_shifted(words, 40) + 1).float().mul_(2**-24).log_().mul_(-2).sqrt_()
    angle = (words & (2**24 - 1)).float().mul_(2 * math.pi * 2**-24)
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :columns]


def orthonormal_rows(rows: int, width: int, key: int) -> Tensor:
    """A uniformly distributed frame of ``rows <= width`` orthonormal rows, float64 on the CPU."""
    gaussian = normals(torch.arange(width), rows, key).double()
    q, r = torch.linalg.qr(gaussian)
    return (q * r.diagonal().sign()).mT.contiguous()


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Words shifted to the right, filled with zeros."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(word: int) -> int:
    """An unsigned 64-bit word as the signed integer with the same bits."""
    return word - 2**64 if word >= 2**63 else word
