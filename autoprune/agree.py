"""Does the pruned program do what the labels say? Two recorded passes compared, operator by operator.

The pruned network runs the same operators in the same order, with the same numbers, on tensors of the lengths
that the labels predict. If it does, it computes what the masked network computes. Anything else, such as a
scale that is derived from a pruned width, is a disagreement. A network in which the class of a module was
exchanged for one of ours (`attention`, `padding`, `rescaled`) runs other operators, also behind it, where
strides differ; there only the outputs' shapes are compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from autoprune.graph import Group
from autoprune.loose import LooseModule
from autoprune.plan import PruningPlan
from autoprune.tape import Op, Tape
from autoprune.walk import Walk

SIZES = frozenset(
    [
        "size",
        "sizes",
        "shape",
        "split_size",
        "split_sizes",
        "start",
        "end",
        "groups",
        "group",
        "num_groups",
        "N",
        "C",
        "HxW",
        "normalized_shape",
        "repeats",
        "storage_offset",
        "stride",
    ]
)  # arguments that may follow a width; the tensors' shapes are compared instead


def disagreement(walk: Walk, pruned: Tape, plan: PruningPlan, groups: Mapping[str, Group]) -> str:
    """Where the pruned pass differs from what the original's labels predict; empty where nowhere."""
    stays = _staying(walk, plan, groups)
    before = walk.tape.ops
    for position, (old, new) in enumerate(zip(before, pruned.ops, strict=False)):
        place = f"{new.name} in {new.module or 'the network'}, {new.where}"
        if old.name != new.name:
            return f"another operator runs where {old.name} ran ({place})"
        if changed := _changed_number(old.arguments, new.arguments):
            return f"argument {changed!r} follows a width ({place})"
        if walk.live[position] and (shapes := _other_shape(walk, pruned, old, new, stays)):
            return f"{shapes} ({place})"
    if len(before) != len(pruned.ops):
        return f"it runs {len(pruned.ops)} operators instead of {len(before)}"
    return ""


def other_outputs(walk: Walk, pruned: Tape) -> str:
    """Whether the pruned network's outputs have other shapes; empty if not."""
    expected = [walk.shape(r) for r in walk.tape.outputs]
    got = [pruned.shapes[r.index] for r in pruned.outputs]
    return f"its output becomes {got}" if got != expected else ""


def has_exchanged(original: nn.Module, dense: nn.Module) -> bool:
    """Whether a module's class is not the original's, and not only loosened."""
    kinds = {name: _own_class(module) for name, module in original.named_modules()}
    return any(_own_class(module) is not kinds.get(name) for name, module in dense.named_modules())


def _own_class(module: nn.Module) -> type:
    return type(module).__bases__[1] if isinstance(module, LooseModule) else type(module)


def _staying(walk: Walk, plan: PruningPlan, groups: Mapping[str, Group]) -> NDArray[np.bool_]:
    """Whether each label stays under the plan, bool (labels,)."""
    stays = np.ones(walk.labels.size, bool)
    starts = {(s.name, s.dim, s.pad_op, s.side): s.start for s in walk.labels.slots}
    for name, keep in plan.keep.items():
        group = groups[name]
        gone = np.setdiff1d(np.arange(group.num_units), keep)
        for member in group.members:
            stays[starts[member.name, member.dim, None, "left"] + member.index[gone].ravel()] = False
        for padding in group.paddings:
            start = starts[padding.module, padding.dim, padding.op, padding.side]
            stays[start + padding.index[gone].ravel()] = False
    return stays


def _changed_number(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    for name, value in old.items():
        if name not in SIZES and _numbers(value) != _numbers(new.get(name)):
            return name
    return ""


def _numbers(value: Any) -> Any:
    """What of an argument must not change: numbers and words, not tensors."""
    if isinstance(value, (bool, int, float, str)) or value is None:
        return value
    return tuple(_numbers(v) for v in value) if isinstance(value, list) else ()


def _other_shape(walk: Walk, pruned: Tape, old: Op, new: Op, stays: NDArray[np.bool_]) -> str:
    for number, (left, right) in enumerate(zip(old.outputs, new.outputs, strict=False)):
        if left is None or right is None or 0 in walk.shape(left):
            continue
        axes = walk.get(left)
        if number > 0 and all(a is None for a in axes):
            continue  # statistics that nothing reads
        expected = tuple(
            n if a is None else int((a < 0).sum() + stays[a[a >= 0]].sum())
            for n, a in zip(walk.shape(left), axes, strict=True)
        )
        if pruned.shapes[right.index] != expected:
            return f"a tensor becomes {pruned.shapes[right.index]} and not {expected}"
    return ""
