"""Channel shuffles whose parts need not shrink alike.

A reshape to (parts, width), a permutation and a reshape back tie equal positions of the parts, because what
lies between must stay a rectangle. In a trunk that is halved and shuffled block after block (Ma et al.
2018, "ShuffleNet V2", section 3.2) these ties end in a handful of units, or in one. There a shuffle is
treated as a rearrangement of channels: nothing ties, and the dense network gathers its channels by index
(`patches.channel_gather`). A module in which this is done is *ragged*; its halves may differ too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoprune.structure.propagate import Axes, Propagation, Reordering, fixed_axis
from autoprune.structure.recorder import Op, Ref

RESHAPES = frozenset(["view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"])
MOVES = frozenset({"permute", "transpose"})
COPIES = frozenset({"clone", "contiguous", "alias"})


@dataclass(frozen=True, slots=True)
class Shuffle:
    """A channel axis that a reshape splits and another one merges again, with nothing but moves between.

    Attributes:
        inside: Ref of each tensor between the two -> the axes that hold the channels, the one that holds
            them all in the dense network first.
        merged: the tensor in which the channels are one axis again.
        dim: that axis.
        index: position i of that axis was `index[i]` before the shuffle.
    """

    inside: dict[int, tuple[int, ...]]
    merged: Ref
    dim: int
    index: NDArray[np.int64]


def match_axes(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the smallest runs of axes of equal product; axes of length 1 are left out."""
    left = [d for d, n in enumerate(before) if n > 1]
    right = [d for d, n in enumerate(after) if n > 1]
    i = j = 0
    while i < len(left) and j < len(right):
        start_i, start_j = i, j
        product_i, product_j = before[left[i]], after[right[j]]
        while product_i != product_j:
            if product_i < product_j:
                i += 1
                product_i *= before[left[i]]
            else:
                j += 1
                product_j *= after[right[j]]
        i, j = i + 1, j + 1
        yield left[start_i:i], right[start_j:j]


def _shuffle_from(ctx: Propagation, ref: Ref, targets: list[int]) -> Shuffle | None:
    """Return the shuffle that begins with the axes `targets` of a reshape's result, if it is one."""
    shape = ctx.shape(ref)
    size = int(np.prod([shape[d] for d in targets]))
    numbers = np.arange(size).reshape([n if d in targets else 1 for d, n in enumerate(shape)])
    at, inside = targets[-1], dict[int, tuple[int, ...]]()
    while True:
        held = [d for d, n in enumerate(numbers.shape) if n > 1]
        inside[ref.index] = (at, *(d for d in held if d != at))
        ahead = [n for n in ctx.readers.get(ref.index, ()) if ctx.live[n]]
        if len(ahead) != 1 or ref in ctx.recording.outputs:
            return None
        op = ctx.recording.ops[ahead[0]]
        out = op.outputs[0]
        assert out is not None
        if op.name in RESHAPES:
            ends = [t for s, t in match_axes(ctx.shape(ref), ctx.shape(out)) if s == held and len(t) == 1]
            return Shuffle(inside, out, ends[0][0], numbers.ravel()) if ends else None
        if op.name not in MOVES | COPIES or op.is_in_place:
            return None
        if op.name in MOVES:
            order = _order(op, numbers.ndim)
            numbers, at = numbers.transpose(order), order.index(at)
        ref = out


def _order(op: Op, rank: int) -> list[int]:
    if op.name == "permute":
        return [d % rank for d in op.arg("dims")]
    order = list(range(rank))
    a, b = op.arg("dim0") % rank, op.arg("dim1") % rank
    order[a], order[b] = order[b], order[a]
    return order


def begins_ragged_shuffle(ctx: Propagation, op: Op, dim: int, targets: list[int]) -> bool:
    """Return whether a reshape begins a shuffle in a ragged module.

    It notes such a shuffle with its channels in their new order, and one in another module with its parts.

    Args:
        dim: the axis that the reshape splits.
        targets: the axes that it becomes.
    """
    out, axis = op.outputs[0], ctx.get(op.inputs[0])[dim]
    assert out is not None
    assert axis is not None
    shuffle = _shuffle_from(ctx, out, targets) if len(targets) > 1 and not ctx.is_lookahead else None
    if shuffle is None:
        return False
    if op.module not in ctx.ragged:
        ctx.shuffles.append((op.module, axis, len(axis) // max(ctx.shape(out)[d] for d in targets)))
        return False
    ctx.reorderings[ctx.position] = Reordering(
        dim, axis, shuffle.index, tuple(sorted(shuffle.inside[out.index]))
    )
    labels = axis[shuffle.index]
    ctx.shuffle_results[shuffle.merged.index] = (shuffle.dim, labels)
    ctx.shuffle_interior.update({ref: (dims, labels) for ref, dims in shuffle.inside.items()})
    return True


def channel_shuffle(ctx: Propagation, op: Op) -> Axes:
    """Tie equal positions of the g parts of a shuffle, (g x n) to (n x g), unless the module is ragged."""
    axes, groups = list(ctx.get(op.inputs[0])), op.arg("groups")
    axis = axes[1]
    if axis is None:
        return axes
    if op.module in ctx.ragged and not ctx.is_lookahead:
        index = np.arange(len(axis)).reshape(groups, -1).T.ravel()
        ctx.reorderings[ctx.position] = Reordering(1, axis, index)
        axes[1] = axis[index]
        return axes
    if not ctx.is_lookahead:
        ctx.shuffles.append((op.module, axis, groups))
    axes[1] = np.repeat(ctx.tie_rows(axis.reshape(groups, -1).T), groups)
    return axes


def index_select(ctx: Propagation, op: Op) -> Axes:
    """Freeze an axis whose positions are taken by index, unless an earlier pruning took them."""
    axes, dim = list(ctx.get(op.inputs[0])), op.arg("dim")
    axis, out = axes[dim], op.outputs[0]
    assert out is not None
    call = _own_call(ctx, op)
    if call is None:
        ctx.freeze(axis, "channels are taken by index")
        axes[dim] = None
        return axes
    readers = list(ctx.readers.get(out.index, ()))
    index, axis = call.order.numpy(), fixed_axis(ctx.shape(op.inputs[0])[dim]) if axis is None else axis
    if not ctx.is_lookahead:
        # A gather with labelled axes stands for a reshape, which follows it.
        position = readers[0] if call.labelled_axes else ctx.position
        ctx.reorderings[position] = Reordering(dim, axis, index, call.labelled_axes)
    axes[dim] = axis[index]
    return axes


def _own_call(ctx: Propagation, op: Op) -> Any:
    """Return the gather that an earlier pruning put into a ragged module (a `PrunedCall`)."""
    constant, calls = (
        ctx.recording.constants.get(op.arg("index").index),
        ctx.earlier_choice(op.module, "autoprune_calls"),
    )
    return calls.gather_by(constant) if calls is not None and constant is not None else None


def find_ragged_modules(ctx: Propagation) -> frozenset[str]:
    """Return the modules that should be ragged.

    They are those with a shuffle whose ties made units larger than the shuffle alone needs, and those that
    split the same channels in equal parts.
    """
    classes = ctx.labels.classes()
    modules, trunk = set[str](), np.zeros(int(classes.max()) + 1, bool)
    for module, labels, parts in ctx.shuffles:
        tied = classes[labels[labels >= 0]]
        if len(tied) > parts * len(np.unique(tied)):
            modules.add(module)
            trunk[tied] = True
    for op, pieces in ctx.splits:
        if trunk[classes[pieces[0][pieces[0] >= 0]]].any():
            modules.add(ctx.recording.ops[op].module)
    return frozenset(m for m in modules if _has_lines_of_its_own(ctx, m))


def _has_lines_of_its_own(ctx: Propagation, module: str) -> bool:
    """Return whether a module runs once and has no reshape or split on a line of a module inside it."""
    ops = ctx.recording.ops
    inner_lines = {op.where for op in ops if op.module.startswith(f"{module}.") or not module}
    own_lines = {ops[n].where for n, _ in ctx.splits if ops[n].module == module}
    own_lines |= {op.where for op in ops if op.module == module and op.name in RESHAPES}
    return ctx.recording.calls[module] == 1 and (not module or not own_lines & inner_lines)
