from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from autoprune.data import splits
from autoprune.data.splits import CachedSplit, LoaderSplit, cache_batches
from tests.tiny import tiny_split


class Counted(Dataset[tuple[Tensor, int]]):
    def __init__(self) -> None:
        self.reads = 0

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        self.reads += 1
        return torch.full((3,), float(index)) + torch.rand(1), index % 4


def first(split: LoaderSplit | CachedSplit, count: int) -> list[float]:
    found = []
    for _, (inputs, _) in zip(range(count), split.batches(8, seed=1), strict=False):
        found += inputs[:, 0].tolist()
    return found


def test_samples_are_read_once_and_are_the_same() -> None:
    dataset = Counted()
    split = cache_batches(LoaderSplit(dataset))
    assert isinstance(split, CachedSplit)
    two, again = first(split, 2), first(split, 2)
    assert dataset.reads == 16
    assert again == two == first(LoaderSplit(Counted()), 2)
    assert first(split, 5) == first(LoaderSplit(Counted()), 5), "a longer pass goes on behind what is held"
    assert len(split) == 40
    assert split.digest() == LoaderSplit(Counted()).digest()
    assert len(split.subset(0.5, seed=0)) == 20


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "CACHE_BYTES", 1)
    dataset = Counted()
    split = cache_batches(LoaderSplit(dataset))
    assert isinstance(split, CachedSplit)
    assert first(split, 3) == first(split, 3)
    assert dataset.reads > 24


def test_what_is_in_memory_stays_as_it_is() -> None:
    split = tiny_split(16, 0)
    assert cache_batches(split) is split
    np.testing.assert_array_equal(split.take(np.arange(2)).labels_N, split.labels_N[:2])
