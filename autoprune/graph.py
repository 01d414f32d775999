"""Understanding a network: which channels must go together, which must stay, and what everything costs.

`trace` records one forward pass (`tape`), walks it with labels (`walk`, `ops`), and sorts the classes of tied
labels into groups: classes that own the same number of positions in the same parameter dimensions are the
units of one group. Before a graph is given out, the pruned program is run without values to see that it
agrees with the pruned sizes (`prove`); what does not hold is tried another way or frozen with its reason.

The coupling of layers into groups is that of Fang et al., "DepGraph", CVPR 2023, section 3; the labels over
operators are ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.cost import Axis, Cost, CostModel, Term
from autoprune.errors import UsageError
from autoprune.labels import LabelArray, Role, Slot
from autoprune.ops import TABLE
from autoprune.plan import PruningPlan
from autoprune.tape import Tape, record
from autoprune.walk import Walk


@dataclass(frozen=True, kw_only=True)
class Member:
    """One dimension of a parameter or buffer that shrinks with a group.

    Attributes:
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
    """A padded edge of an activation that shrinks with a group; `op` is the padding operator on the tape."""

    module: str
    op: int
    dim: int
    side: Literal["left", "right"]
    index: NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Channels that must shrink together.

    Attributes:
        name: of the first layer that makes these channels; stable over pruning.
        layers: qualified names of all modules with members, in the order in which they run.
        macs: multiply-adds of the operators that shrink with this group.
        min_keep: units that must stay.
    """

    name: str
    num_units: int
    layers: tuple[str, ...]
    members: tuple[Member, ...]
    paddings: tuple[Padding, ...] = ()
    macs: int = 0
    min_keep: int = 1


@dataclass(frozen=True, kw_only=True)
class Frozen:
    """A parameter dimension some of whose channels must stay, and why."""

    name: str
    dim: int
    num_channels: int
    reason: str


@dataclass(frozen=True, kw_only=True)
class Counted:
    """An integer attribute that counts units of groups: `fixed` plus the units kept, over `per`."""

    module: str
    attribute: str
    axis: Axis
    per: int


@dataclass(frozen=True, kw_only=True)
class ChannelGraph:
    """A network's groups, frozen parameters and cost.

    Attributes:
        groups: in the order in which their channels are made.
        frozen: what must stay, with reasons.
        round_to: kept counts should be multiples of this where a group is wide enough.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    round_to: int
    cost_model: CostModel = field(repr=False)
    counted: tuple[Counted, ...] = field(repr=False, default=())
    grouped: Mapping[str, str] = field(repr=False, default_factory=dict)
    widths: Mapping[tuple[str, int], int] = field(repr=False, default_factory=dict)
    tape: Tape | None = field(repr=False, default=None, compare=False)

    def group(self, name: str) -> Group:
        """The group called `name`.

        Raises:
            UsageError: there is none.
        """
        for group in self.groups:
            if group.name == name:
                return group
        raise UsageError(f"there is no group {name!r}", "see `autoprune groups` for the names")

    def cost(self, plan: PruningPlan | None = None) -> Cost:
        """Exact cost of the network, or of what a plan leaves of it."""
        counts = {} if plan is None else {name: len(kept) for name, kept in plan.keep.items()}
        return self.cost_of_counts(counts)

    def cost_of_counts(self, counts: Mapping[str, int]) -> Cost:
        """Exact cost when each named group keeps that many units and all others keep all."""
        return self.cost_model(self._vector(counts))

    def _vector(self, counts: Mapping[str, int]) -> NDArray[np.int64]:
        return np.array([counts.get(g.name, g.num_units) for g in self.groups], dtype=np.int64)

    def width(self, name: str, dim: int) -> int:
        """Length of one parameter dimension before any plan."""
        return self.widths[name, dim]

    def length(self, axis: Axis, counts: Mapping[str, int]) -> int:
        """Length of an axis when each named group keeps that many units and all others keep all."""
        names = [(g.name, g.num_units) for g in self.groups]
        return axis.fixed + sum(n * counts.get(*names[g]) for g, n in axis.per_unit.items())

    @cached_property
    def reach(self) -> float:
        """Share of the multiply-adds in operators that at least one group shrinks."""
        _, touched = self.cost_model.macs_touched(self._vector({}))
        total = self.cost().macs
        return touched / total if total else 0.0


def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    exclude: Sequence[str] = (),
    only: Sequence[str] = (),
    round_to: int = 1,
) -> ChannelGraph:
    """Understand a network: record it, tie its channels, prove that the program agrees.

    Args:
        model: any module; left as it was found.
        example_inputs: a tensor or the tuple of forward's arguments, of the shape that the network will see.
        exclude: module names or globs whose channels stay.
        only: module names or globs; where given, channels of all other modules stay.
        round_to: kept counts should be multiples of this.

    Raises:
        TraceError: the forward pass fails on these inputs.
        UsageError: a pattern matches no module.
    """
    from autoprune.prove import proven

    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    kept = _excluded(model, exclude, only)
    tape = record(model, inputs)
    return proven(model, inputs, tape, kept, round_to)


def _excluded(model: nn.Module, exclude: Sequence[str], only: Sequence[str]) -> dict[str, str]:
    """Modules whose channels stay at the user's wish, with the wish."""
    names = [name for name, _ in model.named_modules() if name]
    matched: dict[str, set[str]] = {}
    for pattern in (*exclude, *only):
        hits = {n for n in names if fnmatchcase(n, pattern) or n.startswith(pattern + ".") or n == pattern}
        matched[pattern] = hits | {n for n in names for h in hits if n.startswith(h + ".")}
        if not hits:
            raise UsageError(
                f"the pattern {pattern!r} matches no module of the network",
                f"modules are named like {', '.join(names[:3])}; see `autoprune groups`",
            )
    wishes = {name: f"excluded by {p!r}" for p in exclude for name in matched[p]}
    if only:
        chosen = set().union(*(matched[p] for p in only))
        wishes |= {n: f"not among only={list(only)}" for n in names if n not in chosen and n not in wishes}
    return wishes


def build(
    model: nn.Module,
    tape: Tape,
    *,
    choices: Mapping[int, int | None],
    kept: Mapping[str, str],
    refused: Sequence[tuple[LabelArray, str]],
    round_to: int,
) -> tuple[ChannelGraph, Walk]:
    """Walk the tape and sort its labels into groups.

    Args:
        choices: of reshape operators, see `Walk`.
        kept: module -> why the channels that it makes stay.
        refused: labels that did not prove, with reasons.
    """
    walk = Walk(tape, dict(model.named_modules()), TABLE, choices)
    walk.run()
    for labels, reason in refused:
        walk.labels.freeze(labels, reason)
    _freeze_wishes(walk, kept)
    return _Grouping(model, walk).graph(round_to), walk


def _freeze_wishes(walk: Walk, kept: Mapping[str, str]) -> None:
    for slot in walk.labels.slots:
        wish = kept.get(slot.name.rpartition(".")[0] if slot.pad_op is None else slot.name)
        if wish and slot.role != "in":
            walk.labels.freeze(np.arange(slot.start, slot.start + slot.size), wish)


class _Grouping:
    """Turns the ties of one walk into groups."""

    def __init__(self, model: nn.Module, walk: Walk) -> None:
        self.model, self.walk, self.slots = model, walk, walk.labels.slots
        self.classes = walk.labels.classes()
        size, count = len(self.classes), int(self.classes.max()) + 1 if len(self.classes) else 0
        self.reason: dict[int, str] = {}
        self.is_frozen = np.zeros(count, bool)
        self.has_channel_reason = np.zeros(count, bool)
        for freeze in walk.labels.freezes:
            hit = np.unique(self.classes[freeze.labels])
            fresh = hit[~self.has_channel_reason[hit]] if not freeze.is_structural else hit[:0]
            self.reason.update(dict.fromkeys(fresh.tolist(), freeze.reason))
            self.has_channel_reason[fresh] = True
            self.is_frozen[hit] = True
        starts = np.array([s.start for s in self.slots], dtype=np.int64)
        self.slot_of = (
            np.searchsorted(starts, np.arange(size), side="right") - 1 if size else np.empty(0, np.int64)
        )
        self.group_of = self._group_of_classes()

    def _group_of_classes(self) -> NDArray[np.int64]:
        """Group number of every class, -1 where frozen or alone. Groups are numbered by their first label."""
        rng = np.random.default_rng(0)  # a fixed hash: equal multisets of slots get equal sums
        keys = rng.integers(1, 2**62, size=max(1, len(self.slots)), dtype=np.uint64)
        count = len(self.is_frozen)
        signature = np.zeros(count, np.uint64)
        np.add.at(signature, self.classes, keys[self.slot_of])
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
            rank = np.full(len(widths), -1, np.int64)
            prunable = np.flatnonzero(widths > 1)
            rank[prunable[np.argsort(starts[prunable])]] = np.arange(len(prunable))
            group_of[free] = rank[inverse]
        self.first = first
        return group_of

    def graph(self, round_to: int) -> ChannelGraph:
        units = self._units()
        groups = self._named([self._members(u) for u in units])
        axes, terms = self._cost_terms()
        num = len(groups)
        model = CostModel(axes=axes, macs=terms[0], params=terms[1], size_bytes=terms[2], num_groups=num)
        widths = np.array([g.num_units for g in groups], dtype=np.int64)
        at_stake, _ = model.macs_touched(widths)
        return ChannelGraph(
            groups=tuple(replace(g, macs=int(m)) for g, m in zip(groups, at_stake, strict=True)),
            frozen=self._frozen(),
            round_to=round_to,
            cost_model=model,
            counted=self._counted(),
            grouped=dict(self.walk.grouped),
            widths={(s.name, s.dim): s.size for s in self.slots if s.pad_op is None},
            tape=self.walk.tape,
        )

    def _units(self) -> list[NDArray[np.int64]]:
        """Class numbers of every group's units, ordered by first label."""
        num = int(self.group_of.max()) + 1 if len(self.group_of) else 0
        found = [np.flatnonzero(self.group_of == g) for g in range(num)]
        return [u[np.argsort(self.first[u])] for u in found]

    def _members(self, units: NDArray[np.int64]) -> tuple[int, list[tuple[int, Slot, NDArray[np.int64]]]]:
        rank = np.full(len(self.is_frozen), -1, np.int64)
        rank[units] = np.arange(len(units))
        labels = np.flatnonzero(rank[self.classes] >= 0)
        members = []
        for number in np.unique(self.slot_of[labels]):
            slot = self.slots[int(number)]
            mine = labels[self.slot_of[labels] == number]
            order = np.argsort(rank[self.classes[mine]], kind="stable")
            members.append((int(number), slot, (mine[order] - slot.start).reshape(len(units), -1)))
        return len(units), members

    def _named(self, found: list[tuple[int, list[tuple[int, Slot, NDArray[np.int64]]]]]) -> list[Group]:
        buffers = {name for name, _ in self.model.named_buffers(remove_duplicate=False)}
        groups, taken = [], dict[str, int]()
        for width, slots in found:
            makers = [s for _, s, _ in slots if s.role == "out" and s.pad_op is None]
            first = (makers or [s for _, s, _ in slots])[0].name
            base = first.rpartition(".")[0] or first
            taken[base] = taken.get(base, 0) + 1
            name = base if taken[base] == 1 else f"{base}#{taken[base]}"
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
            groups.append(
                Group(name=name, num_units=width, layers=layers, members=members, paddings=paddings)
            )
        return groups

    def _axis(self, labels: LabelArray) -> Axis:
        known = labels[labels >= 0]
        groups = self.group_of[self.classes[known]]
        kept = len(labels) - len(known) + int((groups < 0).sum())
        numbers, positions = np.unique(groups[groups >= 0], return_counts=True)
        widths = self._widths()
        return Axis(
            fixed=kept,
            per_unit={int(g): int(p) // int(widths[g]) for g, p in zip(numbers, positions, strict=True)},
        )

    def _widths(self) -> NDArray[np.int64]:
        if not hasattr(self, "_cached_widths"):
            self._cached_widths = np.bincount(self.group_of[self.group_of >= 0])
        return self._cached_widths

    def _cost_terms(self) -> tuple[list[Axis], tuple[list[Term], list[Term], list[Term]]]:
        axes: list[Axis] = []
        macs = []
        for term in self.walk.terms:
            macs.append(
                Term(constant=term.constant, axes=tuple(range(len(axes), len(axes) + len(term.axes))))
            )
            axes += [self._axis(a) for a in term.axes]
        by_name: dict[str, list[Slot]] = {}
        for slot in self.slots:
            if slot.pad_op is None:
                by_name.setdefault(slot.name, []).append(slot)
        params, sizes = [], []
        for name, tensor, is_buffer in _tensors(self.model):
            slots = by_name.get(name, [])
            rows = tuple(range(len(axes), len(axes) + len(slots)))
            axes += [self._axis(np.arange(s.start, s.start + s.size)) for s in slots]
            tracked = {s.dim for s in slots}
            constant = int(
                np.prod([n for d, n in enumerate(tensor.shape) if d not in tracked], dtype=np.int64)
            )
            if not is_buffer:
                params.append(Term(constant=constant, axes=rows))
            sizes.append(Term(constant=constant * tensor.element_size(), axes=rows))
        return axes, (macs, params, sizes)

    def _frozen(self) -> tuple[Frozen, ...]:
        found = []
        for slot in self.slots:
            mine = self.classes[slot.start : slot.start + slot.size]
            stuck = mine[self.has_channel_reason[mine]]
            if len(stuck):
                reason = self.reason[int(stuck[0])]
                found.append(Frozen(name=slot.name, dim=slot.dim, num_channels=len(stuck), reason=reason))
                continue
            alone = mine[(self.group_of[mine] < 0) & ~self.is_frozen[mine]]
            if len(alone):
                reason = "tied into one unit, which cannot be removed without removing all"
                found.append(Frozen(name=slot.name, dim=slot.dim, num_channels=len(alone), reason=reason))
        return tuple(found)

    def _counted(self) -> tuple[Counted, ...]:
        rules = [(r.module, r.attribute, r.labels, r.per) for r in self.walk.rules]
        counted = [Counted(module=m, attribute=a, axis=self._axis(x), per=p) for m, a, x, p in rules]
        return (*counted, *self._site_counters())

    def _site_counters(self) -> list[Counted]:
        """Attributes of modules that split a channel axis: how many heads, and how wide all of them are."""
        found: dict[tuple[str, str], Counted] = {}
        for site in self.walk.sites:
            op = self.walk.tape.ops[site.op]
            units = np.unique(site.labels[site.labels >= 0])
            axis, count = self._axis(units), len(units)
            if not axis.per_unit:
                continue
            for name, times in _counting_attributes(self.walk.modules[op.module], count, site.total).items():
                scaled = Axis(
                    fixed=axis.fixed * times, per_unit={g: n * times for g, n in axis.per_unit.items()}
                )
                found[op.module, name] = Counted(module=op.module, attribute=name, axis=scaled, per=1)
        return list(found.values())


def _counting_attributes(module: nn.Module, count: int, total: int) -> dict[str, int]:
    """Integers on a module that say how many pieces an axis is split into, or how wide all are: name -> width."""
    numbers = {n: v for n, v in vars(module).items() if type(v) is int}
    pieces = [n for n, v in numbers.items() if v == count and ("head" in n or "group" in n)]
    plain = [n for n in pieces if not any(w in n for w in ("dim", "size", "width", "channels"))]
    widths = ("attn_dim", "inner", "all_head", "hidden", "out_dim", "dim_out", "key_dim")
    whole = [
        n for n, v in numbers.items() if v in (total, total // 3) != count and any(w in n for w in widths)
    ]
    return dict.fromkeys(plain or pieces, 1) | {n: numbers[n] // count for n in whole}


def _tensors(model: nn.Module) -> list[tuple[str, Tensor, bool]]:
    """Every parameter and buffer once, under its first name."""
    found: dict[int, tuple[str, Tensor, bool]] = {}
    for name, tensor in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(tensor), (name, tensor, False))
    for name, tensor in model.named_buffers(remove_duplicate=False):
        found.setdefault(id(tensor), (name, tensor, True))
    return list(found.values())
