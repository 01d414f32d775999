"""Rooms are described once all of them stand."""

from autoprune.data.sources import Data, from_datasets, load_data
from autoprune.data.splits import Batch, Split, cache_batches, derive_seed
from autoprune.data.weights import load_weights_

__all__ = [
    "Batch",
    "Data",
    "Split",
    "cache_batches",
    "derive_seed",
    "from_datasets",
    "load_data",
    "load_weights_",
]
