"""Modules that split and shuffle channels unevenly: their dense forward gathers channels by index.

A ragged module (`channel_shuffle`) changes to a patched class (`forward_mode`). In its forward, a reshape
that begins a shuffle reads its channels by index, already in their new order, and makes one part of them
all; the reshapes and permutations that follow then only move an axis of length 1. Splits get the lengths
that the labels predict. A pass without values finds out which call is which: the calls on each line come in
the order in which the propagation met them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.structure.patches.forward_mode import CallSite, PatchMode, mix_in_
from autoprune.structure.patches.reshape_patch import RESHAPES, SPLITS

PASSES_CALLS_ON = True  # see `recorder.source_line`

SHUFFLES = (torch.channel_shuffle, nn.functional.channel_shuffle)
ALL_SPLITS = (*SPLITS, torch.chunk, Tensor.chunk)
WATCHED = frozenset((*RESHAPES, *ALL_SPLITS, *SHUFFLES))


@dataclass(frozen=True)
class PrunedCall:
    """A reshape, split or shuffle of a ragged module, as it is after pruning.

    Attributes:
        sizes: the shape that a reshape makes of the example, or the lengths of a split's pieces.
        labelled_axes: the axes of a reshape that hold channels; their lengths are those in `sizes`.
        dim: the axis that is gathered.
        order: the positions to gather, int64 (kept,); None where nothing is gathered.
    """

    sizes: tuple[int, ...]
    labelled_axes: tuple[int, ...] = ()
    dim: int = 0
    order: Tensor | None = None

    def run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make the call `func(*args, **kwargs)` with the pruned lengths."""
        if func in ALL_SPLITS:
            return _split(self.sizes, func, *args, **kwargs)
        x, *rest = args
        if self.order is not None:
            is_here = x.is_meta or x.device == self.order.device
            x = x.index_select(self.dim, self.order if is_here else self.order.to(x.device))
        if func in SHUFFLES:
            return x
        return func(x, self._corrected(x, rest, **kwargs))

    def _corrected(self, x: Tensor, rest: list[Any], shape: Any = None, size: Any = None) -> list[int]:
        lengths = rest or [shape or size]
        lengths = list(lengths[0]) if isinstance(lengths[0], (tuple, list)) else lengths
        changed = [self.sizes[d] if d in self.labelled_axes else n for d, n in enumerate(lengths)]
        return changed if -1 in changed or math.prod(changed) == x.numel() else lengths


def _split(sizes: Sequence[int], func: Callable[..., Any], x: Tensor, lengths: Any, dim: int = 0) -> Any:
    is_meant = sum(sizes) == x.shape[dim]
    return torch.split(x, list(sizes), dim) if is_meant else func(x, lengths, dim)


@dataclass
class PrunedCalls:
    """The watched calls of a ragged module.

    Attributes:
        by_line: line -> its calls, in the order in which they come in a pass; None where nothing changes.
        numbers: number of the call in a pass -> its site; None while that is not known yet.
        sites: the same, as the last pass had it.
    """

    by_line: Mapping[str, Sequence[PrunedCall | None]]
    numbers: Mapping[int, CallSite] | None
    sites: dict[int, CallSite] = field(default_factory=dict)

    def gather_by(self, index: Tensor) -> PrunedCall | None:
        """Return the call that gathers channels by this very tensor, or None."""
        calls = (c for calls in self.by_line.values() for c in calls)
        return next((c for c in calls if c is not None and c.order is index), None)


class GatherPatch:
    """A class that is mixed in before the user's: its forward splits and shuffles what pruning has left."""

    autoprune_calls: PrunedCalls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's forward under the mode."""
        with _GatherMode(self.autoprune_calls):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _GatherMode(PatchMode):
    """The mode that replaces the reshapes, splits and shuffles of one forward pass."""

    def __init__(self, calls: PrunedCalls) -> None:
        super().__init__()
        self.calls = calls

    def replace(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make the pruned call, where the call is one that changes."""
        if func in WATCHED:
            site = self._known_site(self.count_call())
            call = self.calls.by_line[site[0]][site[1]] if site is not None else None
            if call is not None:
                return call.run(func, args, kwargs)
        return func(*args, **kwargs)

    def _known_site(self, site: CallSite) -> CallSite | None:
        if torch.compiler.is_dynamo_compiling():
            return (self.calls.numbers or {}).get(self.num_calls)
        line, turn = site
        if turn >= len(self.calls.by_line.get(line, ())):
            return None
        self.calls.sites[self.num_calls] = site
        return site


def patch_gathers_(
    module: nn.Module,
    by_line: Mapping[str, Sequence[PrunedCall | None]],
    numbers: Mapping[int, CallSite] | None,
) -> None:
    """Change a module to its patched class; see `PrunedCalls` for the arguments."""
    vars(module)["autoprune_calls"] = PrunedCalls(by_line, numbers)
    mix_in_(module, GatherPatch)
