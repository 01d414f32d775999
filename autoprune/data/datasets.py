"""Readers of the data sets that a command line can name.

Each reader turns a folder into a `Source`: the official train and test split and what goes with them. No
reader downloads, unpickles or writes anything. Formats: npz archives and the binary batches of CIFAR-10
(Krizhevsky 2009), gzipped idx files of Fashion-MNIST (Xiao et al. 2017), a folder per class for
`imagefolder`, and scikit-learn's bundled copy of the UCI digits.
"""

from __future__ import annotations

import gzip
import os
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autoprune.data.splits import IMAGENET, Augmentation, LoaderSplit, Normalization, Split, TensorSplit
from autoprune.errors import DataError

Bytes = NDArray[np.uint8]
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
FASHION_CLASSES = (
    "t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot",
)  # fmt: skip
# Mean and standard deviation of the pixels of each official train split, computed from it.
CIFAR10 = Normalization(mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616))
FASHION = Normalization(mean=(0.2860,), std=(0.3530,))
GREY = Normalization(mean=(0.449,), std=(0.226,))  # the mean over ImageNet's three channels
DIGITS = Normalization(mean=(0.3053,), std=(0.3760,))
DIGITS_TEST_SHARE = 0.25  # scikit-learn's copy has no official cut; ours is stratified and always the same
FOLDER_TEST_SHARE = 0.2  # of a folder that holds no test images of its own; a convention
IN_MEMORY_BYTES = 1 << 30  # the most that pictures of one size may take; a guess at what machines can spare
MAX_WORKERS = 8  # loading processes; more only contend for the disk. A guess


@dataclass(frozen=True, kw_only=True)
class Source:
    """A data set as its makers cut it.

    Attributes:
        train: the samples that a network may learn from.
        test: the official test set; None where the data set has none, and a part of `train` serves instead.
        search_share: the share of `train` that becomes the search split, when that is cut from `train`.
        test_share: the share of `train` that becomes the test split, when `test` is None.
    """

    train: Split
    test: Split | None
    class_names: tuple[str, ...]
    input_shape: tuple[int, ...]
    normalization: Normalization
    search_share: float = 0.1
    test_share: float = 0.0


def read_digits(folder: Path | None, normalization: Normalization | None) -> Source:
    """Return 1,797 grey images of handwritten digits, 8 x 8, with every pixel doubled to 16 x 16.

    Raises:
        DataError: a folder is given; scikit-learn brings the images.
    """
    if folder is not None:
        raise DataError(f"digits comes with scikit-learn, not from a folder ({folder})", "write just digits")
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    images = images.repeat(2, axis=2).repeat(2, axis=3)
    constants = normalization or DIGITS
    return Source(
        train=TensorSplit(
            torch.from_numpy(images), torch.from_numpy(digits.target),
            normalization=constants, augmentation=Augmentation(crop_pad=2),
        ),
        test=None, test_share=DIGITS_TEST_SHARE, search_share=0.3, class_names=tuple("0123456789"),
        input_shape=(1, 16, 16), normalization=constants,
    )  # fmt: skip


def read_cifar10(folder: Path | None, normalization: Normalization | None) -> Source:
    """Read 60,000 colour images, 32 x 32, from `train.npz` and `test.npz` or from the binary batches.

    Raises:
        DataError: the folder or a file in it is missing or damaged.
    """
    root = _existing("cifar10", folder)
    binary = next(
        (f for f in (root, root / "cifar-10-batches-bin") if (f / "test_batch.bin").is_file()), None
    )
    constants = normalization or CIFAR10
    parts = []
    for part, batches in (("train", [f"data_batch_{i}" for i in range(1, 6)]), ("test", ["test_batch"])):
        if binary is not None:
            images, labels = _cifar_binary([binary / f"{name}.bin" for name in batches])
        else:
            images, labels = _cifar_npz(root / f"{part}.npz")
        parts.append(_tensor_split(images, labels, constants, Augmentation(crop_pad=4, flip=True)))
    return Source(
        train=parts[0],
        test=parts[1],
        class_names=CIFAR10_CLASSES,
        input_shape=(3, 32, 32),
        normalization=constants,
    )


def read_fashionmnist(folder: Path | None, normalization: Normalization | None) -> Source:
    """Read 70,000 grey images of clothes, 28 x 28, from the gzipped idx files.

    Raises:
        DataError: the folder or a file in it is missing or damaged.
    """
    root = _existing("fashionmnist", folder)
    raw = next((f for f in (root / "FashionMNIST" / "raw", root / "raw") if f.is_dir()), root)
    constants = normalization or FASHION
    parts = [
        _tensor_split(
            _idx(raw / f"{part}-images-idx3-ubyte.gz", 3)[:, None],
            _idx(raw / f"{part}-labels-idx1-ubyte.gz", 1),
            constants, Augmentation(crop_pad=2, flip=True),
        ) for part in ("train", "t10k")
    ]  # fmt: skip
    return Source(
        train=parts[0],
        test=parts[1],
        class_names=FASHION_CLASSES,
        input_shape=(1, 28, 28),
        normalization=constants,
    )


def read_imagefolder(
    folder: Path | None, normalization: Normalization | None, size: int | None = None, channels: int = 3
) -> Source:
    """Read photographs from one folder a class, below `train` and `val` (or `test`) or right in `folder`.

    The preprocessing is that of ImageNet's classifiers: 224 x 224 from a shorter side of 256. With `size`,
    the shorter side is resized to it and the middle is used: images that have the size stay as they are.
    With `channels` = 1 all images become grey.

    Raises:
        DataError: the folder holds no images in folders of classes, or `train` and the test folder do not
            have the same classes.
    """
    root = _existing("imagefolder", folder)
    constants = normalization or (IMAGENET if channels == 3 else GREY)
    held_out = next((root / name for name in ("val", "test") if (root / name).is_dir()), None)
    train = _folder_split(root / "train" if (root / "train").is_dir() else root, constants, size, channels)
    test = None if held_out is None else _folder_split(held_out, constants, size, channels)
    classes = tuple(train.dataset.classes)  # type: ignore[attr-defined]  # torchvision ships no types
    if test is not None and tuple(test.dataset.classes) != classes:  # type: ignore[attr-defined]
        odd = sorted(set(classes) ^ set(test.dataset.classes))  # type: ignore[attr-defined]
        raise DataError(
            f"{root}/train and {held_out} do not have the same classes; only one has {', '.join(odd[:5])}",
            "give every class a folder of the same name in both",
        )
    return Source(
        train=_in_memory(train, constants, size, channels),
        test=None if test is None else _in_memory(test, constants, size, channels),
        class_names=classes, input_shape=(channels, size or 224, size or 224), normalization=constants,
        test_share=FOLDER_TEST_SHARE,
    )  # fmt: skip


READERS: dict[str, Callable[[Path | None, Normalization | None], Source]] = {
    "digits": read_digits,
    "cifar10": read_cifar10,
    "fashionmnist": read_fashionmnist,
    "imagefolder": read_imagefolder,
}


def _existing(name: str, folder: Path | None) -> Path:
    if folder is None:
        raise DataError(f"{name} needs a folder", f"write {name}:DIR")
    if not folder.is_dir():
        nearest = next((p for p in folder.absolute().parents if p.is_dir()), Path("/"))
        raise DataError(
            f"{name}: there is no folder {folder}", f"the nearest folder that exists is {nearest}"
        )
    return folder


def _missing(path: Path, looked_for: str) -> DataError:
    present = sorted(p.name for p in path.parent.iterdir())[:8] if path.parent.is_dir() else []
    return DataError(
        f"{path} does not exist",
        f"looked for {looked_for}; the folder holds {', '.join(present) or 'nothing'}",
    )


def _damaged(path: Path, expected: str) -> DataError:
    return DataError(f"{path} is damaged or of another kind", f"it must hold {expected}")


def _tensor_split(images: Bytes, labels: NDArray[Any], norm: Normalization, how: Augmentation) -> TensorSplit:
    return TensorSplit(
        torch.tensor(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)),
        normalization=norm, augmentation=how,
    )  # fmt: skip


def _cifar_npz(path: Path) -> tuple[Bytes, NDArray[Any]]:
    if not path.is_file():
        raise _missing(path, "train.npz and test.npz, or the binary batches of CIFAR-10")
    expected = "`images` (N, 32, 32, 3) of uint8 and `labels` (N,) from 0 to 9"
    try:
        with np.load(path, allow_pickle=False) as archive:
            images, labels = archive["images"], archive["labels"]
    except (ValueError, KeyError, EOFError, OSError, zipfile.BadZipFile, zlib.error) as error:
        raise _damaged(path, expected) from error
    shape_ok = images.shape == (len(labels), 32, 32, 3) and images.dtype == np.uint8
    if not shape_ok or labels.min(initial=0) < 0 or labels.max(initial=0) > 9:
        raise _damaged(path, expected)
    return images.transpose(0, 3, 1, 2), labels


def _cifar_binary(paths: list[Path]) -> tuple[Bytes, NDArray[Any]]:
    rows = []
    for path in paths:
        if not path.is_file():
            raise _missing(path, "data_batch_1.bin to data_batch_5.bin and test_batch.bin")
        data = np.fromfile(path, dtype=np.uint8)
        if len(data) == 0 or len(data) % 3073 or data[::3073].max() > 9:
            raise _damaged(path, "records of one label and 3,072 pixels")
        rows.append(data.reshape(-1, 3073))
    records = np.concatenate(rows)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]


def _idx(path: Path, num_dims: int) -> Bytes:
    """Read an idx file of bytes: a magic number, the lengths as big-endian 32-bit numbers, the data."""
    if not path.is_file():
        raise _missing(path, "the gzipped idx files, in the folder, in raw or in FashionMNIST/raw")
    expected = f"{num_dims}-dimensional bytes in the idx format, gzipped"
    try:
        data = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, expected) from error
    start = 4 + 4 * num_dims
    shape = tuple(int.from_bytes(data[i : i + 4], "big") for i in range(4, start, 4))
    if data[:4] != bytes((0, 0, 8, num_dims)) or len(data) != start + int(np.prod(shape)):
        raise _damaged(path, expected)
    return np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)


def _in_memory(split: LoaderSplit, normalization: Normalization, size: int | None, channels: int) -> Split:
    """Decode small pictures once and keep them in memory: a pass over files costs more than the network."""
    if size is None or len(split) * channels * size**2 > IN_MEMORY_BYTES:
        return split
    from torchvision.transforms import v2

    fixed = v2.Compose([*_grey(channels), v2.Resize(size), v2.CenterCrop(size)])
    folder: Any = split.dataset
    images = np.empty((len(folder.samples), size, size, channels), np.uint8)
    for index, (path, _) in enumerate(folder.samples):
        try:
            images[index] = np.asarray(fixed(folder.loader(path))).reshape(size, size, channels)
        except OSError as error:
            raise DataError(f"{path} is no picture that can be read: {error}", "take it away") from None
    how = Augmentation(crop_pad=size // 8, flip=True)
    return _tensor_split(images.transpose(0, 3, 1, 2), np.asarray(folder.targets), normalization, how)


def _grey(channels: int) -> list[Any]:
    from torchvision.transforms import v2

    return [v2.Grayscale(1)] if channels == 1 else []


def _folder_split(folder: Path, normalization: Normalization, size: int | None, channels: int) -> LoaderSplit:
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    normalize = v2.Normalize(normalization.mean, normalization.std)
    finish = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), normalize]
    if size is None:
        fixed, moved = [v2.Resize(256), v2.CenterCrop(224)], [v2.RandomResizedCrop(224)]
    else:
        fixed = [v2.Resize(size), v2.CenterCrop(size)]
        moved = [v2.Resize(size), v2.RandomCrop(size, padding=size // 8, padding_mode="reflect")]
    plain = v2.Compose([*_grey(channels), *fixed, *finish])
    varied = v2.Compose([*_grey(channels), *moved, v2.RandomHorizontalFlip(), *finish])
    try:
        dataset, augmented = ImageFolder(folder, plain), ImageFolder(folder, varied)
    except FileNotFoundError as error:
        raise DataError(
            f"imagefolder: {folder} holds no images in folders of classes ({error})",
            "looked for DIR/train/CLASS/IMAGE and DIR/val/CLASS/IMAGE, or DIR/CLASS/IMAGE",
        ) from error
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return LoaderSplit(dataset, augmented=augmented, num_workers=min(MAX_WORKERS, cores))
