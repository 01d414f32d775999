"""Propagation over a recording: labels travel with the tensors, one operator at a time.

Every tensor carries, for each of its axes, an array of labels (which channel lies at which position) or
None (an axis that no pruning may change). For each operator a rule (`rules.table`) says which labels tie,
which freeze, and what the axes of its outputs carry. Besides ties a propagation collects

* `cost_terms`, the multiply-adds of each operator as a product of axis lengths,
* `reshape_splits`, `splits` and `reshape_merges`, where a program may have a size written in that labels
  cannot see,
* `unit_counts`, integers on modules that count what pruning removes (heads, groups).

A *lookahead* is a small propagation of its own that follows one axis from one tensor on, to see where it
ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from heapq import heappop, heappush
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from autoprune.structure.labels import FIXED, LabelArray, Labels, Role
from autoprune.structure.recorder import Op, Recording, Ref
from autoprune.structure.zero_channels import is_non_negative, maskable, stays_zero
from autoprune.torch_private import ConvBase

Axes = list[LabelArray | None]
# The propagation and an operator -> the labels of its output's axes, or of each output's.
Rule = Callable[["Propagation", Op], "Axes | list[Axes]"]

LOOKAHEAD_OPS = 60  # the most operators that a lookahead follows; attention and shuffles end within about 20
SPATIAL_FROM = 2  # dimensions of a convolution's weight from here on are the kernel's, and never shrink
# Operators that keep zeros at zero: a weight that they derive from another is masked where its source is.
ZERO_KEEPING = """
    t transpose permute view _unsafe_view clone mul div neg split split_with_sizes select unbind _to_copy to
    alias detach squeeze unsqueeze slice expand contiguous
"""
WEIGHT_OPS = frozenset(ZERO_KEEPING.split())


@dataclass(frozen=True, slots=True)
class CostTerm:
    """The multiply-adds of one operator: `constant` times the lengths of `axes`.

    Attributes:
        op: position of the operator in the recording, here and in the classes below.
    """

    op: int
    constant: int
    axes: tuple[LabelArray, ...]


@dataclass(frozen=True, slots=True)
class ReshapeSplit:
    """A reshape that splits a channel axis into several axes, one of which may shrink.

    Attributes:
        ordinal: how many reshapes its module had made in the pass, this one included.
        labels: the labels of the axis that may shrink; the others keep their lengths.
        options: the axes that could have been chosen, best first.
        chosen: the axis that may shrink.
    """

    op: int
    ordinal: int
    labels: LabelArray
    options: tuple[int, ...]
    chosen: int


@dataclass(frozen=True, slots=True)
class Reordering:
    """The channels `labels` in another order along `dim`: position i of the result was position `index[i]`.

    Attributes:
        index: int64 (channels,).
        labelled_axes: the axes of a reshape's result over which it spreads the channels.
    """

    dim: int
    labels: LabelArray
    index: NDArray[np.int64]
    labelled_axes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class UnitCount:
    """An integer on a module that counts units: after pruning the number of `labels` kept, over `per`."""

    module: str
    attribute: str
    labels: LabelArray
    per: int = 1


@dataclass
class Propagation:
    """One pass of labels over a recording. `run` fills the attributes; rules read and extend them.

    Attributes:
        modules: qualified name -> module of the network.
        table: operator name -> rule, with a rule for "pointwise" and one for "unknown".
        choices: reshape operator -> axis that may shrink, where the first choice failed verification.
        labels: the ties and freezes.
        axes: Ref index -> labels of the tensor's axes, for tensors that have any.
        cost_terms: multiply-adds of every operator that multiplies.
        reshape_splits: reshapes that split a channel axis.
        kept_axes: reshape operator -> its ordinal, and the axis of its input that may shrink where it
            merges several axes of channels.
        reshape_merges: (operator, labels) of every channel axis that a reshape merged with others.
        two_unit_axes: axes on which two units must stay, because with one unit another operator would run.
        splits: (operator, labels of each piece) where an axis is split into pieces of written lengths.
        unit_counts: integers on modules that count units.
        ragged: modules in which the parts of shuffles and splits may shrink unequally, see
            `rules.channel_shuffle`.
        shuffles: (module, labels, parts) of every channel shuffle whose parts were tied.
        reorderings: operator -> what it does to the order of channels, in ragged modules.
        shuffle_interior: Ref index of each tensor inside a ragged shuffle -> the axes that hold the
            channels, and their labels.
        shuffle_results: Ref index of the tensor in which a ragged shuffle ends -> the axis and its labels.
        weight_refs: Ref indices of parameters and of what is derived from them by `WEIGHT_OPS`.
        conv_group_policies: module -> "whole" or "positions", how the groups of its convolution shrink.
        rescales_norms: whether channels behind a layer norm may go, its statistics taken over the original
            width (`patches.norm_patch`).
        norm_widths: module -> channels that its statistics count; 0 where a sum relies on zeros alone.
        zero_refs: Ref indices whose removed positions are zero in the masked network, see `zero_channels`.
        non_negative_refs: Ref indices without negative entries.
        lookahead_depth: 0, or how many lookaheads deep this propagation is.
        splits_channels: whether a program splits, regroups or slices channels, so that sizes may be written
            into it.
        batch_uses: how often an axis with labels was a batch axis of a product, such as that of heads.
        live: per operator whether its result reaches an output.
        readers: Ref index -> positions of the operators that read it.
        reshapes: module -> reshapes that it has made so far.
        position: the position of the present operator.
    """

    recording: Recording
    modules: Mapping[str, nn.Module]
    table: Mapping[str, Rule]
    choices: Mapping[int, int] = field(default_factory=dict)
    labels: Labels = field(default_factory=Labels)
    axes: dict[int, Axes] = field(default_factory=dict)
    cost_terms: list[CostTerm] = field(default_factory=list)
    reshape_splits: list[ReshapeSplit] = field(default_factory=list)
    kept_axes: dict[int, tuple[int, int]] = field(default_factory=dict)
    reshape_merges: list[tuple[int, LabelArray]] = field(default_factory=list)
    two_unit_axes: list[LabelArray] = field(default_factory=list)
    splits: list[tuple[int, tuple[LabelArray, ...]]] = field(default_factory=list)
    unit_counts: list[UnitCount] = field(default_factory=list)
    ragged: frozenset[str] = frozenset()
    shuffles: list[tuple[str, LabelArray, int]] = field(default_factory=list)
    reorderings: dict[int, Reordering] = field(default_factory=dict)
    shuffle_interior: dict[int, tuple[tuple[int, ...], LabelArray]] = field(default_factory=dict)
    shuffle_results: dict[int, tuple[int, LabelArray]] = field(default_factory=dict)
    weight_refs: set[int] = field(default_factory=set)
    conv_group_policies: dict[str, str] = field(default_factory=dict)
    rescales_norms: bool = False
    norm_widths: dict[str, int] = field(default_factory=dict)
    zero_refs: set[int] = field(default_factory=set)
    non_negative_refs: set[int] = field(default_factory=set)
    lookahead_depth: int = 0
    splits_channels: bool = False
    batch_uses: int = 0
    live: list[bool] = field(default_factory=list)
    readers: Mapping[int, list[int]] = field(default_factory=dict)
    reshapes: Counter[str] = field(default_factory=Counter)
    position: int = 0

    @property
    def is_lookahead(self) -> bool:
        """The mark of a lookahead, in which an axis without labels need not be a fixed one."""
        return self.lookahead_depth > 0

    def run(self) -> None:
        """Propagate over the whole recording and freeze what reaches the outputs."""
        self.weight_refs = _derived_weights(self.recording)
        self.live, self.readers = self.recording.live(), self.recording.readers()
        self.zero_refs = {i for i, n in self.recording.parameters.items() if n in self.maskable}
        for position, op in enumerate(self.recording.ops):
            self.labels.is_muted = not self.live[position]  # what never reaches an output ties nothing
            self._apply(position, op)
        self.labels.is_muted = False
        for ref in self.recording.outputs:
            for axis in self.get(ref):
                self.labels.freeze(axis, "the model's output")

    @cached_property
    def maskable(self) -> frozenset[str]:
        """The parameters that the masked network may hold zeros in."""
        return maskable(self.recording)

    def look_ahead(
        self, ref: Ref, axis: int, alike: LabelArray, *, includes_present: bool = False
    ) -> tuple[str, int]:
        """Return the first reason to freeze that an axis meets later, and how often it is a batch axis.

        Args:
            alike: for each position of the axis a number, equal where positions are one unit, int64.
            includes_present: whether the present operator reads `ref`, and is followed too.
        """
        shape = self.recording.shapes[ref.index]
        branch = Propagation(
            self.recording,
            self.modules,
            self.table,
            weight_refs=self.weight_refs,
            live=self.live,
            readers=self.readers,
        )
        branch.lookahead_depth = self.lookahead_depth + 1
        branch.labels.ignores_fixed = True
        labels: Axes = [None] * len(shape)
        units, which = np.unique(alike, return_inverse=True)
        labels[axis] = branch.labels.new("lookahead", axis, len(units))[which]
        branch.axes[ref.index] = labels
        since = self.position if includes_present else self.position + 1
        queue = [n for n in self.readers.get(ref.index, ()) if n >= since]
        queued = set(queue)
        while queue and len(queued) - len(queue) <= LOOKAHEAD_OPS and not branch.labels.freezes:
            position = heappop(queue)
            op = self.recording.ops[position]
            if not self.live[position] or not any(r.index in branch.axes for r in op.inputs):
                continue
            branch._apply(position, op)
            for out in op.outputs:
                if out is not None and out.index in branch.axes:
                    later = {n for n in self.readers.get(out.index, ()) if n > position} - queued
                    queued |= later
                    for number in later:
                        heappush(queue, number)
        return "".join(f.reason for f in branch.labels.freezes[:1]), branch.batch_uses

    def _apply(self, position: int, op: Op) -> None:
        self.position = position
        rule = self.table.get(op.name)
        if rule is None:
            rule = self.table["pointwise"] if op.is_pointwise else self.table["unknown"]
        if not any(a is not None for r in op.inputs for a in self.get(r)) and op.name not in self.table:
            return
        result = rule(self, op)
        results = result if result and isinstance(result[0], list) else [result]
        is_zero = not self.is_lookahead and stays_zero(op, self.zero_refs, self.axes)
        is_non_negative_ = not self.is_lookahead and is_non_negative(op, self.non_negative_refs)
        for ref, axes in zip(op.outputs, results, strict=False):
            if ref is not None:
                self._set(ref, axes)  # type: ignore[arg-type]
                self.zero_refs.update([ref.index] if is_zero else [])
                self.non_negative_refs.update([ref.index] if is_non_negative_ else [])

    def _set(self, ref: Ref, axes: Axes) -> None:
        shape = self.recording.shapes[ref.index]
        assert len(axes) == len(shape), (self.recording.ops[self.position], axes)
        tracked: Axes = [
            None if a is None or n <= 1 or (a[0] < 0 and (a < 0).all()) else a
            for a, n in zip(axes, shape, strict=True)
        ]
        if any(a is not None for a in tracked):
            self.axes[ref.index] = tracked
        else:
            self.axes.pop(ref.index, None)

    def get(self, ref: Ref | None) -> Axes:
        """Return the label arrays of a tensor's axes; a parameter gets its labels at the first call."""
        if ref is None:
            return []
        axes = self.axes.get(ref.index)
        if axes is not None:
            return axes
        shape = self.recording.shapes[ref.index]
        name = self.recording.parameters.get(ref.index)
        if name is None or self.is_lookahead:
            return [None] * len(shape)
        has_kernel = isinstance(self.modules.get(name.rpartition(".")[0]), ConvBase)
        num_tracked = SPATIAL_FROM if has_kernel else len(shape)
        axes = [
            self.labels.new(name, d, n) if n > 1 and d < num_tracked else None for d, n in enumerate(shape)
        ]
        self.axes[ref.index] = axes
        return axes

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.recording.shapes[ref.index]

    def extents(self, ref: Ref) -> list[int | LabelArray]:
        """Return for each axis its labels, or its length where that is the same in every pruned network."""
        shape = self.shape(ref)
        if ref.index in self.shuffle_interior:
            dims, labels = self.shuffle_interior[ref.index]
            return [labels if d == dims[0] else 1 if d in dims else n for d, n in enumerate(shape)]
        axes = self.axes.get(ref.index, [None] * len(shape))
        return [n if a is None else a for n, a in zip(shape, axes, strict=True)]

    def open_axis(self, dim: int, size: int) -> LabelArray | None:
        """Make labels for an axis along which a tensor is the same everywhere, and return them.

        Such an axis is as long as what it meets. The result is None in a lookahead and for a length of 1.
        """
        if self.is_lookahead or size <= 1:
            return None
        return self.labels.new("", dim, size, is_open=True)

    def is_weight(self, ref: Ref) -> bool:
        """Return whether a tensor is a parameter, or made from one in a way that keeps zeros at zero."""
        return ref.index in self.weight_refs

    def owner(self, weight: Ref) -> str:
        """Return the name of the module that holds a parameter.

        The name is empty for the network itself, and where the tensor is no parameter.
        """
        return self.recording.parameters.get(weight.index, "").rpartition(".")[0]

    def integer_attributes(self, module: str, words: Sequence[str], value: int | None) -> list[str]:
        """Return the names of a module's integer attributes that contain one of the words and hold `value`.

        With a `value` of None any integer counts.
        """
        owner = self.modules.get(module)
        attributes = vars(owner) if owner is not None else {}
        numbers = {n: v for n, v in attributes.items() if type(v) is int and any(w in n for w in words)}
        return [n for n, v in numbers.items() if value is None or v == value]

    def with_location(self, text: str) -> str:
        """Return a reason with the operator, module and line where it arose."""
        op = self.recording.ops[self.position]
        return f"{text} ({op.name} in {op.module or 'the network'}, {op.where})"

    def freeze(self, axis: LabelArray | None, text: str, *, is_structural: bool = False) -> None:
        """Freeze an axis because of the present operator."""
        if axis is not None:
            self.labels.freeze(axis, self.with_location(text), is_structural=is_structural)

    def join(
        self, parts: Sequence[LabelArray | None], text: str = "meets an axis of fixed length"
    ) -> LabelArray | None:
        """Merge several axes that meet position by position into one; their labels tie.

        If one of them has no labels, its length is fixed, and the others freeze with the reason `text`.
        """
        tracked = [p for p in parts if p is not None]
        if not tracked:
            return None
        if len(tracked) < len(parts) and not self.is_lookahead:
            for axis in tracked:
                self.freeze(axis, text)
            return None
        merged = tracked[0]
        for other in tracked[1:]:
            merged = self.labels.tie(merged, other, self.with_location(text))
        return merged

    def contract(self, left: tuple[Ref, int], right: tuple[Ref, int]) -> None:
        """Tie two axes that are multiplied and summed over.

        One side must be a weight, as only the columns of a weight can be masked; two activations freeze.

        Args:
            left, right: a tensor and one of its axes.
        """
        axes = [self.get(ref)[axis] for ref, axis in (left, right)]
        if all(a is None for a in axes):
            return
        can_mask = False
        for (ref, _), labels in zip((left, right), axes, strict=True):
            if self.is_weight(ref) and not (labels is not None and self.labels.is_open(labels)):
                self.mark(labels, "in")
                can_mask = True
        if not can_mask:
            for labels in axes:
                self.freeze(labels, "summed over in a product of two activations")
            return
        self.join(axes, "reads an axis of fixed length, such as the model's input")

    def mark(self, axis: LabelArray | None, role: Role) -> None:
        """Note the role of the slots of an axis, see `graph.Member`."""
        if not self.is_lookahead:
            self.labels.mark(axis, role)

    def earlier_choice(self, module: str, name: str, default: Any = None) -> Any:
        """Return what an earlier pruning chose for a module, so that plans compose.

        `densify` wrote it on the module as the attribute `name`.
        """
        return getattr(self.modules.get(module), name, default)

    def cost(self, constant: int, axes: Sequence[tuple[int, LabelArray | None]]) -> None:
        """Note the multiply-adds of the present operator: `constant` times the axes' lengths."""
        tracked = tuple(a for _, a in axes if a is not None)
        fixed = int(np.prod([n for n, a in axes if a is None], dtype=np.int64))
        self.cost_terms.append(CostTerm(self.position, constant * fixed, tracked))

    def tie_rows(self, table: LabelArray) -> LabelArray:
        """Tie all entries of each row of an array (units, k), and return the rows' labels, (units,)."""
        units = np.where((table < 0).any(axis=1), FIXED, table[:, 0])
        others = table[:, 1:]
        self.labels.tie(
            np.repeat(units, others.shape[1]), others.ravel(), self.with_location("tied to a fixed position")
        )
        if (units < 0).any() and not self.is_lookahead:
            self.labels.freeze(table[units < 0].ravel(), self.with_location("tied to a fixed position"))
        return units


def untracked(ctx: Propagation, op: Op) -> list[Axes]:
    """Return outputs whose axes carry no labels."""
    return [[None] * len(ctx.shape(r)) for r in op.outputs if r is not None]


def only_first(ctx: Propagation, op: Op, axes: Axes) -> list[Axes]:
    """Return `axes` for the first output; the others are statistics that nothing reads."""
    return [axes, *untracked(ctx, op)[1:]]


def fixed_axis(size: int) -> LabelArray:
    """Return labels of an axis whose positions always stay."""
    return np.full(size, FIXED, np.int64)


def _derived_weights(recording: Recording) -> set[int]:
    weights = set(recording.parameters)
    for op in recording.ops:
        inputs = op.inputs
        if op.name in WEIGHT_OPS and inputs and inputs[0].index in weights:
            weights.update(r.index for r in op.outputs if r is not None)
    return weights
