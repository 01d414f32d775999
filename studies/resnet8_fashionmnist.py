"""A small residual network on Fashion-MNIST, trained here and pruned to half of its MACs.

Set AUTOPRUNE_DATA to the folder that holds `FashionMNIST/raw/*.gz`. The baseline takes about a minute and
a half on two cores and reaches about 92 % of the search images, which are cut from the training set.
"""

from __future__ import annotations

import os

from models import resnet8

from autoprune.config import Baseline, Study
from autoprune.data.sources import Data, load_data
from autoprune.errors import DataError


def data() -> Data:
    """54,000 images to train on, 6,000 to search on, the official 10,000 to test on."""
    folder = os.environ.get("AUTOPRUNE_DATA")
    if not folder:
        raise DataError(
            "AUTOPRUNE_DATA is not set, so there is no data for this study",
            "export AUTOPRUNE_DATA=DIR, where DIR holds FashionMNIST/raw/*.gz",
        )
    return load_data(f"fashionmnist:{folder}", search_from="train")


study = Study(
    name="resnet8-fashionmnist",
    model=resnet8,
    data=data,
    target="macs=0.5",
    max_drop=1.0,
    budget="20m",
    baseline=Baseline(epochs=8, lr=0.1, batch_size=128),
    round_to=1,
)
