"""Modules whose forward reshapes or splits to widths that pruning has changed, taught the new ones.

Many attention modules end in `x.reshape(B, N, C)` with C taken from their input, which is only right while
all heads are there. Such a module changes to a subclass of its own, in whose forward a reshape that cannot
work asks for the pruned width instead. It is used where the plain dense copy does not run, and, like
everything else, only kept if the network then computes what the masked one does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RESHAPES = (Tensor.reshape, Tensor.view, torch.reshape)
SPLITS = (Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes)


@dataclass
class Widths:
    """Old -> new lengths of what a module's reshapes and splits make, and whether any had to be corrected."""

    lengths: Mapping[int, int]
    pieces: Mapping[tuple[int, ...], tuple[int, ...]]
    are_needed: bool = False


class LooseModule:
    """Mixed in before the user's class: its forward runs with reshapes that know the pruned widths."""

    autoprune_widths: Widths

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward."""
        with _PrunedWidths(self.autoprune_widths):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _PrunedWidths(TorchFunctionMode):
    """Corrects the sizes of reshapes that do not fit their tensor."""

    def __init__(self, widths: Widths) -> None:
        super().__init__()
        self.widths = widths

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in RESHAPES and not kwargs:
            sizes = list(args[1]) if isinstance(args[1], (tuple, list)) else list(args[1:])
            if all(isinstance(n, (int, torch.SymInt)) for n in sizes):
                return func(args[0], self._fitted(args[0].numel(), sizes))
        if func in SPLITS:
            return self._split(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _split(self, func: Callable[..., Any], x: Tensor, sizes: Any, dim: int = 0) -> Any:
        """A split whose pieces do not add up to what there is gets the pruned pieces' sizes."""
        length = x.shape[dim]
        for old, new in self.widths.pieces.items():
            is_meant = (tuple(sizes) == old) if isinstance(sizes, (tuple, list)) else (sizes == old[0])
            if is_meant and sum(new) == length and new != old:
                self.widths.are_needed = True
                return func(x, list(new) if isinstance(sizes, (tuple, list)) else new[0], dim)
        return func(x, sizes, dim)

    def _fitted(self, numel: int, sizes: list[int]) -> list[int]:
        """The sizes, with one of them changed where they do not hold the elements."""
        if -1 in sizes or math.prod(sizes) == numel:
            return sizes
        self.widths.are_needed = True
        for old, new in self.widths.lengths.items():
            changed = [new if n == old else n for n in sizes]
            if math.prod(changed) == numel:
                return changed
        for axis in reversed(range(len(sizes))):
            others = math.prod(sizes[:axis] + sizes[axis + 1 :])
            if others and numel % others == 0 and sizes[axis] > 1:
                return [*sizes[:axis], numel // others, *sizes[axis + 1 :]]
        return sizes


@cache
def _loose_class(cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (LooseModule, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def loosen(
    module: nn.Module, lengths: Mapping[int, int], pieces: Mapping[tuple[int, ...], tuple[int, ...]]
) -> None:
    """Change a module to its loose class.

    Args:
        lengths: old -> new lengths of the axes that its reshapes put together.
        pieces: old -> new lengths of the pieces of its splits.
    """
    if lengths or pieces:
        before = module.autoprune_widths if isinstance(module, LooseModule) else Widths({}, {})
        vars(module)["autoprune_widths"] = Widths(
            {old: lengths.get(new, new) for old, new in before.lengths.items()} | dict(lengths),
            {old: pieces.get(new, new) for old, new in before.pieces.items()} | dict(pieces),
        )
        if not isinstance(module, LooseModule):
            module.__class__ = _loose_class(type(module))  # type: ignore[arg-type]
