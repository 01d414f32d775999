"""A published ResNet-20 on CIFAR-10, pruned to half of its MACs (41 to 20 million).

Set AUTOPRUNE_DATA to a folder that holds `cifar10/train.npz`, `cifar10/test.npz` (docs/commands.md says what
is in them) and `weights/resnet20-12fca82f.th`. The network has top-1 91.73 on the 10,000 test images. It has
seen the training set, so the search runs on half of the test images and the other half is the test.

What it took: half an hour on one of two busy cores reached the target, at 0.94 points less on the test half
(benchmarks/results/resnet20_cifar10.md). Where a core is slower still, give it an hour.
"""

from __future__ import annotations

import os
from pathlib import Path

from models import ResNet, resnet20

from autoprune.config import Finetune, Study
from autoprune.data.sources import Data, load_data
from autoprune.data.splits import IMAGENET
from autoprune.errors import DataError

WEIGHTS = "weights/resnet20-12fca82f.th"


def data_folder(weights: str) -> Path:
    """The folder that AUTOPRUNE_DATA names, with CIFAR-10 and these weights in it."""
    named = os.environ.get("AUTOPRUNE_DATA")
    hint = f"export AUTOPRUNE_DATA=DIR, where DIR holds cifar10/train.npz, cifar10/test.npz and {weights}"
    if not named:
        raise DataError("AUTOPRUNE_DATA is not set, so there is no data for this study", hint)
    missing = [
        f for f in ("cifar10/train.npz", "cifar10/test.npz", weights) if not (Path(named) / f).is_file()
    ]
    if missing:
        raise DataError(f"AUTOPRUNE_DATA={named} lacks {', '.join(missing)}", hint)
    return Path(named)


def model() -> ResNet:
    """The network with its weights."""
    return resnet20(data_folder(WEIGHTS) / WEIGHTS)


def data() -> Data:
    """Normalised with the constants that these weights were trained with, which are ImageNet's."""
    return load_data(
        f"cifar10:{data_folder(WEIGHTS) / 'cifar10'}", search_from="test", normalization=IMAGENET
    )


study = Study(
    name="resnet20-cifar10",
    model=model,
    data=data,
    target="macs=0.5",
    max_drop=1.0,
    budget="30m",
    round_to=1,
    finetune=Finetune(weight_decay=1e-4),
)
