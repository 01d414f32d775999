"""Reshapes and splits to widths that pruning has changed, corrected while the user's forward runs.

Many attention modules end in `x.reshape(B, N, C)` with C taken from their input, which is only right while
all heads are there. A patched module (`forward_mode`) gives such reshapes the lengths that the labels
predict. One pass without values finds out which reshapes need it: every reshape is compared with the shape
that the propagation recorded for its line. The patch is used where the plain dense copy does not run, and
is kept only if the patched network then computes what the masked one does (`verification`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.structure.patches.forward_mode import CallSite, PatchMode, mix_in_

PASSES_CALLS_ON = True  # see `recorder.source_line`

RESHAPES = (Tensor.reshape, Tensor.view, torch.reshape)
SPLITS = (Tensor.split, torch.split, Tensor.split_with_sizes, torch.split_with_sizes)
Shape = tuple[int, ...]


@dataclass(frozen=True)
class SizeCorrection:
    """A reshape whose own arithmetic is wrong after pruning.

    Attributes:
        line: the line on which it is written.
        number: the number of its shape among those that the line makes.
        dims: the axes whose lengths must be given.
        call: its number among all reshapes of the pass in which it was found.
    """

    line: str
    number: int
    dims: tuple[int, ...]
    call: int = 0


@dataclass
class PrunedSizes:
    """The lengths that a patched module's reshapes and splits make.

    Attributes:
        shapes: line -> the shapes that its reshapes make, pruned, for the example input.
        corrections: call site -> what to correct; None while that is not known yet.
        pieces: old -> new lengths of the pieces of its splits.
        needed: the corrections that a pass with `corrections=None` needed.
        corrects_split: whether a split had to be corrected in any pass.
    """

    shapes: Mapping[str, Sequence[Shape]]
    corrections: Mapping[CallSite, SizeCorrection] | None
    pieces: Mapping[Shape, Shape]
    needed: dict[CallSite, SizeCorrection] = field(default_factory=dict)
    corrects_split: bool = False

    def correction_at(self, site: CallSite, call: int) -> SizeCorrection | None:
        """Return the correction of a reshape by its site, or by its number in the pass under a compiler."""
        corrections = self.corrections or {}
        if torch.compiler.is_dynamo_compiling():
            return next((c for c in corrections.values() if c.call == call), None)
        return corrections.get(site)

    def closest(self, line: str, sizes: Sequence[int], numel: int) -> SizeCorrection | None:
        """Return the correction of a reshape to `sizes`.

        It leads to the shape of its line that differs in the fewest axes.
        """
        best, most_equal = None, -1
        for number, shape in enumerate(self.shapes.get(line, ())):
            if len(shape) == len(sizes) and math.prod(shape) == numel:
                wrong = [d for d, n in enumerate(sizes) if n not in (-1, shape[d])]
                if len(sizes) - len(wrong) > most_equal:
                    best, most_equal = SizeCorrection(line, number, tuple(wrong)), len(sizes) - len(wrong)
        return best


class ReshapePatch:
    """A class that is mixed in before the user's: its reshapes and splits make the pruned lengths."""

    autoprune_sizes: PrunedSizes

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's forward under the mode."""
        with _ReshapeMode(self.autoprune_sizes):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _ReshapeMode(PatchMode):
    """The mode that corrects the sizes of reshapes and splits in one forward pass."""

    def __init__(self, sizes: PrunedSizes) -> None:
        super().__init__()
        self.sizes = sizes

    def replace(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make reshapes and splits with other sizes where these are wrong, and everything else as it is."""
        if func in RESHAPES and not kwargs:
            sizes = list(args[1]) if isinstance(args[1], (tuple, list)) else list(args[1:])
            if all(isinstance(n, (int, torch.SymInt)) for n in sizes):
                return func(args[0], self._corrected(args[0], sizes, self.count_call()))
        if func is Tensor.unflatten and not kwargs:
            return self._unflatten(*args)
        if func in SPLITS:
            return self._split(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _unflatten(self, x: Tensor, dim: int, sizes: Sequence[int]) -> Tensor:
        dim %= x.dim()
        shape = [*x.shape[:dim], *sizes, *x.shape[dim + 1 :]]
        return x.reshape(self._corrected(x, shape, self.count_call()))

    def _corrected(self, x: Tensor, sizes: list[int], site: CallSite) -> list[int]:
        if self.sizes.corrections is None:
            correction = self._find_correction(x, sizes, site)
        else:
            correction = self.sizes.correction_at(site, self.num_calls)
        if correction is None:
            return sizes
        shape = self.sizes.shapes[correction.line][correction.number]
        changed = [shape[d] if d in correction.dims else n for d, n in enumerate(sizes)]
        if -1 in changed or math.prod(changed) == x.numel():
            return changed
        # The shape is that of the example: with a batch of another size one of its axes is another length.
        for axis in correction.dims:
            others = math.prod(changed[:axis] + changed[axis + 1 :])
            if others and x.numel() % others == 0:
                return [*changed[:axis], x.numel() // others, *changed[axis + 1 :]]
        return sizes

    def _find_correction(self, x: Tensor, sizes: list[int], site: CallSite) -> SizeCorrection | None:
        correction = self.sizes.closest(site[0], sizes, x.numel())
        if correction is None or not correction.dims:
            return None
        self.sizes.needed[site] = replace(correction, call=self.num_calls)
        return correction

    def _split(self, func: Callable[..., Any], x: Tensor, lengths: Any, dim: int = 0) -> Any:
        """Split by the pruned pieces' lengths where the program's own do not add up to the axis."""
        is_list = isinstance(lengths, (tuple, list))
        for old, new in self.sizes.pieces.items():
            is_meant = tuple(lengths) == old if is_list else lengths == old[0]
            if is_meant and sum(new) == x.shape[dim] and new != old:
                self.sizes.corrects_split = True
                return func(x, list(new) if is_list else new[0], dim)
        return func(x, lengths, dim)


def patch_reshapes_(
    module: nn.Module,
    shapes: Mapping[str, Sequence[Shape]],
    corrections: Mapping[CallSite, SizeCorrection] | None,
    pieces: Mapping[Shape, Shape],
) -> None:
    """Change a module to its patched class, unless there is nothing to correct; see `PrunedSizes`."""
    if corrections is None or corrections or pieces:
        before = module.autoprune_sizes.pieces if isinstance(module, ReshapePatch) else {}
        # Lengths written in the program are the original's: an earlier pruning's pieces lead on to the new
        # ones.
        pieces = {old: pieces.get(new, new) for old, new in before.items()} | dict(pieces)
        vars(module)["autoprune_sizes"] = PrunedSizes(shapes, corrections, pieces)
        mix_in_(module, ReshapePatch)
