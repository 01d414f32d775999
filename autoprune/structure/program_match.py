"""Does the pruned program do what the labels say? Two recorded passes are compared, operator by operator.

The pruned network runs the same operators in the same order, on the same tensors with the same numbers and
of the lengths that the labels predict. If it does, it computes what the masked network computes. Anything
else, such as a scale that is derived from a pruned width, is a mismatch. Modules whose class was exchanged
for one of ours (`patches`) run other operators; these are left out, and the outputs of such a module are
compared by their shapes. Behind such a module strides may differ, and with them the operators; then only
the network's outputs are compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from autoprune.plan import PruningPlan
from autoprune.structure.graph import Group
from autoprune.structure.labels import LabelArray
from autoprune.structure.patches.channel_gather import GatherPatch
from autoprune.structure.patches.norm_patch import NormPatch
from autoprune.structure.patches.reshape_patch import ReshapePatch, Shape
from autoprune.structure.propagate import Propagation
from autoprune.structure.recorder import Op, Recording, Ref

SIZES: dict[str, frozenset[str]] = {
    **dict.fromkeys(
        (
            "view",
            "_unsafe_view",
            "reshape",
            "_reshape_alias",
            "expand",
            "unflatten",
            "new_empty",
            "new_zeros",
        ),
        frozenset({"size", "shape", "sizes"}),
    ),
    **dict.fromkeys(("new_ones", "new_full", "empty", "zeros", "ones", "full"), frozenset({"size"})),
    **dict.fromkeys(("rand", "randn"), frozenset({"size"})),
    **dict.fromkeys(("split", "unsafe_split"), frozenset({"split_size"})),
    **dict.fromkeys(("split_with_sizes", "unsafe_split_with_sizes"), frozenset({"split_sizes"})),
    **dict.fromkeys(("as_strided", "empty_strided", "new_empty_strided"), frozenset({"size", "stride"})),
    "slice": frozenset({"start", "end"}),
    "convolution": frozenset({"groups"}),
    "affine_grid_generator": frozenset({"size"}),
    "native_group_norm": frozenset({"N", "C", "HxW", "group"}),
    "native_layer_norm": frozenset({"normalized_shape"}),
    "_fused_rms_norm": frozenset({"normalized_shape"}),
}  # arguments that may follow a width, by operator: the tensors' shapes are compared instead
NO_SIZES: frozenset[str] = frozenset()
SAME = {
    "_unsafe_view": "view",
    "split_with_sizes": "split",
}  # pieces are compared by their shapes
MOVES = frozenset({"permute", "view", "_unsafe_view", "bmm"})
GATHERS = frozenset({"index_select", "native_channel_shuffle", "channel_shuffle"})  # ours in ragged modules


def find_mismatch(
    propagation: Propagation,
    pruned: Recording,
    plan: PruningPlan,
    groups: Mapping[str, Group],
    others: ReplacedModules,
) -> str:
    """Return where the pruned pass differs from what the original's labels predict; empty if it does not.

    Args:
        others: the modules whose operators are left out.
    """
    lengths = _Lengths(propagation, plan, groups)
    tensor_map = _TensorMap(propagation, pruned, lengths)
    before = _steps(propagation.recording, tensor_map.source, others)
    after = _steps(pruned, tensor_map.source_pruned, others)
    for (position, old), (_, new) in zip(before, after, strict=False):
        is_live = propagation.live[position]
        problem = (
            (f"another operator runs where {old.name} ran" if _name(old) != _name(new) else "")
            or ("" if _moves_alike(propagation, pruned, old, new, lengths) else _changed_number(old, new))
            or tensor_map.changed(old, new, is_live=is_live)
            or (_other_shape(propagation, pruned, old, new, lengths) if is_live else "")
            or (_other_stretch(propagation, pruned, old, new, lengths) if is_live else "")
        )
        if problem:
            return f"{problem} ({new.name} in {new.module or 'the network'}, {new.where})"
    if len(before) != len(after):
        return f"it runs {len(after)} operators instead of {len(before)}"
    return tensor_map.changed_outputs()


def _steps(recording: Recording, source: dict[int, int], others: ReplacedModules) -> list[tuple[int, Op]]:
    """Return the operators with their positions, without mere copies, which depend on strides alone.

    Args:
        source: this function enters, for each copy, what it is a copy of.
    """
    outside = {name for name in {op.module for op in recording.ops} if others.has(name)}
    written = {r.index for op in recording.ops if op.is_in_place for r in op.outputs if r is not None}
    steps = []
    for position, op in enumerate(recording.ops):
        if op.module in outside:
            continue
        ends = {r.index for r in (*op.inputs, *op.outputs) if r is not None}
        is_gather = op.name in GATHERS and op.module in others.gather_modules
        if is_gather or (op.name == "clone" and not ends & written):
            copy, original = op.outputs[0], op.inputs[0].index
            assert copy is not None
            source[copy.index] = source.get(original, original)
        else:
            steps.append((position, op))
    return steps


def _name(op: Op) -> str:
    return SAME.get(op.name, op.name)


@dataclass(frozen=True)
class ReplacedModules:
    """Modules of a pruned copy that have another class than before, and not only for corrected reshapes.

    Attributes:
        alone: modules that run other operators of their own.
        whole: modules that run other operators, with all modules in them.
        gather_modules: modules in which channels are gathered by index.
    """

    alone: frozenset[str]
    whole: frozenset[str]
    gather_modules: frozenset[str]

    def has(self, name: str) -> bool:
        """Return whether the module of that name runs other operators than before."""
        parts = name.split(".")
        return name in self.alone or any(".".join(parts[: n + 1]) in self.whole for n in range(len(parts)))


def find_replaced_modules(original: nn.Module, dense: nn.Module) -> ReplacedModules:
    """Return the modules of a pruned copy that were exchanged for ours."""
    kinds = {name: _own_class(module) for name, module in original.named_modules()}
    replaced = {n: m for n, m in dense.named_modules() if _own_class(m) is not kinds.get(n)}
    alone = frozenset(n for n, m in replaced.items() if isinstance(m, NormPatch))
    gather_modules = {n for n, m in dense.named_modules() if isinstance(m, GatherPatch)}
    return ReplacedModules(alone, frozenset(replaced) - alone, frozenset(gather_modules))


def output_shape_mismatch(propagation: Propagation, pruned: Recording) -> str:
    """Return how the pruned network's outputs differ in shape from their labels; empty if they do not."""
    expected = [propagation.shape(r) for r in propagation.recording.outputs]
    actual = [pruned.shapes[r.index] for r in pruned.outputs]
    return f"its output becomes {actual}" if actual != expected else ""


def _own_class(module: nn.Module) -> type:
    cls = type(module)
    while cls.__bases__[0] in (ReshapePatch, GatherPatch):
        cls = cls.__bases__[1]
    return cls


class _Lengths:
    """The length of every axis of labels under a plan."""

    def __init__(self, propagation: Propagation, plan: PruningPlan, groups: Mapping[str, Group]) -> None:
        self.stays = np.ones(propagation.labels.size + 1, bool)  # the last is FIXED's
        self._known: dict[int, int] = {}
        starts = {(s.name, s.dim, s.pad_op, s.side): s.start for s in propagation.labels.slots}
        for name, keep in plan.keep.items():
            group = groups[name]
            is_gone = np.ones(group.num_units, bool)
            is_gone[keep] = False
            for member in group.members:
                start = starts[member.name, member.dim, None, "left"]
                self.stays[start + member.index[is_gone]] = False
            for padding in group.paddings:
                start = starts[padding.module, padding.dim, padding.op, padding.side]
                self.stays[start + padding.index[is_gone]] = False
        if propagation.labels.has_open:
            self._follow_ties(propagation.labels.classes())

    def _follow_ties(self, classes: NDArray[np.int32]) -> None:
        """Remove labels that no member owns, but that are tied to a removed label."""
        is_gone = np.zeros(int(classes.max()) + 1, bool)
        is_gone[classes[~self.stays[:-1]]] = True
        self.stays[:-1] = ~is_gone[classes]

    def of(self, axis: LabelArray) -> int:
        """Return the length under the plan of one of the propagation's label arrays."""
        if id(axis) not in self._known:
            self._known[id(axis)] = int(np.count_nonzero(self.stays[axis]))
        return self._known[id(axis)]


class _TensorMap:
    """A map from each tensor of the original pass to the tensor of the pruned pass that stands for it.

    Attributes:
        source: Ref index of a copy that is left out -> Ref index of what it is a copy of.
        source_pruned: the same, of the pruned pass.
    """

    def __init__(self, propagation: Propagation, pruned: Recording, lengths: _Lengths) -> None:
        self.propagation, self.original, self.pruned, self.lengths = (
            propagation,
            propagation.recording,
            pruned,
            lengths,
        )
        self.source: dict[int, int] = {}
        self.source_pruned: dict[int, int] = {}
        named = {name: index for index, name in pruned.parameters.items()}
        self.of = {index: named.get(name, -1) for index, name in self.original.parameters.items()}
        self._enter(self.original.inputs, pruned.inputs)

    def _enter(self, old: Sequence[Ref | None], new: Sequence[Ref | None]) -> None:
        for left, right in zip(old, new, strict=False):
            if left is not None and right is not None:
                self.of.setdefault(left.index, right.index)

    def changed(self, old: Op, new: Op, *, is_live: bool) -> str:
        """Return why the operator reads other tensors than its twin; empty where it does not.

        Constants are matched when they are used.
        """
        if len(old.inputs) != len(new.inputs):
            return "it reads another number of tensors"
        for left, right in zip(old.inputs, new.inputs, strict=True):
            if self._found(left) != self.source_pruned.get(right.index, right.index):
                if self._found(left) is not None:
                    return "it reads another tensor"
                if is_live and (
                    problem := _length_apart(self.propagation, self.pruned, left, right, self.lengths)
                ):
                    return problem
                self.of[self.source.get(left.index, left.index)] = self.source_pruned.get(
                    right.index, right.index
                )
        self._enter(old.outputs, new.outputs)
        return ""

    def _found(self, old: Ref) -> int | None:
        return self.of.get(self.source.get(old.index, old.index))

    def changed_outputs(self) -> str:
        """Return that the network's outputs are other tensors, in words; empty where they are not."""
        for left, right in zip(self.original.outputs, self.pruned.outputs, strict=False):
            if self._found(left) not in (None, self.source_pruned.get(right.index, right.index)):
                return "it gives out other tensors"
        return output_shape_mismatch(self.propagation, self.pruned)


def _moves_alike(propagation: Propagation, pruned: Recording, old: Op, new: Op, lengths: _Lengths) -> bool:
    """Return whether two permutations differ by axes of length 1 alone, which einsum puts elsewhere."""
    if old.name != "permute":
        return False
    shapes = _expected(propagation, old.inputs[0], lengths), pruned.shapes[new.inputs[0].index]
    orders = [[d for d in op.arg("dims") if x[d] > 1] for op, x in zip((old, new), shapes, strict=True)]
    return [sorted(orders[0]).index(d) for d in orders[0]] == [sorted(orders[1]).index(d) for d in orders[1]]


def _changed_number(old: Op, new: Op) -> str:
    may_follow = SIZES.get(old.name, NO_SIZES)
    for name, value in old.arguments.items():
        if name not in may_follow and _numbers(value) != _numbers(new.arguments.get(name)):
            return f"argument {name!r} follows a width"
    return ""


def _numbers(value: Any) -> Any:
    """Return the part of an argument that must not change: numbers and words, not tensors."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return tuple(_numbers(v) for v in value) if isinstance(value, list) else ()


def _other_shape(propagation: Propagation, pruned: Recording, old: Op, new: Op, lengths: _Lengths) -> str:
    for number, (left, right) in enumerate(zip(old.outputs, new.outputs, strict=False)):
        if left is None or right is None:
            continue
        if number > 0 and propagation.axes.get(left.index) is None:
            continue  # statistics that nothing reads
        problem = _length_apart(propagation, pruned, left, right, lengths)
        if problem and not (
            old.name in MOVES and _lengths_without_ones(propagation, pruned, left, right, lengths)
        ):
            return problem
    return ""


def _lengths_without_ones(
    propagation: Propagation, pruned: Recording, left: Ref, right: Ref, lengths: _Lengths
) -> bool:
    """Return whether a tensor that an einsum moves is as predicted but for axes of length 1.

    The operators that follow show whether such a tensor is right.
    """
    expected = _expected(propagation, left, lengths)
    return [n for n in expected if n != 1] == [n for n in pruned.shapes[right.index] if n != 1]


def _expected(propagation: Propagation, ref: Ref, lengths: _Lengths) -> Shape:
    return tuple(a if isinstance(a, int) else lengths.of(a) for a in propagation.extents(ref))


def _length_apart(
    propagation: Propagation, pruned: Recording, left: Ref, right: Ref, lengths: _Lengths
) -> str:
    """Return how a tensor's shape differs from what its labels say; empty where it does not."""
    shape, expected = propagation.shape(left), _expected(propagation, left, lengths)
    actual = pruned.shapes[right.index]
    return "" if actual == expected or 0 in shape else f"a tensor becomes {actual} and not {expected}"


def _other_stretch(propagation: Propagation, pruned: Recording, old: Op, new: Op, lengths: _Lengths) -> str:
    """Return how sizes that no shape shows differ from their prediction; empty where they do not.

    These are the position where a slice begins, and the width of a normalisation group.
    """
    if old.name == "slice":
        dim = old.arg("dim", 0) % len(propagation.shape(old.inputs[0]))
        axis, length = propagation.get(old.inputs[0])[dim], pruned.shapes[new.inputs[0].index][dim]
        starts = [_first(op, n) for op, n in ((old, propagation.shape(old.inputs[0])[dim]), (new, length))]
        expected = starts[0] if axis is None else int(np.count_nonzero(lengths.stays[axis[: starts[0]]]))
        return "" if starts[1] == expected else f"a slice begins at {starts[1]} and not at {expected}"
    if old.name == "native_group_norm":
        widths = [int(op.arg("C")) / int(op.arg("group")) for op in (old, new)]
        return "" if widths[0] == widths[1] else "its groups are of another width"
    return ""


def _first(op: Op, length: int) -> int:
    return slice(op.arg("start"), op.arg("end"), op.arg("step") or 1).indices(length)[0]
