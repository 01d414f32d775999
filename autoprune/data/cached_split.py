"""A split whose batches are loaded once: plans are tried on the same samples again and again.

For samples that are read from disk, decoding a thousand images takes longer than running a network on them.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import islice

import numpy as np
import torch
from numpy.typing import NDArray

from autoprune.data.splits import WHOLE, Batch, Split, TensorSplit

MEMORY = 2**30  # bytes of batches that are kept; beyond it they are loaded again


def kept(split: Split) -> Split:
    """The same split, its first batches kept; one that is in memory anyway is given back as it is."""
    return split if isinstance(split, TensorSplit | KeptBatches) else KeptBatches(split)


class KeptBatches(Split):
    """Gives the same batches as `split`, those of an earlier pass from memory."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self._kept: dict[tuple[int, str, int | None, bool, tuple[int, int]], list[Batch]] = {}
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self.split)

    def take(self, indices: NDArray[np.int64]) -> Split:
        """The split of these samples only, in this order."""
        return KeptBatches(self.split.take(indices))

    def batches(
        self, batch_size: int, *, device: torch.device | str = "cpu", seed: int | None = None,
        augment: bool = False, part: tuple[int, int] = WHOLE,
    ) -> Iterator[Batch]:  # fmt: skip
        """See `Split.batches`."""
        mine = self._kept.setdefault((batch_size, str(device), seed, augment, part), [])
        for inputs, targets in mine:
            yield inputs.clone(), targets  # a network may write into its input
        fresh = self.split.batches(batch_size, device=device, seed=seed, augment=augment, part=part)
        for number, batch in enumerate(islice(fresh, len(mine), None), len(mine)):
            if number == len(mine) and self._num_bytes < MEMORY:
                mine.append((batch[0].clone(), batch[1]))
                self._num_bytes += batch[0].nbytes + batch[1].nbytes
            yield batch

    def num_batches(self, batch_size: int) -> int:
        """See `Split.num_batches`."""
        return self.split.num_batches(batch_size)

    def identities(self) -> Sequence[Hashable]:
        """See `Split.identities`."""
        return self.split.identities()

    def digest(self) -> str:
        """See `Split.digest`."""
        return self.split.digest()
