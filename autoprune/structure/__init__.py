"""Rooms are described once all of them stand."""

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
