"""Modules that split and shuffle channels unequally: their dense forward gathers by index.

A ragged module (`shuffles`) changes to a subclass of its own. In its forward, a reshape that begins a shuffle
reads its channels by index, already in their new order, and makes one part of them all; what follows then
only moves an axis of length 1 about. Splits get the lengths that the labels predict. Which call is which is
found out by a pass without values: the calls on each line come in the order in which the propagation saw
them.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.structure.patches.reshape_patch import RESHAPES, SPLITS, mix_in_
from autoprune.structure.recorder import where

SHUFFLES = (torch.channel_shuffle, nn.functional.channel_shuffle)
ALL_SPLITS = (*SPLITS, torch.chunk, Tensor.chunk)
WATCHED = frozenset((*RESHAPES, *ALL_SPLITS, *SHUFFLES))


@dataclass(frozen=True)
class PrunedCall:
    """A reshape, split or shuffle of a ragged module, as it is after pruning.

    Attributes:
        sizes: the shape that a reshape makes of the example, or the lengths of a split's pieces.
        given: the axes of a reshape whose lengths must be given.
        dim: the axis that is gathered, by the positions `order`; None where nothing is.
    """

    sizes: tuple[int, ...]
    given: tuple[int, ...] = ()
    dim: int = 0
    order: Tensor | None = None

    def run(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The call, with what it got."""
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
        asked = rest or [shape or size]
        asked = list(asked[0]) if isinstance(asked[0], (tuple, list)) else asked
        changed = [self.sizes[d] if d in self.given else n for d, n in enumerate(asked)]
        return changed if -1 in changed or math.prod(changed) == x.numel() else asked


def _split(sizes: Sequence[int], func: Callable[..., Any], x: Tensor, asked: Any, dim: int = 0) -> Any:
    is_meant = sum(sizes) == x.shape[dim]
    return torch.split(x, list(sizes), dim) if is_meant else func(x, asked, dim)


@dataclass
class PrunedCalls:
    """All calls of a ragged module.

    Attributes:
        by_line: in the order in which they come on each line; None where nothing changes.
        numbers: number of the call in a pass -> its line and place there; None while that is found out.
        found: what was found out in the last pass.
    """

    by_line: Mapping[str, Sequence[PrunedCall | None]]
    numbers: Mapping[int, tuple[str, int]] | None
    found: dict[int, tuple[str, int]] = field(default_factory=dict)

    def gather_by(self, index: Tensor) -> PrunedCall | None:
        """The call that gathers channels by this very tensor."""
        calls = (c for calls in self.by_line.values() for c in calls)
        return next((c for c in calls if c is not None and c.order is index), None)


class GatherPatch:
    """Mixed in before the user's class: its forward splits and shuffles what pruning has left."""

    autoprune_calls: PrunedCalls

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward."""
        with _GatherMode(self.autoprune_calls):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _GatherMode(TorchFunctionMode):
    """Replaces the calls of one forward pass."""

    def __init__(self, calls: PrunedCalls) -> None:
        super().__init__()
        self.calls = calls
        self.number = 0
        self.seen: Counter[str] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in WATCHED:
            self.number += 1
            at = self._place()
            call = self.calls.by_line[at[0]][at[1]] if at is not None else None
            if call is not None:
                return call.run(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _place(self) -> tuple[str, int] | None:
        if torch.compiler.is_dynamo_compiling():  # a compiler cannot see lines
            return (self.calls.numbers or {}).get(self.number)
        line = where(sys._getframe(1))
        turn, self.seen[line] = self.seen[line], self.seen[line] + 1
        if turn >= len(self.calls.by_line.get(line, ())):
            return None
        self.calls.found[self.number] = (line, turn)
        return line, turn


def patch_gathers_(
    module: nn.Module,
    by_line: Mapping[str, Sequence[PrunedCall | None]],
    numbers: Mapping[int, tuple[str, int]] | None,
) -> None:
    """Change a module to its gathered class; see `Calls` for the arguments."""
    vars(module)["autoprune_calls"] = PrunedCalls(by_line, numbers)
    mix_in_(module, GatherPatch)
