"""Token positions drawn from examples, and where their rows stand among those of all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from iprox.data.chat import Encoded
from iprox.engine.loss import Batch
from iprox.stages.passes import Reader


class DrawnBatch(NamedTuple):
    """A batch, and which of its tokens are drawn.

    Attributes:
        batch: The batch.
        ids: Ids of its examples.
        places: Rows of its drawn tokens among those of all examples, (rows,).
        chosen: The example of the batch and the token that each row is of, (rows,) both.
    """

    batch: Batch
    ids: list[str]
    places: np.ndarray
    chosen: tuple[Tensor, Tensor]


class Drawn(NamedTuple):
    """Examples and the positions drawn from each, ascending; rows are in their order."""

    encoded: list[Encoded]
    positions: list[np.ndarray]

    @property
    def n_tokens(self) -> int:
        """Positions of all examples."""
        return sum(map(len, self.positions))

    def batches(self, reader: Reader) -> Iterator[DrawnBatch]:
        """The examples in batches on the model's device."""
        starts = np.concatenate([[0], np.cumsum([len(p) for p in self.positions])])
        for indices, batch in reader.batches(self.encoded):
            places = np.concatenate([np.arange(starts[i], starts[i + 1]) for i in indices])
            examples = np.repeat(np.arange(len(indices)), [len(self.positions[i]) for i in indices])
            tokens = np.concatenate([self.positions[i] for i in indices])
            ids = [self.encoded[i].example_id for i in indices]
            yield DrawnBatch(
                batch, ids, places, (torch.as_tensor(examples), torch.as_tensor(tokens))
            )
