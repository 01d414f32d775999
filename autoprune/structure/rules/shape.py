"""Operators that move axes: reshape, permute, split, concatenate, pad, index.

The hard one is a reshape that splits a channel axis, such as attention heads or a channel shuffle. The pieces
must stay a rectangle, so only one of the new axes can shrink; positions along the others are tied. Which one
is found by probing where each would end: an axis that is summed over, normalised or indexed later cannot
shrink, one that ends as the batch axis of a product (heads) should, otherwise the longest does.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from autoprune.structure.channel_shuffle import (
    RESHAPES,
    begins_ragged_shuffle,
    channel_shuffle,
    index_select,
    matched,
)
from autoprune.structure.labels import LabelArray
from autoprune.structure.propagate import Axes, Handler, Site, Walk, fixed
from autoprune.structure.recorder import Op, Ref


def reshape(walk: Walk, op: Op) -> Axes:
    """Any change of shape that keeps the order of elements."""
    x, out = op.inputs[0], op.outputs[0]
    assert out is not None
    before, after, axes = walk.shape(x), walk.shape(out), walk.get(x)
    result: Axes = [None] * len(after)
    walk.reshapes[op.module] += 1
    stamped = walk.stamp(op.module, "autoprune_axes", {}).get(walk.reshapes[op.module])
    if 0 in before:
        return result
    for sources, targets in matched(before, after):
        tracked = _tracked(walk, axes, sources)
        if not tracked:
            continue
        axis = axes[tracked[0]]
        assert axis is not None
        if stamped is not None and stamped < len(after) and after[stamped] == 1:
            walk.freeze(axis, "the last unit of a split axis")
        elif len(sources) == len(targets) == 1:
            result[targets[0]] = axis
        elif len(sources) > 1 or not begins_ragged_shuffle(walk, op, tracked[0], targets):
            chosen, labels = _regrouped(walk, op, axis, (sources, targets), stamped)
            if chosen is not None:
                result[chosen] = labels
    if out.index in walk.arriving:
        dim, result[dim] = walk.arriving[out.index]
    return result


def _tracked(walk: Walk, axes: Axes, sources: list[int]) -> list[int]:
    """The axis of channels among those that become one, if there is one; of several, all but one stay.

    One that an earlier pruning let shrink does so again, or none.
    """
    tracked = [d for d in sources if axes[d] is not None]
    op = walk.recording.ops[walk.position]
    ordinal = walk.reshapes[op.module]
    stamped = walk.stamp(op.module, "autoprune_axes", {}).get(-ordinal)
    is_stamped = stamped is not None and sources[0] - 1 <= stamped <= sources[-1] + 1  # it may be 1 long now
    if walk.is_probe or (not is_stamped and min(len(sources), len(tracked)) < 2):
        return tracked
    if is_stamped:
        kept = stamped if stamped in tracked else None
    else:
        known = {d: a for d in tracked if (a := axes[d]) is not None}
        closed = [d for d, a in known.items() if not walk.labels.is_open(a)]
        verdicts = {d: walk.probe(op.inputs[0], d, known[d], includes_present=True) for d in closed}
        free = [d for d in closed if not verdicts[d][0]] if len(closed) > 1 else closed
        kept = max(free, key=lambda d: (verdicts[d][1], len(axes[d])), default=None)  # type: ignore[arg-type]
    for d in tracked:
        if d != kept:
            walk.freeze(axes[d], "merged with another axis of channels")
    if kept is None:
        return []
    walk.kept_axes[walk.position] = (ordinal, kept)
    return [kept]


def _regrouped(
    walk: Walk, op: Op, axis: LabelArray, run: tuple[list[int], list[int]], stamped: int | None
) -> tuple[int | None, LabelArray | None]:
    """Channels among axes that become other axes: the one that may shrink, with its labels."""
    (sources, targets), x, out = run, op.inputs[0], op.outputs[0]
    assert out is not None
    walk.is_risky = True
    before, after = walk.shape(x), walk.shape(out)
    block = np.broadcast_to(
        axis.reshape([-1 if walk.get(x)[d] is axis else 1 for d in sources]), [before[d] for d in sources]
    ).reshape([after[d] for d in targets])
    chosen, labels = _shrinking_axis(walk, out, targets, block, stamped)
    if labels is not None and len(targets) == 1:
        walk.merges.append((walk.position, labels))
    return chosen, labels


def _shrinking_axis(
    walk: Walk, out: Ref, targets: list[int], block: LabelArray, stamped: int | None
) -> tuple[int | None, LabelArray | None]:
    """The one axis of the block that may shrink, with its labels; the positions along the others are tied."""
    varying = [d for d in range(block.ndim) if (block != block.take([0], axis=d)).any()]
    if not varying:
        walk.freeze(block.ravel(), "all its channels are tied into one")
        return None, None
    if len(varying) == 1:
        return targets[varying[0]], np.moveaxis(block, varying[0], 0).reshape(block.shape[varying[0]], -1)[
            :, 0
        ]
    if walk.position in walk.choices:
        options, stuck = [walk.choices[walk.position]], ""
    elif stamped in targets:
        options, stuck = [stamped], ""
    else:
        options, stuck = _ranked(walk, out, targets, varying, block)
    if not options:
        walk.freeze(block.ravel(), f"split into axes of which none may shrink{stuck}")
        return None, None
    chosen = options[0]
    rows = np.moveaxis(block, targets.index(chosen), 0).reshape(walk.shape(out)[chosen], -1)
    labels = walk.tie_rows(rows)
    ordinal = walk.reshapes[walk.recording.ops[walk.position].module]
    walk.sites.append(Site(walk.position, ordinal, labels, tuple(options), chosen))
    return chosen, labels


def _ranked(
    walk: Walk, out: Ref, targets: list[int], varying: list[int], block: LabelArray
) -> tuple[list[int], str]:
    """The axes that may shrink, best first; and what stops the others."""
    if walk.probe_depth >= 2:  # deep enough for fused projections split into parts and then into heads
        return [targets[max(varying, key=lambda d: walk.shape(out)[targets[d]])]], ""
    alike = {d: np.moveaxis(block, d, 0).reshape(block.shape[d], -1)[:, 0] for d in varying}
    verdicts = {targets[d]: walk.probe(out, targets[d], alike[d]) for d in varying}
    free = [d for d, (stuck, _) in verdicts.items() if not stuck]
    reasons = "".join(f": {stuck}" for stuck, _ in verdicts.values() if stuck)
    return sorted(free, key=lambda d: (-verdicts[d][1], -walk.shape(out)[d])), reasons


def permute(walk: Walk, op: Op) -> Axes:
    """Axes in another order."""
    axes = walk.get(op.inputs[0])
    return [axes[d] for d in op.arg("dims")]


def transpose(walk: Walk, op: Op) -> Axes:
    """Two axes swapped."""
    axes = list(walk.get(op.inputs[0]))
    if len(axes) < 2:
        return axes
    a, b = (0, 1) if op.name == "t" else (op.arg("dim0"), op.arg("dim1"))
    axes[a], axes[b] = axes[b], axes[a]
    return axes


def squeeze(walk: Walk, op: Op) -> Axes:
    """Axes of length 1 dropped."""
    x = op.inputs[0]
    shape, axes, dims = walk.shape(x), walk.get(x), op.arg("dim")
    if dims is None:
        chosen = set(range(len(shape)))
    else:
        chosen = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)} if shape else set()
    return [a for d, a in enumerate(axes) if not (d in chosen and shape[d] == 1)]


def unsqueeze(walk: Walk, op: Op) -> Axes:
    """An axis of length 1 inserted."""
    axes = list(walk.get(op.inputs[0]))
    axes.insert(op.arg("dim") % (len(axes) + 1), None)
    return axes


def expand(walk: Walk, op: Op) -> Axes:
    """Axes of length 1 repeated without a copy; the others go on."""
    x, out = op.inputs[0], op.outputs[0]
    assert out is not None
    before, after, axes = walk.shape(x), walk.shape(out), walk.get(x)
    lead = len(after) - len(before)
    return [
        axes[d - lead] if d >= lead and before[d - lead] == n else walk.open_axis(d, n)
        for d, n in enumerate(after)
    ]


def repeat(walk: Walk, op: Op) -> Axes:
    """Axes tiled a number of times."""
    x, times = op.inputs[0], op.arg("repeats")
    axes = walk.get(x)
    lead = len(times) - len(axes)
    return [None] * lead + [
        None if a is None else np.tile(a, t) for a, t in zip(axes, times[lead:], strict=True)
    ]


def concatenate(walk: Walk, op: Op) -> Axes:
    """Labels one after the other along one axis, tied along the others."""
    parts = [r for r in op.arg("tensors") if walk.shape(r) != (0,)]
    rank = len(walk.shape(parts[0]))
    dim = op.arg("dim", 0) % rank
    result: Axes = []
    for d in range(rank):
        pieces = [walk.get(r)[d] for r in parts]
        if d != dim:
            result.append(walk.join(pieces) if walk.shape(parts[0])[d] > 1 else None)
        elif all(p is None for p in pieces):
            result.append(None)
        else:
            sizes = [walk.shape(r)[d] for r in parts]
            result.append(
                np.concatenate([fixed(n) if p is None else p for p, n in zip(pieces, sizes, strict=True)])
            )
    return result


def stack(walk: Walk, op: Op) -> Axes:
    """A new axis; the others tie."""
    parts = op.arg("tensors")
    result = [walk.join([walk.get(r)[d] for r in parts]) for d in range(len(walk.shape(parts[0])))]
    result.insert(op.arg("dim", 0) % (len(result) + 1), None)
    return result


def split(walk: Walk, op: Op) -> list[Axes]:
    """Equal parts of a channel axis tie to each other; unequal ones shrink by themselves.

    The lengths may be written in the program; `loose` puts the pruned ones there.
    """
    x, dim = op.inputs[0], op.arg("dim", 0) % max(1, len(walk.shape(op.inputs[0])))
    axes = walk.get(x)
    outs = [r for r in op.outputs if r is not None]
    sizes = [walk.shape(r)[dim] for r in outs]
    axis = axes[dim]
    pieces: Axes = [None] * len(outs)
    if axis is not None and len(outs) > 1:
        walk.is_risky = True
        if len(set(sizes)) == 1 and op.module not in walk.ragged:
            pieces = [walk.tie_rows(axis.reshape(len(outs), -1).T)] * len(outs)
        else:
            pieces = list(np.split(axis, np.cumsum(sizes)[:-1]))
        walk.splits.append((walk.position, tuple(p for p in pieces if p is not None)))
    elif axis is not None:
        pieces = [axis]
    return [[p if d == dim else a for d, a in enumerate(axes)] for p in pieces]


def glu(walk: Walk, op: Op) -> Axes:
    """The first half of an axis gated by the second: the halves tie."""
    axes = list(walk.get(op.inputs[0]))
    dim = op.arg("dim", -1)
    axis = axes[dim]
    axes[dim] = None if axis is None else walk.tie_rows(axis.reshape(2, -1).T)
    return axes


def unbind(walk: Walk, op: Op) -> list[Axes]:
    """Every position of one axis becomes a tensor of its own."""
    axes = walk.get(op.inputs[0])
    dim = op.arg("dim", 0) % len(axes)
    walk.freeze(axes[dim], "taken apart by position")
    rest = [a for d, a in enumerate(axes) if d != dim]
    return [list(rest) for r in op.outputs if r is not None]


def select(walk: Walk, op: Op) -> Axes:
    """One position of one axis."""
    axes = walk.get(op.inputs[0])
    dim = op.arg("dim", 0) % len(axes)
    walk.freeze(axes[dim], "one channel is taken by its position")
    return [a for d, a in enumerate(axes) if d != dim]


def slice_(walk: Walk, op: Op) -> Axes:
    """A stretch of one axis: all of it, or one of a few equal parts (they tie), or a fixed one (it stays)."""
    x = op.inputs[0]
    axes, dim = list(walk.get(x)), op.arg("dim", 0) % len(walk.shape(x))
    axis, size = axes[dim], walk.shape(x)[dim]
    if axis is None:
        return axes
    start, end, step = (op.arg(n) for n in ("start", "end", "step"))
    first, last, stride = slice(start, end, step or 1).indices(size)
    length = last - first
    if stride == 1 and length == size:
        return axes
    if stride == 1 and length > 0 and size % length == 0 and first % length == 0 and size // length <= 4:
        walk.is_risky = True
        axes[dim] = walk.tie_rows(axis.reshape(-1, length).T)
    else:
        walk.freeze(axis, "a stretch of channels at fixed positions")
        axes[dim] = None
    return axes


def as_strided(walk: Walk, op: Op) -> Axes:
    """Only what adaptive pooling does: other strides for the same (N, C, 1, ...) tensor."""
    x, out = op.inputs[0], op.outputs[0]
    assert out is not None
    shape, strides = walk.shape(x), op.arg("stride")
    if walk.shape(out) == shape and all(n == 1 for n in shape[2:]) and len(shape) > 2 and strides[1] == 1:
        return list(walk.get(x))
    for axis in walk.get(x):
        walk.freeze(axis, "read with other strides")
    return [None] * len(walk.shape(out))


def flip(walk: Walk, op: Op) -> Axes:
    """The order of positions reversed."""
    axes = list(walk.get(op.inputs[0]))
    for d in op.arg("dims"):
        axis = axes[d]
        axes[d] = None if axis is None else axis[::-1].copy()
    return axes


def roll(walk: Walk, op: Op) -> Axes:
    """Positions shifted by a fixed number: of channels, that number would have to change."""
    axes = list(walk.get(op.inputs[0]))
    dims = op.arg("dims") or list(range(len(axes)))
    for d in dims:
        walk.freeze(axes[d], "channels shifted by a fixed number")
        axes[d] = None
    return axes


def index(walk: Walk, op: Op) -> Axes:
    """Positions taken by a tensor of indices: those axes stay, the others go on."""
    x, out = op.inputs[0], op.outputs[0]
    assert out is not None
    axes, chosen = walk.get(x), list(op.arg("indices"))
    chosen += [None] * (len(axes) - len(chosen))
    used = [d for d, i in enumerate(chosen) if i is not None]
    for d in used:
        walk.freeze(axes[d], "channels are taken by index")
    rest: Axes = [a for d, a in enumerate(axes) if d not in used]
    new = len(walk.shape(out)) - len(rest)
    adjacent = used == list(range(used[0], used[-1] + 1)) if used else True
    at = used[0] if used and adjacent else 0
    return [*rest[:at], *[None] * new, *rest[at:]]


def pad(walk: Walk, op: Op) -> Axes:
    """Constant padding: padded channels are positions of their own that a pruned module can pad fewer of."""
    x, amounts = op.inputs[0], op.arg("pad")
    axes = list(walk.get(x))
    for back in range(len(amounts) // 2):
        d, (left, right) = len(axes) - 1 - back, amounts[2 * back : 2 * back + 2]
        axis = axes[d]
        if axis is None or (left == 0 and right == 0):
            continue
        if left < 0 or right < 0:
            walk.freeze(axis, "channels are cropped")
            axes[d] = None
        else:
            axes[d] = np.concatenate(
                [_edge(walk, op, left, d, "left"), axis, _edge(walk, op, right, d, "right")]
            )
    return axes


PADDING_OPS = frozenset({"slice", "constant_pad_nd", "alias", "avg_pool2d"})


def _edge(walk: Walk, op: Op, size: int, dim: int, side: Literal["left", "right"]) -> LabelArray:
    """Fresh labels where a module of its own does the padding and can be replaced; fixed ones elsewhere."""
    module = walk.modules.get(op.module)
    is_alone = module is not None and op.module != "" and not any(True for _ in module.children())
    has_state = (
        module is None or any(True for _ in module.parameters()) or any(True for _ in module.buffers())
    )
    does = {o.name for o in walk.recording.ops if o.module == op.module}
    if (
        walk.is_probe
        or not is_alone
        or has_state
        or does - PADDING_OPS
        or walk.recording.calls[op.module] != 1
    ):
        return fixed(size)
    if size == 0:
        return fixed(0)
    labels = walk.labels.new(op.module, dim, size)
    walk.labels.slots[-1].pad_op, walk.labels.slots[-1].side = walk.position, side
    return labels


def pixel_shuffle(walk: Walk, op: Op) -> Axes:
    """(C r^2, H, W) -> (C, H r, W r): r^2 neighbours make one channel, and the other way round."""
    x, out = op.inputs[0], op.outputs[0]
    assert out is not None
    axes = list(walk.get(x))
    channels = axes[-3]
    for axis in axes[-2:]:
        walk.freeze(axis, "a spatial axis")
    if channels is not None:
        before, after = walk.shape(x)[-3], walk.shape(out)[-3]
        if after < before:
            channels = walk.tie_rows(channels.reshape(after, -1))
        else:
            channels = np.repeat(channels, after // before)
    return [*axes[:-3], channels, None, None]


def unfold(walk: Walk, op: Op) -> Axes:
    """im2col: every channel appears once for each position of the kernel."""
    x, out = op.inputs[0], op.outputs[0]
    assert out is not None
    axes = walk.get(x)
    channels = axes[-3]
    times = walk.shape(out)[-2] // walk.shape(x)[-3]
    return [*axes[:-3], None if channels is None else np.repeat(channels, times), None]


SHAPE_FAMILIES: dict[Handler, str] = {
    reshape: " ".join(RESHAPES),
    permute: "permute",
    transpose: "transpose t swapaxes",
    squeeze: "squeeze",
    unsqueeze: "unsqueeze",
    expand: "expand",
    repeat: "repeat",
    concatenate: "cat",
    stack: "stack",
    split: "split split_with_sizes unsafe_split unsafe_split_with_sizes chunk unsafe_chunk",
    glu: "glu",
    channel_shuffle: "native_channel_shuffle channel_shuffle",
    unbind: "unbind",
    select: "select",
    slice_: "slice",
    as_strided: "as_strided",
    flip: "flip",
    roll: "roll",
    index: "index",
    index_select: "index_select",
    pad: "constant_pad_nd",
    pixel_shuffle: "pixel_shuffle pixel_unshuffle",
    unfold: "im2col",
}

SHAPE_TABLE: dict[str, Handler] = {n: f for f, names in SHAPE_FAMILIES.items() for n in names.split()}
