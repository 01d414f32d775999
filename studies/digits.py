"""The demo: a small residual network on scikit-learn's handwritten digits, pruned to half of its MACs.

Needs no download. The baseline is trained on the spot (about 3 s on two cores) and classifies about 98 to
99 % of the held-out images; at half of the multiply-adds it stays within one point of that. With some 400
images in the search split, one image more or less is a quarter of a point.
"""

from __future__ import annotations

from models import resnet8

from autoprune.config import Baseline, Search, Study
from autoprune.data.sources import Data, load_data


def data() -> Data:
    """943 images to train on, 404 to search on, 450 to test on."""
    return load_data("digits", search_from="train")


study = Study(
    name="digits",
    model=resnet8,
    data=data,
    target="macs=0.5",
    max_drop=1.0,
    budget="90s",
    baseline=Baseline(epochs=30, lr=0.1, batch_size=64),
    round_to=1,
    search=Search(lr=(1e-3, 0.1)),
)
