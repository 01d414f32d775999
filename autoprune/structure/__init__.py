"""Rooms are described once all of them stand."""

from autoprune.structure.cost import Cost
from autoprune.structure.densify import densify, masked, masked_tensors, verify
from autoprune.structure.graph import ChannelGraph, Frozen, Group, Member
from autoprune.structure.labels import BEHIND_LAYER_NORM
from autoprune.structure.latency import measured_share, with_latency
from autoprune.structure.recorder import Op, Ref, Tape, record
from autoprune.structure.timings import device_name
from autoprune.structure.trace_model import trace

__all__ = [
    "BEHIND_LAYER_NORM",
    "ChannelGraph",
    "Cost",
    "Frozen",
    "Group",
    "Member",
    "Op",
    "Ref",
    "Tape",
    "densify",
    "device_name",
    "masked",
    "masked_tensors",
    "measured_share",
    "record",
    "trace",
    "verify",
    "with_latency",
]
