"""Splits: fixed sets of samples that come in batches, in order or shuffled, plain or augmented.

A `TensorSplit` keeps small images as bytes and does everything else (normalising, random crops, flips) on
whole batches on the device: on two cores no worker process keeps up with that. A `LoaderSplit` reads any
map-style dataset through torch's DataLoader. Both give the same batches for the same seed, whatever the
number of workers, and both identify their content: `digest` is for the record, `identities` for finding
overlaps. A `CachedSplit` loads the batches of another split once.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

from autoprune.errors import DataError

Batch = tuple[Tensor, Tensor]
WHOLE = (0, 1)


def derive_seed(*parts: int) -> int:
    """Return one 63-bit seed from several numbers; the streams of neighbouring numbers are unlike."""
    return int(np.random.SeedSequence(list(parts)).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Split(ABC):
    """A fixed, ordered set of samples."""

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of samples."""

    @abstractmethod
    def batches(
        self, batch_size: int, *, device: torch.device | str = "cpu", seed: int | None = None,
        augment: bool = False, part: tuple[int, int] = WHOLE,
    ) -> Iterator[Batch]:  # fmt: skip
        """Give batches of inputs and targets, on the device.

        Without a seed every sample comes once, in order; the last batch may be smaller. With a seed, for
        training, the samples are shuffled and come in `num_batches` full batches. Only `augment` changes
        the samples. `part` (k, n) gives the k-th of n nearly equal parts of every batch, for processes that
        share the batches.
        """

    @abstractmethod
    def take(self, indices: NDArray[np.int64]) -> Split:
        """Return the split of the samples at these positions only, in this order."""

    @abstractmethod
    def identities(self) -> Sequence[Hashable]:
        """Return one key for each sample; equal keys in two splits mean the same sample."""

    @abstractmethod
    def digest(self) -> str:
        """Return the SHA-256 of the split's content, in hexadecimal."""

    def num_batches(self, batch_size: int) -> int:
        """Return the number of batches of a shuffled pass: the number of full ones, at least 1."""
        return max(1, len(self) // batch_size)

    def subset(self, share: float, *, seed: int) -> Split:
        """Return a random share of the samples, at least one, in their order; a seed always picks alike."""
        if share >= 1:
            return self
        count = max(1, round(share * len(self)))
        picked = np.random.default_rng([seed, len(self)]).permutation(len(self))[:count]
        return self.take(np.sort(picked).astype(np.int64))


@dataclass(frozen=True, kw_only=True)
class Normalization:
    """The mean that is subtracted from each channel of an image in [0, 1], and the `std` that divides."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


IMAGENET = Normalization(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """The random changes of an image that leave its class as it is.

    Attributes:
        crop_pad: the width, in pixels, of a black border that is added before a crop of the old size.
        flip: whether a random half of the images is mirrored left to right.
    """

    crop_pad: int = 0
    flip: bool = False


class TensorSplit(Split):
    """A split of images that are in memory.

    Args:
        images_NCHW: the images, uint8.
        labels_N: the class indices, int64.
        normalization: one mean and one standard deviation a channel.
        augmentation: the random changes that `augment=True` makes.

    Raises:
        DataError: the images are of another type or shape, or there are not as many labels.
    """

    def __init__(
        self, images_NCHW: Tensor, labels_N: Tensor, *, normalization: Normalization,
        augmentation: Augmentation = Augmentation(),
    ) -> None:  # fmt: skip
        if images_NCHW.dtype != torch.uint8 or images_NCHW.ndim != 4 or len(images_NCHW) != len(labels_N):
            raise DataError(
                f"images of type {images_NCHW.dtype} and shape {tuple(images_NCHW.shape)} do not go with "
                f"{len(labels_N)} labels",
                "give uint8 images of shape (N, C, H, W) and as many labels; other data go in a Dataset",
            )
        self.images_NCHW, self.labels_N = images_NCHW.cpu(), labels_N.to("cpu", torch.int64)
        self.normalization, self.augmentation = normalization, augmentation
        self._placed: dict[torch.device, Batch] = {}

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def take(self, indices: NDArray[np.int64]) -> TensorSplit:
        """Return the split of the samples at these positions only, in this order."""
        rows = torch.from_numpy(indices)
        return TensorSplit(
            self.images_NCHW[rows], self.labels_N[rows],
            normalization=self.normalization, augmentation=self.augmentation,
        )  # fmt: skip

    def batches(
        self, batch_size: int, *, device: torch.device | str = "cpu", seed: int | None = None,
        augment: bool = False, part: tuple[int, int] = WHOLE,
    ) -> Iterator[Batch]:  # fmt: skip
        """Give normalised float images (B, C, H, W) and labels (B,); see `Split.batches`."""
        images, labels = self._on(torch.device(device))
        generator = torch.Generator().manual_seed(0 if seed is None else seed)
        if seed is None:
            order = torch.arange(len(self))
        else:
            order = torch.randperm(len(self), generator=generator)
            order = order[: self.num_batches(batch_size) * batch_size]
        for rows in torch.split(order, batch_size):
            picked = images[rows.to(images.device)]
            if augment:
                picked = _augmented(picked, self.augmentation, generator)
            own = own_part(len(rows), part)  # all draws are made on every rank, so that each makes the same
            yield self._normalized(picked[own]), labels[rows.to(labels.device)][own]

    def identities(self) -> Sequence[Hashable]:
        """Return the BLAKE2b digest of each image's bytes."""
        rows = self.images_NCHW.numpy().reshape(len(self), -1)
        return [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]

    def digest(self) -> str:
        """Return the SHA-256 of the shape, all pixels and all labels, in hexadecimal."""
        hasher = hashlib.sha256(repr(tuple(self.images_NCHW.shape)).encode())
        hasher.update(self.images_NCHW.contiguous().numpy().tobytes())
        hasher.update(self.labels_N.numpy().tobytes())
        return hasher.hexdigest()

    def _on(self, device: torch.device) -> Batch:
        """Return the whole split on a device; it is copied there once."""
        if device.type == "cpu":
            return self.images_NCHW, self.labels_N
        if device not in self._placed:
            self._placed[device] = (self.images_NCHW.to(device), self.labels_N.to(device))
        return self._placed[device]

    def _normalized(self, images_BCHW: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(v, device=images_BCHW.device).view(1, -1, 1, 1)
            for v in (self.normalization.mean, self.normalization.std)
        )
        return images_BCHW.float().div_(255).sub_(mean).div_(std)


def _augmented(images_BCHW: Tensor, how: Augmentation, generator: torch.Generator) -> Tensor:
    """Crop and flip every image by its own draw, with one gather for the whole batch."""
    batch, channels, height, width = images_BCHW.shape
    dy, dx = torch.randint(0, 2 * how.crop_pad + 1, (2, batch, 1), generator=generator)
    rows = torch.arange(height) + dy
    cols = torch.arange(width).expand(batch, width)
    if how.flip:
        flipped = torch.rand(batch, 1, generator=generator) < 0.5
        cols = torch.where(flipped, width - 1 - cols, cols)
    cols = cols + dx
    padded = F.pad(images_BCHW, (how.crop_pad,) * 4)
    device = images_BCHW.device
    return padded[
        torch.arange(batch, device=device)[:, None, None, None],
        torch.arange(channels, device=device)[None, :, None, None],
        rows.to(device)[:, None, :, None],
        cols.to(device)[:, None, None, :],
    ]


class LoaderSplit(Split):
    """A split of a map-style dataset of (input, target) pairs.

    Args:
        dataset: the samples, with the transforms of evaluation.
        indices: the positions in `dataset` that belong to the split, (N,); None takes all samples.
        augmented: the same samples with random transforms, used where `augment=True`.
        num_workers: processes that load; 0 loads in this one, which is best for data in memory.
    """

    def __init__(
        self, dataset: Dataset[Any], indices: NDArray[np.int64] | None = None, *,
        augmented: Dataset[Any] | None = None, num_workers: int = 0,
    ) -> None:  # fmt: skip
        length = len(dataset)  # type: ignore[arg-type]  # torch's Dataset declares no length; map-style ones have it
        self.dataset, self.augmented = dataset, augmented
        self.indices = np.arange(length, dtype=np.int64) if indices is None else indices
        self.num_workers = num_workers

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, indices: NDArray[np.int64]) -> LoaderSplit:
        """Return the split of the samples at these positions only, in this order."""
        return LoaderSplit(
            self.dataset, self.indices[indices], augmented=self.augmented, num_workers=self.num_workers
        )

    def batches(
        self, batch_size: int, *, device: torch.device | str = "cpu", seed: int | None = None,
        augment: bool = False, part: tuple[int, int] = WHOLE,
    ) -> Iterator[Batch]:  # fmt: skip
        """Give the dataset's samples, collated and moved to the device; see `Split.batches`."""
        order = self.indices
        if seed is not None:
            order = np.random.default_rng(seed).permutation(order)
            order = order[: self.num_batches(batch_size) * batch_size]
        dataset = self.augmented if augment and self.augmented is not None else self.dataset
        loader: DataLoader[Batch] = DataLoader(
            _Seeded(dataset, order, seed or 0),
            batch_sampler=_positions(len(order), batch_size, part), num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(seed or 0),
            pin_memory=torch.device(device).type == "cuda",
        )  # fmt: skip
        for inputs, targets in loader:
            yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)

    def identities(self) -> Sequence[Hashable]:
        """Return the files' paths where the dataset names files, otherwise the dataset and the indices."""
        root, rows = _root(self.dataset, self.indices)
        samples = getattr(root, "samples", None)
        return [(id(root), int(i)) if samples is None else str(samples[i][0]) for i in rows]

    def digest(self) -> str:
        """Return the SHA-256 of the file names and classes where the dataset lists them, in hexadecimal.

        Otherwise it is the SHA-256 of the dataset's class, its length and the indices. The samples
        themselves are not read: that could take hours.
        """
        root, rows = _root(self.dataset, self.indices)
        hasher = hashlib.sha256(f"{type(root).__module__}.{type(root).__qualname__} ".encode())
        samples, folder = getattr(root, "samples", None), Path(getattr(root, "root", "."))
        if samples is None:
            hasher.update(f"{len(root)} ".encode())  # type: ignore[arg-type]  # as above
            hasher.update(np.ascontiguousarray(rows, dtype="<i8").tobytes())
        for path, label in () if samples is None else (samples[i] for i in rows):
            hasher.update(f"{Path(path).relative_to(folder).as_posix()} {label}\n".encode())
        return hasher.hexdigest()


def _root(dataset: Dataset[Any], indices: NDArray[np.int64]) -> tuple[Dataset[Any], NDArray[np.int64]]:
    """Return the dataset below all of torch's `Subset`s, and the indices into that dataset."""
    while isinstance(dataset, Subset):
        indices = np.asarray(dataset.indices, dtype=np.int64)[indices]
        dataset = dataset.dataset
    return dataset, indices


def own_part(length: int, part: tuple[int, int]) -> slice:
    """Return the positions in a batch of this length that belong to `part`: (rank, number of ranks)."""
    rank, num_ranks = part
    return slice(rank * length // num_ranks, (rank + 1) * length // num_ranks)


def _positions(length: int, batch_size: int, part: tuple[int, int]) -> list[list[int]]:
    batches = [range(start, min(start + batch_size, length)) for start in range(0, length, batch_size)]
    return [list(batch[own_part(len(batch), part)]) for batch in batches]


class _Seeded(Dataset[Any]):
    """A dataset that gives each sample its own random stream, whatever the workers and the order."""

    def __init__(self, dataset: Dataset[Any], order: NDArray[np.int64], seed: int) -> None:
        self.dataset, self.order, self.seed = dataset, order, seed

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> Any:
        index = int(self.order[position])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.seed, index))
            return self.dataset[index]


CACHE_BYTES = 2**30  # the most that held batches take up; a guess at what fits beside anything


def cache_batches(split: Split) -> Split:
    """Return the same split with its first batches held in memory; return a split that is in memory itself.

    Plans are tried on the same samples again and again. For samples that are read from disk, decoding a
    thousand images takes longer than running a network on them.
    """
    return split if isinstance(split, TensorSplit | CachedSplit) else CachedSplit(split)


class CachedSplit(Split):
    """A split with the batches of another split, where the batches of an earlier pass come from memory."""

    def __init__(self, split: Split) -> None:
        self.split = split
        self._batches: dict[tuple[int, str, int | None, bool, tuple[int, int]], list[Batch]] = {}
        self._num_bytes = 0

    def __len__(self) -> int:
        return len(self.split)

    def take(self, indices: NDArray[np.int64]) -> Split:
        """Return the split of the samples at these positions only, in this order."""
        return CachedSplit(self.split.take(indices))

    def batches(
        self, batch_size: int, *, device: torch.device | str = "cpu", seed: int | None = None,
        augment: bool = False, part: tuple[int, int] = WHOLE,
    ) -> Iterator[Batch]:  # fmt: skip
        """Give the batches of the other split; see `Split.batches`."""
        held = self._batches.setdefault((batch_size, str(device), seed, augment, part), [])
        for inputs, targets in held:
            yield inputs.clone(), targets  # a network may write into its input
        fresh = self.split.batches(batch_size, device=device, seed=seed, augment=augment, part=part)
        for number, batch in enumerate(islice(fresh, len(held), None), len(held)):
            if number == len(held) and self._num_bytes < CACHE_BYTES:
                held.append((batch[0].clone(), batch[1]))
                self._num_bytes += batch[0].nbytes + batch[1].nbytes
            yield batch

    def num_batches(self, batch_size: int) -> int:
        """Return the number of batches of the other split; see `Split.num_batches`."""
        return self.split.num_batches(batch_size)

    def identities(self) -> Sequence[Hashable]:
        """Return the keys of the other split's samples; see `Split.identities`."""
        return self.split.identities()

    def digest(self) -> str:
        """Return the digest of the other split; see `Split.digest`."""
        return self.split.digest()
