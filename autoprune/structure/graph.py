"""The result of tracing a network: its groups of coupled channels, what must stay, and all costs.

A *unit* is one removable slice, the same positions in the same parameter dimensions for all units of a
*group*. A group's members say which positions these are; its layers are for people to read. `tracing.trace`
makes a `ChannelGraph`, and nothing changes it afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from autoprune.errors import UsageError
from autoprune.plan import PruningPlan
from autoprune.structure.cost import Axis, Cost, CostModel, Product
from autoprune.structure.labels import Role
from autoprune.structure.patches.forward_mode import CallSite
from autoprune.structure.patches.reshape_patch import SizeCorrection
from autoprune.structure.recorder import Recording


@dataclass(frozen=True, kw_only=True)
class Member:
    """One dimension of a parameter or buffer that shrinks with a group.

    Attributes:
        name: qualified name of the parameter or buffer.
        dim: the dimension.
        index: int64 (num_units, k), the positions along `dim` that each unit owns.
        role: `out` makes the channels, `in` reads them, `affine` scales, shifts or describes them.
    """

    name: str
    dim: int
    index: NDArray[np.int64]
    role: Role
    is_buffer: bool


@dataclass(frozen=True, kw_only=True)
class Padding:
    """A padded edge of an activation that shrinks with a group; `op` is the padding operator's position."""

    module: str
    op: int
    dim: int
    side: Literal["left", "right"]
    index: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Group:
    """A set of like units that are made and read in the same layers; any of its units can be removed.

    Attributes:
        name: the name of the first layer that makes these channels; stable over pruning.
        layers: qualified names of all modules with members, in the order in which they run.
        macs: multiply-adds of the operators that shrink with this group.
        min_keep: the number of units that must stay.
        round_to: kept counts are multiples of this, unless all units stay.
    """

    name: str
    num_units: int
    layers: tuple[str, ...]
    members: tuple[Member, ...]
    paddings: tuple[Padding, ...] = ()
    macs: int = 0
    min_keep: int = 1
    round_to: int = 1

    @property
    def allowed_counts(self) -> NDArray[np.int64]:
        """The counts that the group may keep, int64, from all of its units down."""
        top = (self.num_units - 1) // self.round_to * self.round_to
        counts = np.arange(top, 0, -self.round_to, dtype=np.int64)
        return np.concatenate([[self.num_units], counts[counts >= self.min_keep]])


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A parameter dimension of which `num_channels` channels must stay, and the reason."""

    name: str
    dim: int
    num_channels: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class CountAttribute:
    """An integer attribute that counts units of groups: the length of `axis` over `per`."""

    module: str
    attribute: str
    axis: Axis
    per: int


@dataclass(frozen=True, kw_only=True)
class Reshape:
    """A reshape in a module that splits or merges channels: its line, and the axes of its result."""

    line: str
    axes: tuple[Axis, ...]


@dataclass(frozen=True, kw_only=True)
class UnitReordering:
    """An order in which channels are read along `dim`: position i of the result was `index[i]`.

    Attributes:
        labelled_axes: the axes of a reshape's result over which it spreads the channels.
        group: per position read, the number of its group, -1 where the position stays.
        unit: per position read, its unit in that group.
    """

    dim: int
    labelled_axes: tuple[int, ...]
    index: NDArray[np.int64]
    group: NDArray[np.int64]
    unit: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class RaggedCall:
    """A reshape, split or shuffle in a ragged module (`rules.channel_shuffle`): its line, and its result.

    Attributes:
        labelled_axes: the axes of a reshape, or the pieces of a split, that have labels: the
            program does not know their lengths.
    """

    line: str
    axes: tuple[Axis, ...]
    labelled_axes: tuple[int, ...]
    order: UnitReordering | None = None


@dataclass(frozen=True, kw_only=True)
class ChannelGraph:
    """A network's groups, frozen parameters and cost.

    Attributes:
        groups: in the order in which their channels are made.
        frozen: the channels that must stay, with reasons.
        round_to: kept counts should be multiples of this where a group is wide enough.
        products: the operators that multiply, for `latency`.
        latency: (axis lengths, activation bytes) -> seconds of one pass; see `latency.with_latency_model`.
        count_attributes: integers on modules that count units.
        conv_group_policies: module -> "whole" or "positions", how the groups of its convolution shrink.
        split_axes: module -> ordinal of a reshape -> which axis of the reshape's result may shrink; under
            minus the ordinal, which axis of its input.
        reshapes: module that reshapes channels -> all of its reshapes, in order.
        split: module that splits channels -> the pieces of each of its splits, in order.
        reshape_corrections: module -> the corrections that its reshapes need (`patches.reshape_patch`).
        ragged: module -> all calls in it that change shapes, in order (`rules.channel_shuffle`).
        gather_sites: the same modules -> number of a call in the pass -> its call site.
        norm_widths: module -> channels that its statistics count (`patches.norm_patch`).
        maskable: parameters and buffers that the masked network may hold zeros in.
        widths: (name, dim) of a parameter -> its length.
        recording: the forward pass from which the graph was made.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    round_to: int
    cost_model: CostModel = field(repr=False)
    products: tuple[Product, ...] = field(repr=False, default=())
    latency: Callable[[NDArray[np.int64], int], float] | None = field(repr=False, default=None)
    count_attributes: tuple[CountAttribute, ...] = field(repr=False, default=())
    conv_group_policies: Mapping[str, str] = field(repr=False, default_factory=dict)
    split_axes: Mapping[str, Mapping[int, int]] = field(repr=False, default_factory=dict)
    reshapes: Mapping[str, tuple[Reshape, ...]] = field(repr=False, default_factory=dict)
    split: Mapping[str, tuple[tuple[Axis, ...], ...]] = field(repr=False, default_factory=dict)
    reshape_corrections: Mapping[str, Mapping[CallSite, SizeCorrection] | None] = field(
        repr=False, default_factory=dict
    )
    ragged: Mapping[str, tuple[RaggedCall, ...]] = field(repr=False, default_factory=dict)
    gather_sites: Mapping[str, Mapping[int, tuple[str, int]] | None] = field(repr=False, default_factory=dict)
    norm_widths: Mapping[str, int] = field(repr=False, default_factory=dict)
    maskable: frozenset[str] = field(repr=False, default=frozenset())
    widths: Mapping[tuple[str, int], int] = field(repr=False, default_factory=dict)
    recording: Recording | None = field(repr=False, default=None, compare=False)

    def group(self, name: str) -> Group:
        """Return the group called `name`.

        Raises:
            UsageError: there is no group of that name.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise UsageError(f"there is no group {name!r}", "see `autoprune groups` for the names")

    def cost(self, plan: PruningPlan | None = None) -> Cost:
        """Return the cost of the network, or of what a plan leaves of it: exact but for the latency.

        The latency is predicted, and None for a graph without a latency model.
        """
        counts = {} if plan is None else {name: len(units) for name, units in plan.keep.items()}
        return self.cost_of_counts(counts)

    def cost_of_counts(self, counts: Mapping[str, int]) -> Cost:
        """Return the cost when each named group keeps that many units and all others keep all.

        The cost is exact, but for a predicted latency.
        """
        vector = self._vector(counts)
        cost = self.cost_model(vector)
        if self.latency is None:
            return cost
        seconds = self.latency(self.cost_model.lengths(vector), cost.activation_bytes)
        return replace(cost, latency_s=seconds)

    def with_bounds(self, *, min_keep: int, max_ratio: float) -> ChannelGraph:
        """Return the same graph with bounds on how many units each group keeps.

        A group keeps at least `min_keep` units and loses at most the share `max_ratio` of them, from 0 to
        1.
        """
        min_keeps = {
            g.name: max(min_keep, math.ceil((1 - max_ratio) * g.num_units - 1e-9)) for g in self.groups
        }
        groups = (
            replace(g, min_keep=min(g.num_units, max(g.min_keep, min_keeps[g.name]))) for g in self.groups
        )
        return replace(self, groups=tuple(groups))

    def with_bounds_of(self, original: ChannelGraph) -> ChannelGraph:
        """Return the same graph, under the bounds and multiples of the network that it was pruned from."""
        first = {g.name: g for g in original.groups}
        groups = (
            replace(g, min_keep=min(g.num_units, first[g.name].min_keep), round_to=first[g.name].round_to)
            if g.name in first
            else g
            for g in self.groups
        )
        return replace(self, groups=tuple(groups))

    def _vector(self, counts: Mapping[str, int]) -> NDArray[np.int64]:
        return np.array([counts.get(g.name, g.num_units) for g in self.groups], dtype=np.int64)

    def width(self, name: str, dim: int) -> int:
        """Return the length of one parameter dimension before any plan."""
        return self.widths[name, dim]

    def length(self, axis: Axis, counts: Mapping[str, int]) -> int:
        """Return the length of an axis when each named group keeps that many units and the others all."""
        names = [(g.name, g.num_units) for g in self.groups]
        return axis.fixed + sum(n * counts.get(*names[g]) for g, n in axis.per_unit.items())

    @cached_property
    def reach(self) -> float:
        """The share of the multiply-adds, from 0 to 1, in operators that at least one group shrinks."""
        _, touched = self.cost_model.macs_touched(self._vector({}))
        total = self.cost().macs
        return touched / total if total else 0.0
