"""Propagation over a recording: labels travel with the tensors, one operator at a time.

Every tensor carries, for each of its axes, an array of labels (which channel lies at which position) or
None (an axis that no pruning may change). The operator table (`ops`, `shape_ops`) says for each family of
operators which labels tie, which freeze and which go on. What a propagation finds besides the ties:

* `terms`, the multiply-adds of each operator as a product of axis lengths,
* `sites`, places where the program must agree with the pruned sizes and may not,
* `rules`, numbers on modules that count pruned things (heads, groups).

A *probe* is a propagation that follows one axis alone, to see where it would end.
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
Handler = Callable[["Propagation", Op], "Axes | list[Axes]"]

LOOKAHEAD_OPS = 60  # operators that a probe follows; attention and channel shuffle end within about 20
WEIGHT_OPS = frozenset(
    [
        "t",
        "transpose",
        "permute",
        "view",
        "_unsafe_view",
        "clone",
        "mul",
        "div",
        "neg",
        "split",
        "split_with_sizes",
        "select",
        "unbind",
        "_to_copy",
        "to",
        "alias",
        "detach",
        "squeeze",
        "unsqueeze",
        "slice",
        "expand",
        "contiguous",
    ]
)  # operators that keep zeros at zero, so that a weight derived by them is masked where its source is


@dataclass(frozen=True, slots=True)
class CostTerm:
    """Multiply-adds of one operator: `constant` times the lengths of `axes`."""

    op: int
    constant: int
    axes: tuple[LabelArray, ...]


@dataclass(frozen=True, slots=True)
class ReshapeSplit:
    """A reshape that splits a channel axis: `labels` is the axis that shrinks, the others keep their length.

    `options` are the axes that could have been chosen, best first; `ordinal` counts the module's reshapes.
    """

    op: int
    ordinal: int
    labels: LabelArray
    options: tuple[int, ...]
    chosen: int


@dataclass(frozen=True, slots=True)
class Reordering:
    """A rearrangement of the channels `labels` along `dim`: position i of the result was `index[i]`.

    `given` are the axes of a reshape's result over which it spreads them.
    """

    dim: int
    labels: LabelArray
    index: NDArray[np.int64]
    given: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class UnitCount:
    """An integer on a module that counts units: after pruning the number of `labels` kept, over `per`."""

    module: str
    attribute: str
    labels: LabelArray
    per: int = 1


@dataclass
class Propagation:
    """One pass over a recording.

    Attributes:
        kept_axes: operator -> the one axis that may shrink of those that a reshape made one. reshape_merges:
        (operator, labels) of every axis that a reshape made out of several. two_unit_axes: axes of which two
        units must stay, because with one another operator would run. splits: (operator, labels of each piece)
        where an axis is split into pieces of written lengths. ragged: modules in which the parts of shuffles
        and splits may differ, see `shuffles`. shuffles: (module, labels, parts) of every shuffle whose parts
        were tied. reorderings: operator -> what it does to the order of channels, in ragged modules.
        shuffle_interior: Ref between the two ends of a ragged shuffle -> axes that hold the channels, and
        their labels. shuffle_results: Ref in which a ragged shuffle ends -> the axis and its labels.
        rescales_norms: whether a layer norm's channels may go, with its statistics rescaled. norm_widths:
        module -> channels that its statistics count; 0 where a sum relies on zeros alone. zero_refs: Refs
        whose removed positions are zero in the masked network, see `zeros`; `above_zero` those
            without negative entries.
        choices: reshape operator -> axis that shrinks, where the first choice did not hold.
    """

    recording: Recording
    modules: Mapping[str, nn.Module]
    table: Mapping[str, Handler]
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
        """Whether only one axis is followed, so that axes without labels mean nothing."""
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
        """Parameters that the masked network may hold zeros in."""
        return maskable(self.recording)

    def look_ahead(
        self, ref: Ref, axis: int, alike: LabelArray, *, includes_present: bool = False
    ) -> tuple[str, int]:
        """What the axis of `ref` runs into that it may not pass, and how often it ends as a batch axis.

        Args:
            alike: for each position of the axis a number, equal where positions are one unit.
            includes_present: whether the present operator reads `ref`, and is followed too.
        """
        shape = self.recording.shapes[ref.index]
        probe = Propagation(
            self.recording,
            self.modules,
            self.table,
            weight_refs=self.weight_refs,
            live=self.live,
            readers=self.readers,
        )
        probe.lookahead_depth = self.lookahead_depth + 1
        probe.labels.ignores_fixed = True
        labels: Axes = [None] * len(shape)
        units, which = np.unique(alike, return_inverse=True)
        labels[axis] = probe.labels.new("probe", axis, len(units))[which]
        probe.axes[ref.index] = labels
        since = self.position if includes_present else self.position + 1
        ahead = [n for n in self.readers.get(ref.index, ()) if n >= since]
        seen = set(ahead)
        while ahead and len(seen) - len(ahead) <= LOOKAHEAD_OPS and not probe.labels.freezes:
            position = heappop(ahead)
            op = self.recording.ops[position]
            if not self.live[position] or not any(r.index in probe.axes for r in op.inputs):
                continue
            probe._apply(position, op)
            for out in op.outputs:
                if out is not None and out.index in probe.axes:
                    later = {n for n in self.readers.get(out.index, ()) if n > position} - seen
                    seen |= later
                    for number in later:
                        heappush(ahead, number)
        return "".join(f.reason for f in probe.labels.freezes[:1]), probe.batch_uses

    def _apply(self, position: int, op: Op) -> None:
        self.position = position
        handler = self.table.get(op.name)
        if handler is None:
            handler = self.table["pointwise"] if op.is_pointwise else self.table["unknown"]
        if not any(a is not None for r in op.inputs for a in self.get(r)) and op.name not in self.table:
            return
        result = handler(self, op)
        many = result if result and isinstance(result[0], list) else [result]
        is_zero = not self.is_lookahead and stays_zero(op, self.zero_refs, self.axes)
        is_above = not self.is_lookahead and is_non_negative(op, self.non_negative_refs)
        for ref, axes in zip(op.outputs, many, strict=False):
            if ref is not None:
                self._set(ref, axes)  # type: ignore[arg-type]
                self.zero_refs.update([ref.index] if is_zero else [])
                self.non_negative_refs.update([ref.index] if is_above else [])

    def _set(self, ref: Ref, axes: Axes) -> None:
        shape = self.recording.shapes[ref.index]
        assert len(axes) == len(shape), (self.recording.ops[self.position], axes)
        kept: Axes = [
            None if a is None or n <= 1 or (a[0] < 0 and (a < 0).all()) else a
            for a, n in zip(axes, shape, strict=True)
        ]
        if any(a is not None for a in kept):
            self.axes[ref.index] = kept
        else:
            self.axes.pop(ref.index, None)

    def get(self, ref: Ref | None) -> Axes:
        """The label arrays of a tensor's axes. A parameter's are made when it is first asked for."""
        if ref is None:
            return []
        known = self.axes.get(ref.index)
        if known is not None:
            return known
        shape = self.recording.shapes[ref.index]
        name = self.recording.parameters.get(ref.index)
        if name is None or self.is_lookahead:
            return [None] * len(shape)
        fixed_from = 2 if isinstance(self.modules.get(name.rpartition(".")[0]), ConvBase) else 9
        made: Axes = [
            self.labels.new(name, d, n) if n > 1 and d < fixed_from else None for d, n in enumerate(shape)
        ]
        self.axes[ref.index] = made
        return made

    def shape(self, ref: Ref) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self.recording.shapes[ref.index]

    def extents(self, ref: Ref) -> list[int | LabelArray]:
        """Per axis its labels, or its length in every pruned network."""
        shape = self.shape(ref)
        if ref.index in self.shuffle_interior:
            dims, labels = self.shuffle_interior[ref.index]
            return [labels if d == dims[0] else 1 if d in dims else n for d, n in enumerate(shape)]
        axes = self.axes.get(ref.index, [None] * len(shape))
        return [n if a is None else a for n, a in zip(shape, axes, strict=True)]

    def open_axis(self, dim: int, size: int) -> LabelArray | None:
        """Labels for an axis along which a tensor is the same everywhere."""
        if self.is_lookahead or size <= 1:
            return None
        return self.labels.new("", dim, size, is_open=True)

    def is_weight(self, ref: Ref) -> bool:
        """Whether a tensor is a parameter, or made from one in a way that keeps zeros at zero."""
        return ref.index in self.weight_refs

    def with_location(self, text: str) -> str:
        """A reason with the operator, module and line where it arose."""
        op = self.recording.ops[self.position]
        return f"{text} ({op.name} in {op.module or 'the network'}, {op.where})"

    def freeze(self, axis: LabelArray | None, text: str, *, is_structural: bool = False) -> None:
        """Freeze an axis because of the present operator."""
        if axis is not None:
            self.labels.freeze(axis, self.with_location(text), is_structural=is_structural)

    def join(
        self, parts: Sequence[LabelArray | None], text: str = "meets an axis of fixed length"
    ) -> LabelArray | None:
        """One axis out of several that lie position by position on each other; None among them fixes all."""
        known = [p for p in parts if p is not None]
        if not known:
            return None
        if len(known) < len(parts) and not self.is_lookahead:
            for axis in known:
                self.freeze(axis, text)
            return None
        merged = known[0]
        for other in known[1:]:
            merged = self.labels.tie(merged, other, self.with_location(text))
        return merged

    def contract(self, left: tuple[Ref, int], right: tuple[Ref, int]) -> None:
        """Two axes that are multiplied and summed over. One side must be a weight, which can be masked."""
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
        """Say what the slots of an axis do."""
        if not self.is_lookahead:
            self.labels.mark(axis, role)

    def earlier_choice(self, module: str, name: str, default: Any = None) -> Any:
        """What an earlier pruning chose for a module, so that plans compose; see `densify`."""
        return getattr(self.modules.get(module), name, default)

    def cost(self, constant: int, axes: Sequence[tuple[int, LabelArray | None]]) -> None:
        """Note the multiply-adds of the present operator: `constant` times the axes' lengths."""
        tracked = tuple(a for _, a in axes if a is not None)
        fixed = int(np.prod([n for n, a in axes if a is None], dtype=np.int64))
        self.cost_terms.append(CostTerm(self.position, constant * fixed, tracked))

    def tie_rows(self, table: LabelArray) -> LabelArray:
        """Tie all entries of each row of a two-dimensional array; the rows' labels."""
        units = np.where((table < 0).any(axis=1), FIXED, table[:, 0])
        others = table[:, 1:]
        self.labels.tie(
            np.repeat(units, others.shape[1]), others.ravel(), self.with_location("tied to a fixed position")
        )
        if (units < 0).any() and not self.is_lookahead:
            self.labels.freeze(table[units < 0].ravel(), self.with_location("tied to a fixed position"))
        return units


def fixed_axis(size: int) -> LabelArray:
    """An axis whose positions always stay."""
    return np.full(size, FIXED, np.int64)


def _derived_weights(recording: Recording) -> set[int]:
    weights = set(recording.parameters)
    for op in recording.ops:
        inputs = op.inputs
        if op.name in WEIGHT_OPS and inputs and inputs[0].index in weights:
            weights.update(r.index for r in op.outputs if r is not None)
    return weights
