"""Rooms are described once all of them stand."""

from autoprune.data.cached_split import kept
from autoprune.data.sources import Data, from_datasets, load_data
from autoprune.data.splits import Batch, Split, derive_seed
from autoprune.data.weights import load_weights_

__all__ = [
    "Batch",
    "Data",
    "Split",
    "derive_seed",
    "from_datasets",
    "kept",
    "load_data",
    "load_weights_",
]
