"""The text that names data: `NAME[:DIR][,size=N][,channels=N][,normalize=HOW]`, as `--data` takes it.

`size` is the height and width of an image folder's inputs. `channels` is 1 for a network of grey images;
its default is 3. `normalize` is the normalisation that the weights were trained with: the name of the data
set that has these constants, `half` (0.5 and 0.5), `none` (inputs in [0, 1]), or numbers as MEAN/STD, one
for all channels or one for each: `0.5/0.25`, `0.49:0.48:0.45/0.25:0.24:0.26`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from autoprune.data.datasets import CIFAR10, DIGITS, FASHION, READERS
from autoprune.data.splits import IMAGENET, Normalization
from autoprune.errors import DataError

NAMED = {
    "imagenet": IMAGENET, "cifar10": CIFAR10, "fashionmnist": FASHION, "digits": DIGITS,
    "half": Normalization(mean=(0.5,), std=(0.5,)), "none": Normalization(mean=(0.0,), std=(1.0,)),
}  # fmt: skip
CHANNELS = {"digits": 1, "fashionmnist": 1}  # the others have three
OPTIONS = ("size", "channels", "normalize")


@dataclass(frozen=True, kw_only=True)
class DataSpec:
    """The data that a text names, and how they become inputs; None stands for the data set's own way."""

    name: str
    folder: Path | None
    size: int | None
    channels: int
    normalization: Normalization | None


def parse_data(text: str) -> DataSpec:
    """Parse the text that names data.

    Raises:
        DataError: the text names no data set, or one of its options is wrong; the hint names the nearest.
    """
    head, *options = re.split(r",(?=\w+=)", text)
    name, _, folder = head.partition(":")
    if name not in READERS:
        names = ", ".join(n if n == "digits" else f"{n}:DIR" for n in READERS)
        raise DataError(f"there is no data set {name!r}", _nearest(name, READERS, f"known are {names}"))
    values = dict(option.split("=", 1) for option in options)
    for option in values:
        if option not in OPTIONS:
            hint = _nearest(option, OPTIONS, f"known are {', '.join(OPTIONS)}")
            raise DataError(f"data {text!r} has no option {option!r}", hint)
    channels = _channels(name, values.get("channels"))
    return DataSpec(
        name=name, folder=Path(folder).expanduser() if folder else None, size=_size(name, values.get("size")),
        channels=channels, normalization=_normalization(values.get("normalize"), channels),
    )  # fmt: skip


def _size(name: str, text: str | None) -> int | None:
    if text is None:
        return None
    if name != "imagefolder":
        raise DataError(f"{name} has images of one size", "size= is for imagefolder")
    if not re.fullmatch(r"[1-9][0-9]{0,3}", text):
        raise DataError(f"size={text} is no image size", "write for example size=64")
    return int(text)


def _channels(name: str, text: str | None) -> int:
    if text is None:
        return CHANNELS.get(name, 3)
    if name != "imagefolder":
        raise DataError(f"{name} has images of one kind", "channels= is for imagefolder")
    if text not in ("1", "3"):
        raise DataError(
            f"channels={text} is no kind of image", "write channels=1 for grey, channels=3 for colour"
        )
    return int(text)


def _normalization(text: str | None, channels: int) -> Normalization | None:
    if text is None:
        return None
    constants = NAMED.get(text) or _numbers(text)
    if constants is None:
        names = ", ".join(NAMED)
        hint = _nearest(text, NAMED, f"give one of {names}, or MEAN/STD as in 0.5/0.25")
        raise DataError(f"normalize={text} is not understood", hint)
    if len(constants.mean) == 1:
        return Normalization(mean=constants.mean * channels, std=constants.std * channels)
    if len(constants.mean) != channels:
        raise DataError(
            f"normalize={text} is for {len(constants.mean)} channels, and the images have {channels}",
            "give one number for all channels, or one for each",
        )
    return constants


def _numbers(text: str) -> Normalization | None:
    mean, _, std = text.partition("/")
    try:
        means, stds = (tuple(float(n) for n in part.split(":")) for part in (mean, std))
    except ValueError:
        return None
    fits = len(means) == len(stds) and all(s > 0 for s in stds)
    return Normalization(mean=means, std=stds) if fits else None


def _nearest(word: str, choices: Iterable[str], otherwise: str) -> str:
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"did you mean {near[0]}? {otherwise}" if near else otherwise
