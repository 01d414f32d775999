"""From ties to groups: classes of labels with as many positions in the same slots are units of one group.

`build` propagates the labels and returns the graph of groups with its costs, not yet verified.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.structure.cost import Axis, CostModel, Product, Term
from autoprune.structure.graph import (
    ChannelGraph,
    Frozen,
    Group,
    Member,
    Padding,
    RaggedCall,
    Reshape,
    UnitReordering,
)
from autoprune.structure.labels import LabelArray, Slot
from autoprune.structure.patches.channel_gather import GatherPatch
from autoprune.structure.patches.count_attributes import find_count_attributes
from autoprune.structure.propagate import Propagation, Reordering
from autoprune.structure.recorder import Op, Recording, Ref
from autoprune.structure.rules.channel_shuffle import channel_shuffle
from autoprune.structure.rules.shape import reshape, split
from autoprune.structure.rules.table import TABLE


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """The options that a user gives for a graph.

    Attributes:
        exclusions: module -> why the channels that it makes stay.
        round_to: kept counts should be multiples of this.
        rescales_norms: whether channels behind a layer norm may go.
    """

    exclusions: Mapping[str, str]
    round_to: int
    rescales_norms: bool


def build(
    model: nn.Module,
    recording: Recording,
    options: TraceOptions,
    *,
    choices: Mapping[int, int],
    refused: Sequence[tuple[LabelArray, str]],
    ragged: frozenset[str] = frozenset(),
) -> tuple[ChannelGraph, Propagation]:
    """Propagate labels over the recording and sort its labels into groups.

    Args:
        choices: reshape operator -> axis that may shrink, see `Propagation`.
        refused: labels of groups that failed verification, with reasons.
        ragged: modules whose shuffles tie nothing, besides those of an earlier pruning.
    """
    modules = dict(model.named_modules())
    ragged |= {n for n, m in modules.items() if isinstance(m, GatherPatch)}
    propagation = Propagation(
        recording, modules, TABLE, choices, ragged=ragged, rescales_norms=options.rescales_norms
    )
    propagation.run()
    for labels, reason in refused:
        propagation.labels.freeze(labels, reason)
    _freeze_excluded(propagation, options.exclusions)
    return _GroupBuilder(model, propagation).graph(options.round_to), propagation


def _freeze_excluded(propagation: Propagation, exclusions: Mapping[str, str]) -> None:
    for slot in propagation.labels.slots:
        reason = exclusions.get(slot.name.rpartition(".")[0] if slot.pad_op is None else slot.name)
        if reason and slot.role != "in":
            propagation.labels.freeze(np.arange(slot.start, slot.start + slot.size), reason)


SlotPositions = tuple[int, Slot, NDArray[np.int64]]  # a slot's number, the slot, its positions (units, k)
WIDE = 4  # from so many multiples on a group is rounded: fewer would leave too few counts; a guess


class _GroupBuilder:
    """The conversion of one propagation's ties into groups."""

    def __init__(self, model: nn.Module, propagation: Propagation) -> None:
        self.model, self.propagation, self.slots = model, propagation, propagation.labels.slots
        self.classes = propagation.labels.classes()
        size, count = len(self.classes), int(self.classes.max()) + 1 if len(self.classes) else 0
        self.reason: dict[int, str] = {}
        self.is_frozen = np.zeros(count, bool)
        self.has_channel_reason = np.zeros(count, bool)
        for freeze in propagation.labels.freezes:
            hit = np.unique(self.classes[freeze.labels])
            fresh = hit[~self.has_channel_reason[hit]] if not freeze.is_structural else hit[:0]
            self.reason.update(dict.fromkeys(fresh.tolist(), freeze.reason))
            self.has_channel_reason[fresh] = True
            self.is_frozen[hit] = True
        starts = np.array([s.start for s in self.slots], dtype=np.int64)
        self.slot_of = (
            np.searchsorted(starts, np.arange(size), side="right") - 1 if size else np.empty(0, np.int64)
        )
        self.is_open = propagation.labels.open_labels()
        self.names: list[str] = []
        self.group_of = self._group_of_classes()
        self.group_of_label = np.append(self.group_of[self.classes], -1)  # the last is FIXED's
        self.rows: dict[tuple[Any, ...], int] = {}
        self.row_of: dict[int, int] = {}
        self.rank = np.zeros(len(self.is_frozen), np.int64)

    def _group_of_classes(self) -> NDArray[np.int64]:
        """Return the group number of every class, -1 where it is frozen or alone, and name the groups."""
        rng = np.random.default_rng(0)  # a fixed hash: equal multisets of slots get equal sums
        keys = rng.integers(1, 2**62, size=max(1, len(self.slots)), dtype=np.uint64)
        keys[[n for n, s in enumerate(self.slots) if s.is_open]] = 0  # nothing is sliced there
        count = len(self.is_frozen)
        signature = np.zeros(count, np.uint64)
        np.add.at(signature, self.classes, keys[self.slot_of])
        for _, pieces in self.propagation.splits:  # units of unequal pieces shrink by themselves
            for piece in pieces:
                signature[np.unique(self.classes[piece[piece >= 0]])] += rng.integers(
                    1, 2**62, dtype=np.uint64
                )
        first = np.full(count, len(self.classes), np.int64)
        np.minimum.at(first, self.classes, np.arange(len(self.classes)))
        reads = np.array([s.role == "in" for s in self.slots], bool)
        is_read = np.zeros(count, bool)
        is_read[self.classes[reads[self.slot_of]]] = True
        free = np.flatnonzero(~self.is_frozen & is_read)
        group_of = np.full(count, -1, np.int64)
        if len(free):
            _, inverse, widths = np.unique(signature[free], return_inverse=True, return_counts=True)
            starts = np.full(len(widths), len(self.classes), np.int64)
            np.minimum.at(starts, inverse, first[free])
            group_of[free] = self._numbered(starts, widths)[inverse]
        self.first = first
        return group_of

    def _numbered(self, starts: LabelArray, widths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the number of every set of like units, in the order of their making; -1 for a unit alone.

        Names do not change when units go: sets are sorted by their slots before their positions, and a unit
        alone has a name too, as it may be what an earlier pruning left of a group.
        """
        slots: list[list[int]] = [[] for _ in starts]
        set_of = np.full(len(self.is_frozen), -1, np.int64)
        set_of[self.classes[starts]] = np.arange(len(starts))
        positions = np.flatnonzero((set_of[self.classes] >= 0) & ~self.is_open)
        for number, slot in np.stack([set_of[self.classes[positions]], self.slot_of[positions]], 1).tolist():
            slots[number].append(slot)
        numbers, uses = np.full(len(widths), -1, np.int64), dict[str, int]()
        for number in sorted(range(len(starts)), key=lambda n: (slots[n], starts[n])):
            base = self._base_name([self.slots[s] for s in slots[number]])
            uses[base] = uses.get(base, 0) + 1
            if widths[number] > 1:
                numbers[number] = len(self.names)
                self.names.append(base if uses[base] == 1 else f"{base}#{uses[base]}")
        return numbers

    def _base_name(self, slots: list[Slot]) -> str:
        makers = [s for s in slots if s.role == "out" and s.pad_op is None]
        first = (makers or slots)[0].name
        return first.rpartition(".")[0] or first

    def graph(self, round_to: int) -> ChannelGraph:
        groups = self._named(self._members(self._units()), round_to)
        model = self._cost_model()
        widths = np.array([g.num_units for g in groups], dtype=np.int64)
        touched_macs, _ = model.macs_touched(widths)
        return ChannelGraph(
            groups=tuple(replace(g, macs=int(m)) for g, m in zip(groups, touched_macs, strict=True)),
            frozen=self._frozen(),
            round_to=round_to,
            cost_model=model,
            products=self._products(),
            count_attributes=find_count_attributes(self.propagation, self._axis),
            conv_group_policies=dict(self.propagation.conv_group_policies),
            split_axes=self._split_axes(),
            reshapes=self._reshaped(),
            split=self._split(),
            ragged={module: tuple(self._ragged_calls(module)) for module in sorted(self.propagation.ragged)},
            norm_widths=dict(self.propagation.norm_widths),
            maskable=self.propagation.maskable,
            widths={(s.name, s.dim): s.size for s in self.slots if s.pad_op is None and not s.is_open},
            recording=self.propagation.recording,
        )

    def _units(self) -> list[NDArray[np.int64]]:
        """Return the class numbers of every group's units, ordered by first label."""
        order = np.lexsort((self.first, self.group_of))
        return _runs(order, self.group_of[order])

    def _members(self, units: list[NDArray[np.int64]]) -> list[tuple[int, list[SlotPositions]]]:
        """Return for each group its width, and its positions in every slot, by unit."""
        rank = self.rank
        for classes in units:
            rank[classes] = np.arange(len(classes))
        owned = np.flatnonzero((self.group_of_label[:-1] >= 0) & ~self.is_open)
        groups = self.group_of_label[owned]
        order = np.argsort(groups.astype(np.int16 if len(units) < 2**15 else np.int64), kind="stable")
        return [
            (len(classes), self._positions(labels, rank, len(classes)))
            for classes, labels in zip(units, _runs(owned[order], groups[order]), strict=True)
        ]

    def _positions(self, labels: LabelArray, rank: LabelArray, width: int) -> list[SlotPositions]:
        numbers, ranks = self.slot_of[labels], rank[self.classes[labels]]
        borders = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(labels)]
        is_falling = np.append(np.diff(ranks) < 0, False)
        is_falling[np.array(borders[1:]) - 1] = False
        falls = set(numbers[is_falling].tolist())
        owned = []
        for start, end in pairwise(borders):
            number = int(numbers[start])
            slot_labels = labels[start:end]
            if number in falls:
                slot_labels = slot_labels[np.argsort(ranks[start:end], kind="stable")]
            slot = self.slots[number]
            owned.append((number, slot, (slot_labels - slot.start).reshape(width, -1)))
        return owned

    def _named(self, slots_of_groups: list[tuple[int, list[SlotPositions]]], round_to: int) -> list[Group]:
        buffers = {name for name, _ in self.model.named_buffers(remove_duplicate=False)}
        groups: list[Group] = []
        needs_two = self._needing_two()
        for name, (width, slots) in zip(self.names, slots_of_groups, strict=True):
            members = tuple(
                Member(name=s.name, dim=s.dim, index=i, role=s.role or "affine", is_buffer=s.name in buffers)
                for _, s, i in slots
                if s.pad_op is None
            )
            paddings = tuple(
                Padding(module=s.name, op=s.pad_op, dim=s.dim, side=s.side, index=i)
                for _, s, i in slots
                if s.pad_op is not None
            )
            layers = tuple(dict.fromkeys(m.name.rpartition(".")[0] or m.name for m in members))
            multiple = round_to if width >= WIDE * round_to else 1
            least = 2 if len(groups) in needs_two else 1
            groups.append(
                Group(name=name, num_units=width, layers=layers, members=members, paddings=paddings,
                      min_keep=min(width, least), round_to=multiple)
            )  # fmt: skip
        return groups

    def _needing_two(self) -> set[int]:
        """Return the groups that own the whole of an axis on which two units must stay."""
        axes = [self._axis(labels) for labels in self.propagation.two_unit_axes]
        return {g for a in axes if a.fixed == 0 for g, per in a.per_unit.items() if per == 1}

    def _axis(self, labels: LabelArray | slice) -> Axis:
        counts = np.bincount(self.group_of_label[labels] + 1, minlength=1)
        return Axis(
            fixed=int(counts[0]),
            per_unit={int(g): int(counts[g + 1]) // int(self._widths[g]) for g in np.flatnonzero(counts[1:])},
        )

    @cached_property
    def _widths(self) -> NDArray[np.int64]:
        return np.bincount(self.group_of[self.group_of >= 0])

    def _row(self, axis: Axis) -> int:
        """Return the axis' row in the cost model; axes equally long under every plan share one row."""
        return self.rows.setdefault((axis.fixed, *sorted(axis.per_unit.items())), len(self.rows))

    def _row_of(self, labels: LabelArray) -> int:
        """Return the row of an axis by its labels.

        The row is cached, as many tensors share one array of labels.
        """
        if id(labels) not in self.row_of:
            self.row_of[id(labels)] = self._row(self._axis(labels))
        return self.row_of[id(labels)]

    def _cost_model(self) -> CostModel:
        macs = [
            Term(constant=t.constant, axes=tuple(self._row_of(a) for a in t.axes))
            for t in self.propagation.cost_terms
        ]
        params, sizes = self._stored_terms()
        activations = self._activation_terms()
        self._products()  # enters its rows
        axes = [Axis(fixed=fixed, per_unit=dict(per_unit)) for fixed, *per_unit in self.rows]
        return CostModel(
            axes=axes, macs=macs, params=params, size_bytes=sizes, activation_bytes=activations,
            num_groups=len(self._widths),
        )  # fmt: skip

    def _activation_terms(self) -> list[Term]:
        """Return the bytes of every tensor that an operator makes and another reads.

        Weights that are made of weights are left out.
        """
        recording, terms = self.propagation.recording, []
        read = {r.index for op in recording.ops for r in op.inputs} | {r.index for r in recording.outputs}
        for ref in (r for op in recording.ops if op.makes for r in op.outputs if r is not None):
            if ref.index not in read or ref.index in self.propagation.weight_refs:
                continue
            extents = self.propagation.extents(ref)
            fixed = [n for n in extents if isinstance(n, int)]
            terms.append(
                Term(
                    constant=int(np.prod(fixed, dtype=np.int64)) * recording.dtypes[ref.index].itemsize,
                    axes=tuple(self._row_of(a) for a in extents if not isinstance(a, int)),
                )
            )
        return terms

    def _products(self) -> tuple[Product, ...]:
        """Return the operators that have multiply-adds, with the axes of the tensors that they read."""
        numbers = dict.fromkeys(t.op for t in self.propagation.cost_terms)
        ops = self.propagation.recording.ops
        return tuple(
            Product(op=n, operands=tuple(self._shape_rows(r) for r in ops[n].inputs)) for n in numbers
        )

    def _shape_rows(self, ref: Ref) -> tuple[int, ...]:
        return tuple(
            self._row(Axis(fixed=a, per_unit={})) if isinstance(a, int) else self._row_of(a)
            for a in self.propagation.extents(ref)
        )

    def _stored_terms(self) -> tuple[list[Term], list[Term]]:
        """Return the elements of every parameter, and the bytes of every parameter and buffer."""
        by_name: dict[str, list[Slot]] = {}
        for slot in self.slots:
            if slot.pad_op is None:
                by_name.setdefault(slot.name, []).append(slot)
        params, sizes = [], []
        for name, tensor, is_buffer in _tensors(self.model):
            slots = by_name.get(name, [])
            rows = tuple(self._row(self._axis(slice(s.start, s.start + s.size))) for s in slots)
            tracked = {s.dim for s in slots}
            constant = int(
                np.prod([n for d, n in enumerate(tensor.shape) if d not in tracked], dtype=np.int64)
            )
            if not is_buffer:
                params.append(Term(constant=constant, axes=rows))
            sizes.append(Term(constant=constant * tensor.element_size(), axes=rows))
        return params, sizes

    def _frozen(self) -> tuple[Frozen, ...]:
        frozen = []
        for slot in (s for s in self.slots if not s.is_open):
            classes = self.classes[slot.start : slot.start + slot.size]
            stuck = classes[self.has_channel_reason[classes]]
            if len(stuck):
                reason = self.reason[int(stuck[0])]
                frozen.append(Frozen(name=slot.name, dim=slot.dim, num_channels=len(stuck), reason=reason))
                continue
            alone = classes[(self.group_of[classes] < 0) & ~self.is_frozen[classes]]
            if len(alone):
                reason = "tied into one unit, which cannot be removed without removing all"
                frozen.append(Frozen(name=slot.name, dim=slot.dim, num_channels=len(alone), reason=reason))
        return tuple(frozen)

    def _split_axes(self) -> dict[str, dict[int, int]]:
        """Return for each module which axis of a reshape may shrink, by the reshape's number in the module.

        Under its number stands an axis of what it makes, under minus its number one of what it reads.
        """
        axes: dict[str, dict[int, int]] = {}
        for site in self.propagation.reshape_splits:
            axes.setdefault(self.propagation.recording.ops[site.op].module, {})[site.ordinal] = site.chosen
        for op, (ordinal, axis) in self.propagation.kept_axes.items():
            axes.setdefault(self.propagation.recording.ops[op].module, {})[-ordinal] = axis
        return axes

    def _reshaped(self) -> dict[str, tuple[Reshape, ...]]:
        """Return all reshapes, in order, of each module that reshapes what holds channels."""
        ops = self.propagation.recording.ops
        modules = {
            op.module for op in ops if TABLE.get(op.name) is reshape and self._holds_units(op.outputs[0])
        }
        inner = {  # a matrix product folds and unfolds its batch axes by views of its own
            (r, op.where) for op in ops if op.name == "bmm" for r in (*op.inputs, *op.outputs)
        }
        reshapes: dict[str, list[Reshape]] = {}
        for op in ops:
            if op.module in modules and TABLE.get(op.name) is reshape:
                if {(op.inputs[0], op.where), (op.outputs[0], op.where)} & inner:
                    continue
                axes = self._shape_axes(op.outputs[0])
                reshapes.setdefault(op.module, []).append(Reshape(line=op.where, axes=axes))
        return {module: tuple(calls) for module, calls in reshapes.items()}

    def _holds_units(self, ref: Ref | None) -> bool:
        axes = self.propagation.axes.get(ref.index, []) if ref is not None else []
        return any(a is not None and (self.group_of_label[a] >= 0).any() for a in axes)

    def _shape_axes(self, ref: Ref | None) -> tuple[Axis, ...]:
        assert ref is not None
        return tuple(
            Axis(fixed=a, per_unit={}) if isinstance(a, int) else self._axis(a)
            for a in self.propagation.extents(ref)
        )

    def _split(self) -> dict[str, tuple[tuple[Axis, ...], ...]]:
        """Return for each module the pieces of each of its splits."""
        splits: dict[str, list[tuple[Axis, ...]]] = {}
        for op, pieces in self.propagation.splits:
            axes = tuple(self._axis(p) for p in pieces)
            if any(a.per_unit for a in axes):
                splits.setdefault(self.propagation.recording.ops[op].module, []).append(axes)
        return {module: tuple(pieces) for module, pieces in splits.items()}

    def _ragged_calls(self, module: str) -> Iterator[RaggedCall]:
        pieces = dict(self.propagation.splits)
        for position, op in enumerate(self.propagation.recording.ops):
            handler, order = TABLE.get(op.name), self.propagation.reorderings.get(position)
            if op.module != module or not (handler in (reshape, split, channel_shuffle) or order):
                continue
            if handler is split:
                axes = self._split_axes_of(op, pieces.get(position))
                labelled_axes = tuple(range(len(axes)))
            else:
                out = op.outputs[0]
                assert out is not None
                axes = self._shape_axes(out)
                labelled_axes = tuple(
                    d for d, a in enumerate(self.propagation.extents(out)) if not isinstance(a, int)
                )
            rearranged = self._rearranged(order) if order else None
            yield RaggedCall(line=op.where, axes=axes, labelled_axes=labelled_axes, order=rearranged)

    def _split_axes_of(self, op: Op, pieces: Sequence[LabelArray] | None) -> tuple[Axis, ...]:
        if pieces is not None:
            return tuple(self._axis(p) for p in pieces)
        dim = op.arg("dim", 0)
        return tuple(
            Axis(fixed=self.propagation.shape(r)[dim], per_unit={}) for r in op.outputs if r is not None
        )

    def _rearranged(self, order: Reordering) -> UnitReordering:
        units = np.append(self.rank[self.classes], 0)  # the last is FIXED's
        group = self.group_of_label[order.labels]
        return UnitReordering(
            dim=order.dim,
            labelled_axes=order.labelled_axes,
            index=order.index,
            group=group,
            unit=units[order.labels],
        )


def _runs(values: NDArray[np.int64], keys: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Return runs of values with equal keys, which are sorted; values with keys below 0 are left out."""
    values, keys = values[keys >= 0], keys[keys >= 0]
    return np.split(values, np.flatnonzero(np.diff(keys)) + 1) if len(values) else []


def _tensors(model: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """Return every parameter and buffer once, under its first name, and whether it is a buffer."""
    tensors_by_id: dict[int, tuple[str, Tensor, bool]] = {}
    for are_buffers, tensors in enumerate((model.named_parameters(), model.named_buffers())):
        for name, tensor in tensors:
            tensors_by_id.setdefault(id(tensor), (name, tensor, bool(are_buffers)))
    return list(tensors_by_id.values())
