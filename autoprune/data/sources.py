"""The data of a run: three splits that share no sample.

Fine-tuning sees `train`, sensitivity and trials see `search`, and `test` is read twice in a run (for the
baseline and the final model). Cuts are deterministic, and stratified by class where classes are known. A
sample in two splits is refused, whoever made the cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from autoprune.data.datasets import READERS, Source, read_imagefolder
from autoprune.data.spec import parse_data
from autoprune.data.splits import LoaderSplit, Normalization, Split, TensorSplit
from autoprune.errors import DataError

__all__ = [
    "Cut",
    "Data",
    "LoaderSplit",
    "Normalization",
    "Split",
    "TensorSplit",
    "cut",
    "from_datasets",
    "load_data",
]

SEARCH_SHARE = 0.1  # of the training data, where a user brings no validation set; a guess


@dataclass(frozen=True, kw_only=True)
class Data:
    """The three splits of a run, and the facts that are needed to feed the network.

    Attributes:
        train: the samples that fine-tuning learns from.
        search: the samples that sensitivity and trials are measured on.
        test: the samples that the baseline and the final model are measured on.
        num_classes: the number of classes; 0 where the targets are no classes.
        class_names: the names of the classes in the order of their indices; empty where they are not known.
        input_shape: the shape of one sample's input, for images (C, H, W).
        normalization: how pixels in [0, 1] become inputs; None where the dataset does that itself.

    Raises:
        DataError: a split is empty, or two splits share a sample.
    """

    train: Split
    search: Split
    test: Split
    num_classes: int
    class_names: tuple[str, ...] = ()
    input_shape: tuple[int, ...]
    normalization: Normalization | None = None

    def __post_init__(self) -> None:
        splits = {"train": self.train, "search": self.search, "test": self.test}
        for name, split in splits.items():
            if len(split) == 0:
                raise DataError(
                    f"the {name} split is empty", "give each of train, search and test some samples"
                )
        check_overlap(splits)

    @property
    def mean(self) -> tuple[float, ...]:
        """The mean of each channel, of pixels in [0, 1]; empty where the dataset normalises itself."""
        return () if self.normalization is None else self.normalization.mean

    @property
    def std(self) -> tuple[float, ...]:
        """The standard deviation of each channel; empty where the dataset normalises itself."""
        return () if self.normalization is None else self.normalization.std

    @property
    def digests(self) -> dict[str, str]:
        """The SHA-256 of the content of each split, by the split's name."""
        return {"train": self.train.digest(), "search": self.search.digest(), "test": self.test.digest()}


def check_overlap(splits: Mapping[str, Split]) -> None:
    """Check that no sample is in two splits.

    Raises:
        DataError: a sample is in two splits; the message counts such samples.
    """
    keys = {name: frozenset(split.identities()) for name, split in splits.items()}
    for first, second in combinations(splits, 2):
        shared = len(keys[first] & keys[second])
        if shared:
            raise DataError(
                f"{shared} of the {len(splits[second])} {second} samples are in the {first} split too",
                "cut the data so that no sample is in two splits: results on seen samples mean nothing",
            )


@dataclass(frozen=True, kw_only=True)
class Cut:
    """The two sides of a split that was cut: `part` holds the requested share, `rest` the other samples."""

    rest: Split
    part: Split


def cut(split: Split, share: float, *, seed: int) -> Cut:
    """Cut a split in two at random, stratified by class where labels are known; a seed always cuts alike.

    Raises:
        DataError: either side would be empty.
    """
    order = np.random.default_rng([seed, len(split)]).permutation(len(split))
    count = round(share * len(split))
    if isinstance(split, TensorSplit):
        picked = order[_spread(split.labels_N.numpy()[order], share)]
    else:
        picked = order[:count]
    if not 0 < len(picked) < len(split):
        raise DataError(
            f"a share of {share:g} of {len(split)} samples leaves one side empty", "give more samples"
        )
    is_taken = np.zeros(len(split), dtype=bool)
    is_taken[picked] = True
    return Cut(rest=split.take(np.flatnonzero(~is_taken)), part=split.take(np.flatnonzero(is_taken)))


def _spread(labels: NDArray[np.int64], share: float) -> NDArray[np.int64]:
    """Return the positions of the first `share` of each class."""
    by_class = [np.flatnonzero(labels == c) for c in np.unique(labels)]
    return np.concatenate([where[: round(share * len(where))] for where in by_class])


def from_datasets(
    train: Dataset[Any], test: Dataset[Any], *, val: Dataset[Any] | None = None,
    augmented: Dataset[Any] | None = None, search_share: float = SEARCH_SHARE, num_workers: int = 0,
) -> Data:  # fmt: skip
    """Make the splits from any map-style datasets of (input tensor, target) pairs.

    Args:
        train: the samples for fine-tuning, with the transforms of evaluation.
        test: the samples of the test split, which is read twice in a run.
        val: the samples of the search split; None cuts `search_share` of `train` for it.
        augmented: the samples of `train`, in the same order, with random transforms.
        search_share: the share of `train`, in (0, 1), that becomes the search split where `val` is None.
        num_workers: the number of loading processes; 0 loads in this process.

    Raises:
        DataError: a dataset is empty or gives no pairs of tensors, or two datasets share a sample.
    """
    whole = LoaderSplit(train, augmented=augmented, num_workers=num_workers)
    if augmented is not None and len(augmented) != len(whole):  # type: ignore[arg-type]  # map-style have a length
        raise DataError(
            f"`augmented` does not have the {len(whole)} samples of `train`",
            "give the same dataset with random transforms",
        )
    if val is None:
        parts = cut(whole, search_share, seed=0)
        train_split, search = parts.rest, parts.part
    else:
        train_split, search = whole, LoaderSplit(val, num_workers=num_workers)
    class_names = tuple(str(name) for name in getattr(train, "classes", ()))
    return Data(
        train=train_split, search=search, test=LoaderSplit(test, num_workers=num_workers),
        num_classes=len(class_names) or _count_classes(train), class_names=class_names,
        input_shape=_input_shape(train_split),
    )  # fmt: skip


def _count_classes(dataset: Dataset[Any]) -> int:
    """Count the classes in the `targets` that torchvision's datasets carry; 0 where there are none."""
    targets = np.asarray(getattr(dataset, "targets", ()))
    return int(targets.max()) + 1 if targets.size and targets.dtype.kind in "iu" else 0


def _input_shape(split: Split) -> tuple[int, ...]:
    if len(split) == 0:
        raise DataError("the train split is empty", "give each of train, search and test some samples")
    try:
        inputs, _ = next(iter(split.take(np.zeros(1, dtype=np.int64)).batches(1)))
        return tuple(inputs.shape[1:])
    except (TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"the dataset's first sample is no pair of an input tensor and a target ({error})",
            "let its transform end in a tensor, and let it return (input, target)",
        ) from error


def load_data(
    spec: str, *, seed: int = 0, search_from: Literal["train", "test"] = "test",
    normalization: Normalization | None = None,
) -> Data:  # fmt: skip
    """Load `digits`, `cifar10:DIR`, `fashionmnist:DIR` or `imagefolder:DIR`, and cut it into three splits.

    Nothing is downloaded.

    Args:
        spec: the name, the folder that holds the data, and options; see `autoprune.data.spec`.
        seed: the seed of the cut.
        search_from: the split that the search split is cut from. `test` is for weights that came trained:
            they have seen the training set, so half of the official test set is for the search. `train` is
            for a baseline that is trained here.
        normalization: the constants that the weights were trained with, where they are not the data set's
            own.

    Raises:
        DataError: the name or an option is not known, or the folder or a file is missing or damaged.
    """
    parsed = parse_data(spec)
    constants = normalization or parsed.normalization
    if parsed.name == "imagefolder":
        source = read_imagefolder(parsed.folder, constants, parsed.size, parsed.channels)
    else:
        source = READERS[parsed.name](parsed.folder, constants)
    return _from_source(source, seed, search_from)


def _from_source(source: Source, seed: int, search_from: Literal["train", "test"]) -> Data:
    train, test = source.train, source.test
    if test is None:
        held_out = cut(train, source.test_share, seed=seed)
        train, test = held_out.rest, held_out.part
    if search_from == "test":
        halves = cut(test, 0.5, seed=seed)
        test, search = halves.rest, halves.part
    else:
        parts = cut(train, source.search_share, seed=seed)
        train, search = parts.rest, parts.part
    return Data(
        train=train, search=search, test=test, num_classes=len(source.class_names),
        class_names=source.class_names, input_shape=source.input_shape, normalization=source.normalization,
    )  # fmt: skip
