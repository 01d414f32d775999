"""Data and weights: three splits that share no sample, and where they come from.

A *split* is a fixed, ordered set of samples that comes in batches, the same for the same seed. `Data` holds
three splits: fine-tuning sees `train`, sensitivity and trials see `search`, and `test` is read twice in a
run.

Modules, in reading order:

- `splits`: the `Split` and its kinds: images in memory, any map-style data set, batches that are cached.
- `datasets`: the readers of the data sets that a command line can name.
- `spec`: reads the text after `--data`.
- `sources`: `Data`; makes the three splits of a named data set or of data sets that a user brings.
- `weights`: loads trained weights into a network.
"""

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
