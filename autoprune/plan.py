"""Pruning plans: a plan says, for each group, which units stay.

A plan speaks about one `ChannelGraph`. Groups that it does not mention stay whole. Plans compose: a plan
for an already pruned network, seen from the original, is one plan again, so any number of rounds comes
down to one set of kept indices into the original's channels.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from autoprune.errors import ArtifactError, UsageError

Indices = NDArray[np.int64]


class HasUnits(Protocol):
    """The part of a group that a plan needs to know."""

    @property
    def name(self) -> str:
        """The group's name, stable over pruning."""

    @property
    def num_units(self) -> int:
        """The number of units of the group."""

    @property
    def min_keep(self) -> int:
        """The number of units that must stay."""


class HasGroups(Protocol):
    """The part of a graph that a plan needs to know."""

    @property
    def groups(self) -> Iterable[HasUnits]:
        """All prunable groups."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PruningPlan:
    """The units that stay, for each group that the plan mentions; immutable.

    Attributes:
        keep: group name -> sorted unit indices, int64 (kept,), at least one each.
        num_units: group name -> width before this plan, for the same names.

    Raises:
        UsageError: a group keeps no unit, or units outside its width, unsorted or twice, or has no width.
    """

    keep: Mapping[str, Indices]
    num_units: Mapping[str, int]

    def __post_init__(self) -> None:
        for name, units in self.keep.items():
            width = self.num_units.get(name)
            if width is None:
                raise UsageError(
                    f"the plan keeps units of {name!r} but gives no width for it", "make it again"
                )
            if len(units) == 0 or units[0] < 0 or units[-1] >= width or np.any(np.diff(units) <= 0):
                raise UsageError(
                    f"the plan for group {name!r} keeps no unit, or units outside 0..{width - 1}",
                    "keep at least one unit of every group, sorted, each once",
                )

    @classmethod
    def full(cls, graph: HasGroups) -> PruningPlan:
        """Return the plan that removes nothing from the groups of `graph`."""
        widths = {g.name: g.num_units for g in graph.groups}
        return cls(keep={n: np.arange(w, dtype=np.int64) for n, w in widths.items()}, num_units=widths)

    @classmethod
    def random(cls, graph: HasGroups, ratio: float, seed: int) -> PruningPlan:
        """Return a plan that removes the share `ratio` of every group's units at random; mostly for tests.

        Args:
            ratio: from 0 to 1; a group keeps its `min_keep` units nevertheless.
            seed: the same seed gives the same plan.
        """
        rng = np.random.default_rng(seed)
        keep = {}
        for group in graph.groups:
            num_kept = max(group.min_keep, group.num_units - round(ratio * group.num_units))
            keep[group.name] = np.sort(rng.permutation(group.num_units)[:num_kept]).astype(np.int64)
        return cls(keep=keep, num_units={g.name: g.num_units for g in graph.groups})

    def kept(self, name: str, num_units: int) -> Indices:
        """Return the kept units of one group, int64 (kept,): all of them where it is not mentioned."""
        return self.keep[name] if name in self.keep else np.arange(num_units, dtype=np.int64)

    def compose(self, other: PruningPlan) -> PruningPlan:
        """Return the plan that applies this one first and then `other`, which was made for its result.

        Raises:
            UsageError: `other` was not made for the network that this plan leaves.
        """
        keep, widths = dict(self.keep), dict(self.num_units)
        for name, second in other.keep.items():
            first = keep.get(name)
            if first is None:
                keep[name], widths[name] = second, other.num_units[name]
            elif len(first) != other.num_units[name]:
                raise UsageError(
                    f"plans do not compose: the first leaves {len(first)} units of {name!r}, "
                    f"the second expects {other.num_units[name]}",
                    "make the second plan from a graph of the network that the first one leaves",
                )
            else:
                keep[name] = first[second]
        return PruningPlan(keep=keep, num_units=widths)

    def to_json(self) -> str:
        """Return a stable text form of the plan: names sorted, every kept index written out."""
        groups = {
            name: {"num_units": int(self.num_units[name]), "keep": [int(i) for i in self.keep[name]]}
            for name in sorted(self.keep)
        }
        return json.dumps({"autoprune_plan": 1, "groups": groups}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> PruningPlan:
        """Read the plan that `to_json` wrote.

        Raises:
            ArtifactError: the text is not a plan of a known version.
            UsageError: the text is a plan, but its indices are not those of a group of that width.
        """
        try:
            document = json.loads(text)
            if document["autoprune_plan"] != 1:
                raise ValueError
            groups = document["groups"].items()
            keep = {str(n): np.asarray(g["keep"], dtype=np.int64) for n, g in groups}
            return cls(keep=keep, num_units={str(n): int(g["num_units"]) for n, g in groups})
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            raise ArtifactError("the text is not a pruning plan of version 1", "export it again") from error

    @property
    def digest(self) -> str:
        """The SHA-256 digest of the text form, hexadecimal."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PruningPlan) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.to_json())
