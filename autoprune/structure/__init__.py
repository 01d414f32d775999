"""A network's structure: which channels belong together, what they cost, and the surgery that removes them.

A *unit* is the smallest thing that can be removed: the same positions in all parameter dimensions that must
shrink together. Units that are alike form a *group*. A `ChannelGraph` holds the groups of one network, what
must stay and why, and the exact cost of every plan. `trace` records one forward pass, propagates labels
over it, and returns the graph only after a pruned copy has run and done what the labels say. A *plan*
(`autoprune.plan`) says which units stay; `densify` makes the smaller network, `masked` the same function in
the original's shapes.

In reading order:

- `tracing` `trace`, the way in: record, propagate, group, verify
- `recorder` one forward pass as a list of ATen operators; `meta_shapes` makes it fast
- `labels` an integer for every channel position, ties and freezes
- `propagate` carries labels over the recording; `rules` what each operator does to them
- `zero_channels` where removed channels are exactly zero, so that sums do not see them
- `grouping` from tied labels to groups and costs
- `graph` `ChannelGraph` and its parts; `cost` multiply-adds, parameters and bytes as polynomials
- `densify` the dense and the masked network; `patches` modules that need more than sliced parameters
- `verification` does a pruned program do what the labels say; `program_match` compares operators
- `latency` seconds of a pass, predicted; `timings` the timing loop, and a table of what was timed

Exports, for other rooms: `trace` and the graph (`ChannelGraph`, `Group`, `Member`, `Frozen`, `Cost`);
surgery (`densify`, `masked`, `masked_tensors`, `verify`); the recorded pass (`record`, `Recording`, `Op`,
`Ref`); latency (`with_latency_model`, `measure_latency_share`, `time_interleaved`, `device_name`).
"""

from autoprune.structure.cost import Cost
from autoprune.structure.densify import densify, masked, masked_tensors, verify
from autoprune.structure.graph import ChannelGraph, Frozen, Group, Member
from autoprune.structure.labels import BEHIND_LAYER_NORM
from autoprune.structure.latency import measure_latency_share, with_latency_model
from autoprune.structure.recorder import Op, Recording, Ref, record
from autoprune.structure.timings import device_name, time_interleaved
from autoprune.structure.tracing import trace

__all__ = [
    "BEHIND_LAYER_NORM",
    "ChannelGraph",
    "Cost",
    "Frozen",
    "Group",
    "Member",
    "Op",
    "Recording",
    "Ref",
    "densify",
    "device_name",
    "masked",
    "masked_tensors",
    "measure_latency_share",
    "record",
    "time_interleaved",
    "trace",
    "verify",
    "with_latency_model",
]
