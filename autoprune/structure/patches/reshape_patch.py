"""Modules whose forward reshapes or splits to widths that pruning has changed, taught the new ones.

Many attention modules end in `x.reshape(B, N, C)` with C taken from their input, which is only right while
all heads are there. Such a module changes to a subclass of its own, in whose forward those reshapes get the
lengths that the labels predict. Which ones is found out by a pass without values, in which every reshape is
compared with the shape that the propagation saw on its line. It is used where the plain dense copy does not
run, and, like everything else, only kept if the network then computes what the masked one does.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.structure.recorder import where

RESHAPES = (Tensor.reshape, Tensor.view, torch.reshape)
SPLITS = (Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes)
Shape = tuple[int, ...]
CallSite = tuple[
    str, int
]  # a line, and how often a reshape was on it in this pass: some passes do more than others


@dataclass(frozen=True)
class SizeCorrection:
    """A reshape of a module whose own arithmetic is wrong after pruning.

    Attributes:
        line: where it is written; `number` is that of its shape among those that the line makes.
        dims: the axes whose lengths must be given.
        call: its number among all reshapes of the pass in which it was found.
    """

    line: str
    number: int
    dims: tuple[int, ...]
    call: int = 0


@dataclass
class PrunedSizes:
    """What a module's reshapes and splits make.

    Attributes:
        shapes: line -> the shapes that its reshapes make, pruned, for the example input.
        fixes: line and turn on it in a pass -> what to correct; None while that is found out.
        pieces: old -> new lengths of the pieces of its splits.
        found: what was corrected while it was found out.
        has_split: whether a split had to be corrected.
    """

    shapes: Mapping[str, Sequence[Shape]]
    fixes: Mapping[CallSite, SizeCorrection] | None
    pieces: Mapping[Shape, Shape]
    found: dict[CallSite, SizeCorrection] = field(default_factory=dict)
    has_split: bool = False

    def fix_at(self, place: CallSite, call: int) -> SizeCorrection | None:
        """What to correct in a reshape. A compiler cannot see lines; there its number in the pass tells."""
        fixes = self.fixes or {}
        if torch.compiler.is_dynamo_compiling():
            return next((f for f in fixes.values() if f.call == call), None)
        return fixes.get(place)

    def fit(self, line: str, sizes: Sequence[int], numel: int) -> SizeCorrection | None:
        """What to correct in a reshape: the shape of its line that is closest to what it asks for."""
        best, most = None, -1
        for number, shape in enumerate(self.shapes.get(line, ())):
            if len(shape) == len(sizes) and math.prod(shape) == numel:
                apart = [d for d, n in enumerate(sizes) if n not in (-1, shape[d])]
                if len(sizes) - len(apart) > most:
                    best, most = SizeCorrection(line, number, tuple(apart)), len(sizes) - len(apart)
        return best


class ReshapePatch:
    """Mixed in before the user's class: its forward runs with reshapes that know the pruned widths."""

    autoprune_sizes: PrunedSizes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward."""
        with _ReshapeMode(self.autoprune_sizes):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _ReshapeMode(TorchFunctionMode):
    """Corrects the sizes of reshapes and splits in one forward pass."""

    def __init__(self, widths: PrunedSizes) -> None:
        super().__init__()
        self.widths = widths
        self.calls = 0
        self.seen: Counter[str] = Counter()

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
                return func(args[0], self._corrected(args[0], sizes, self._place()))
        if func is Tensor.unflatten and not kwargs:
            return self._unflatten(*args)
        if func in SPLITS:
            return self._split(func, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _unflatten(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        dim %= x.dim()
        shape = [*x.shape[:dim], *sizes, *x.shape[dim + 1 :]]
        return x.reshape(self._corrected(x, shape, self._place()))

    def _place(self) -> CallSite:
        self.calls += 1
        line = "" if torch.compiler.is_dynamo_compiling() else where(sys._getframe(1))
        self.seen[line] += 1
        return line, self.seen[line]

    def _corrected(self, x: Tensor, sizes: list[int], place: CallSite) -> list[int]:
        """The sizes, those that follow a wrong width corrected."""
        widths = self.widths
        fix = self._found(x, sizes, place) if widths.fixes is None else widths.fix_at(place, self.calls)
        if fix is None:
            return sizes
        wanted = widths.shapes[fix.line][fix.number]
        changed = [wanted[d] if d in fix.dims else n for d, n in enumerate(sizes)]
        if -1 in changed or math.prod(changed) == x.numel():
            return changed
        for axis in fix.dims:  # another batch than the example's is in one of them
            others = math.prod(changed[:axis] + changed[axis + 1 :])
            if others and x.numel() % others == 0:
                return [*changed[:axis], x.numel() // others, *changed[axis + 1 :]]
        return sizes

    def _found(self, x: Tensor, sizes: list[int], place: CallSite) -> SizeCorrection | None:
        fix = self.widths.fit(place[0], sizes, x.numel())
        if fix is None or not fix.dims:
            return None
        self.widths.found[place] = replace(fix, call=self.calls)
        return fix

    def _split(self, func: Callable[..., Any], x: Tensor, sizes: Any, dim: int = 0) -> Any:
        """A split whose pieces do not add up to what there is gets the pruned pieces' sizes."""
        length = x.shape[dim]
        for old, new in self.widths.pieces.items():
            is_meant = (tuple(sizes) == old) if isinstance(sizes, (tuple, list)) else (sizes == old[0])
            if is_meant and sum(new) == length and new != old:
                self.widths.has_split = True
                return func(x, list(new) if isinstance(sizes, (tuple, list)) else new[0], dim)
        return func(x, sizes, dim)


def mix_in_(module: nn.Module, mixin: type) -> None:
    """Change a module to a subclass of its class that has `mixin` before it, unless it is one already."""
    if not isinstance(module, mixin):
        module.__class__ = _mixed(mixin, type(module))  # type: ignore[arg-type]


@cache
def _mixed(mixin: type, cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def patch_reshapes_(
    module: nn.Module,
    shapes: Mapping[str, Sequence[Shape]],
    fixes: Mapping[CallSite, SizeCorrection] | None,
    pieces: Mapping[Shape, Shape],
) -> None:
    """Change a module to its loose class; see `Widths` for the arguments."""
    if fixes is None or fixes or pieces:
        before = module.autoprune_sizes.pieces if isinstance(module, ReshapePatch) else {}
        pieces = {old: pieces.get(new, new) for old, new in before.items()} | dict(pieces)
        vars(module)["autoprune_sizes"] = PrunedSizes(shapes, fixes, pieces)
        mix_in_(module, ReshapePatch)
