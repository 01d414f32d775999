"""Rules of operators that move axes: reshape, permute, split, concatenate, pad, index.

The hard one is a reshape that splits a channel axis, such as attention heads or a channel shuffle. The
pieces must stay a rectangle, so only one of the new axes can shrink; positions along the others are tied.
The rule finds that axis by probing where each would end: an axis that is summed over, normalised or indexed
later cannot shrink, one that ends as the batch axis of a product (heads) should, otherwise the longest
does.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from autoprune.structure.labels import LabelArray
from autoprune.structure.propagate import Axes, Propagation, ReshapeSplit, Rule, fixed_axis
from autoprune.structure.recorder import Op, Ref
from autoprune.structure.rules.channel_shuffle import (
    RESHAPES,
    begins_ragged_shuffle,
    channel_shuffle,
    index_select,
    match_axes,
)


def reshape(ctx: Propagation, op: Op) -> Axes:
    """Match the axes of a reshape, and choose the axis that may shrink where channels split or merge."""
    x, out = op.inputs[0], op.outputs[0]
    assert out is not None
    before, after, axes = ctx.shape(x), ctx.shape(out), ctx.get(x)
    result: Axes = [None] * len(after)
    ctx.reshapes[op.module] += 1
    earlier = ctx.earlier_choice(op.module, "autoprune_split_axes", {}).get(ctx.reshapes[op.module])
    if 0 in before:
        return result
    for sources, targets in match_axes(before, after):
        tracked = _tracked(ctx, axes, sources)
        if not tracked:
            continue
        axis = axes[tracked[0]]
        assert axis is not None
        if earlier is not None and earlier < len(after) and after[earlier] == 1:
            ctx.freeze(axis, "the last unit of a split axis")
        elif len(sources) == len(targets) == 1:
            result[targets[0]] = axis
        elif len(sources) > 1 or not begins_ragged_shuffle(ctx, op, tracked[0], targets):
            chosen, labels = _regrouped(ctx, op, axis, (sources, targets), earlier)
            if chosen is not None:
                result[chosen] = labels
    if out.index in ctx.shuffle_results:
        dim, result[dim] = ctx.shuffle_results[out.index]
    return result


def _tracked(ctx: Propagation, axes: Axes, sources: list[int]) -> list[int]:
    """Return the axis of channels that may shrink among axes that become one, in a list.

    Of several axes of channels all but one freeze; a lookahead returns all of them.

    An axis that an earlier pruning let shrink does so again, or no axis does.
    """
    tracked = [d for d in sources if axes[d] is not None]
    op = ctx.recording.ops[ctx.position]
    ordinal = ctx.reshapes[op.module]
    earlier = ctx.earlier_choice(op.module, "autoprune_split_axes", {}).get(-ordinal)
    has_earlier = earlier is not None and sources[0] - 1 <= earlier <= sources[-1] + 1  # it may be 1 long now
    if ctx.is_lookahead or (not has_earlier and min(len(sources), len(tracked)) < 2):
        return tracked
    if has_earlier:
        shrinking = earlier if earlier in tracked else None
    else:
        labels = {d: a for d in tracked if (a := axes[d]) is not None}
        closed = [d for d, a in labels.items() if not ctx.labels.is_open(a)]
        verdicts = {d: ctx.look_ahead(op.inputs[0], d, labels[d], includes_present=True) for d in closed}
        free = [d for d in closed if not verdicts[d][0]] if len(closed) > 1 else closed
        shrinking = max(free, key=lambda d: (verdicts[d][1], len(axes[d])), default=None)  # type: ignore[arg-type]
    for d in tracked:
        if d != shrinking:
            ctx.freeze(axes[d], "merged with another axis of channels")
    if shrinking is None:
        return []
    ctx.kept_axes[ctx.position] = (ordinal, shrinking)
    return [shrinking]


def _regrouped(
    ctx: Propagation, op: Op, axis: LabelArray, run: tuple[list[int], list[int]], earlier: int | None
) -> tuple[int | None, LabelArray | None]:
    """Return the axis that may shrink where channels among axes become other axes, with its labels."""
    (sources, targets), x, out = run, op.inputs[0], op.outputs[0]
    assert out is not None
    ctx.splits_channels = True
    before, after = ctx.shape(x), ctx.shape(out)
    block = np.broadcast_to(
        axis.reshape([-1 if ctx.get(x)[d] is axis else 1 for d in sources]), [before[d] for d in sources]
    ).reshape([after[d] for d in targets])
    chosen, labels = _shrinking_axis(ctx, out, targets, block, earlier)
    if labels is not None and len(targets) == 1:
        ctx.reshape_merges.append((ctx.position, labels))
    return chosen, labels


def _shrinking_axis(
    ctx: Propagation, out: Ref, targets: list[int], block: LabelArray, earlier: int | None
) -> tuple[int | None, LabelArray | None]:
    """Return the one axis of the block that may shrink, with its labels, and tie the others' positions."""
    varying = [d for d in range(block.ndim) if (block != block.take([0], axis=d)).any()]
    if not varying:
        ctx.freeze(block.ravel(), "all its channels are tied into one")
        return None, None
    if len(varying) == 1:
        return targets[varying[0]], np.moveaxis(block, varying[0], 0).reshape(block.shape[varying[0]], -1)[
            :, 0
        ]
    if ctx.position in ctx.choices:
        options, stuck = [ctx.choices[ctx.position]], ""
    elif earlier in targets:
        options, stuck = [earlier], ""
    else:
        options, stuck = _ranked(ctx, out, targets, varying, block)
    if not options:
        ctx.freeze(block.ravel(), f"split into axes of which none may shrink{stuck}")
        return None, None
    chosen = options[0]
    rows = np.moveaxis(block, targets.index(chosen), 0).reshape(ctx.shape(out)[chosen], -1)
    labels = ctx.tie_rows(rows)
    ordinal = ctx.reshapes[ctx.recording.ops[ctx.position].module]
    ctx.reshape_splits.append(ReshapeSplit(ctx.position, ordinal, labels, tuple(options), chosen))
    return chosen, labels


def _ranked(
    ctx: Propagation, out: Ref, targets: list[int], varying: list[int], block: LabelArray
) -> tuple[list[int], str]:
    """Return the axes that may shrink, best first, and what stops the others."""
    if ctx.lookahead_depth >= 2:  # deep enough for fused projections split into parts and then into heads
        return [targets[max(varying, key=lambda d: ctx.shape(out)[targets[d]])]], ""
    alike = {d: np.moveaxis(block, d, 0).reshape(block.shape[d], -1)[:, 0] for d in varying}
    verdicts = {targets[d]: ctx.look_ahead(out, targets[d], alike[d]) for d in varying}
    free = [d for d, (stuck, _) in verdicts.items() if not stuck]
    reasons = "".join(f": {stuck}" for stuck, _ in verdicts.values() if stuck)
    return sorted(free, key=lambda d: (-verdicts[d][1], -ctx.shape(out)[d])), reasons


def permute(ctx: Propagation, op: Op) -> Axes:
    """Put the labels of the axes in another order."""
    axes = ctx.get(op.inputs[0])
    return [axes[d] for d in op.arg("dims")]


def transpose(ctx: Propagation, op: Op) -> Axes:
    """Swap the labels of two axes."""
    axes = list(ctx.get(op.inputs[0]))
    if len(axes) < 2:
        return axes
    a, b = (0, 1) if op.name == "t" else (op.arg("dim0"), op.arg("dim1"))
    axes[a], axes[b] = axes[b], axes[a]
    return axes


def squeeze(ctx: Propagation, op: Op) -> Axes:
    """Drop axes of length 1."""
    x = op.inputs[0]
    shape, axes, dims = ctx.shape(x), ctx.get(x), op.arg("dim")
    if dims is None:
        chosen = set(range(len(shape)))
    else:
        chosen = {d % len(shape) for d in ([dims] if isinstance(dims, int) else dims)} if shape else set()
    return [a for d, a in enumerate(axes) if not (d in chosen and shape[d] == 1)]


def unsqueeze(ctx: Propagation, op: Op) -> Axes:
    """Insert an axis of length 1."""
    axes = list(ctx.get(op.inputs[0]))
    axes.insert(op.arg("dim") % (len(axes) + 1), None)
    return axes


def expand(ctx: Propagation, op: Op) -> Axes:
    """Repeat axes of length 1 without a copy; the others keep their labels."""
    x, out = op.inputs[0], op.outputs[0]
    assert out is not None
    before, after, axes = ctx.shape(x), ctx.shape(out), ctx.get(x)
    lead = len(after) - len(before)
    return [
        axes[d - lead] if d >= lead and before[d - lead] == n else ctx.open_axis(d, n)
        for d, n in enumerate(after)
    ]


def repeat(ctx: Propagation, op: Op) -> Axes:
    """Tile the labels of axes a number of times."""
    x, times = op.inputs[0], op.arg("repeats")
    axes = ctx.get(x)
    lead = len(times) - len(axes)
    return [None] * lead + [
        None if a is None else np.tile(a, t) for a, t in zip(axes, times[lead:], strict=True)
    ]


def concatenate(ctx: Propagation, op: Op) -> Axes:
    """Put labels one after the other along one axis, and tie them along the others."""
    parts = [r for r in op.arg("tensors") if ctx.shape(r) != (0,)]
    rank = len(ctx.shape(parts[0]))
    dim = op.arg("dim", 0) % rank
    result: Axes = []
    for d in range(rank):
        pieces = [ctx.get(r)[d] for r in parts]
        if d != dim:
            result.append(ctx.join(pieces) if ctx.shape(parts[0])[d] > 1 else None)
        elif all(p is None for p in pieces):
            result.append(None)
        else:
            sizes = [ctx.shape(r)[d] for r in parts]
            result.append(
                np.concatenate(
                    [fixed_axis(n) if p is None else p for p, n in zip(pieces, sizes, strict=True)]
                )
            )
    return result


def stack(ctx: Propagation, op: Op) -> Axes:
    """Insert a new axis, and tie the parts along the others."""
    parts = op.arg("tensors")
    result = [ctx.join([ctx.get(r)[d] for r in parts]) for d in range(len(ctx.shape(parts[0])))]
    result.insert(op.arg("dim", 0) % (len(result) + 1), None)
    return result


def split(ctx: Propagation, op: Op) -> list[Axes]:
    """Tie equal parts of a channel axis to each other; unequal parts shrink by themselves.

    The lengths may be written in the program; `patches.reshape_patch` puts the pruned ones there.
    """
    x, dim = op.inputs[0], op.arg("dim", 0) % max(1, len(ctx.shape(op.inputs[0])))
    axes = ctx.get(x)
    outs = [r for r in op.outputs if r is not None]
    sizes = [ctx.shape(r)[dim] for r in outs]
    axis = axes[dim]
    pieces: Axes = [None] * len(outs)
    if axis is not None and len(outs) > 1:
        ctx.splits_channels = True
        if len(set(sizes)) == 1 and op.module not in ctx.ragged:
            pieces = [ctx.tie_rows(axis.reshape(len(outs), -1).T)] * len(outs)
        else:
            pieces = list(np.split(axis, np.cumsum(sizes)[:-1]))
        ctx.splits.append((ctx.position, tuple(p for p in pieces if p is not None)))
    elif axis is not None:
        pieces = [axis]
    return [[p if d == dim else a for d, a in enumerate(axes)] for p in pieces]


def glu(ctx: Propagation, op: Op) -> Axes:
    """Tie the first half of an axis to the second, which gates it."""
    axes = list(ctx.get(op.inputs[0]))
    dim = op.arg("dim", -1)
    axis = axes[dim]
    axes[dim] = None if axis is None else ctx.tie_rows(axis.reshape(2, -1).T)
    return axes


def unbind(ctx: Propagation, op: Op) -> list[Axes]:
    """Freeze the axis whose positions become tensors of their own."""
    axes = ctx.get(op.inputs[0])
    dim = op.arg("dim", 0) % len(axes)
    ctx.freeze(axes[dim], "taken apart by position")
    rest = [a for d, a in enumerate(axes) if d != dim]
    return [list(rest) for r in op.outputs if r is not None]


def select(ctx: Propagation, op: Op) -> Axes:
    """Freeze the axis that is read at one position."""
    axes = ctx.get(op.inputs[0])
    dim = op.arg("dim", 0) % len(axes)
    ctx.freeze(axes[dim], "one channel is taken by its position")
    return [a for d, a in enumerate(axes) if d != dim]


def slice_(ctx: Propagation, op: Op) -> Axes:
    """Tie or freeze the labels of an axis that is read in one stretch.

    The whole axis keeps its labels, one of a few equal parts ties them, and any other stretch freezes them.
    """
    x = op.inputs[0]
    axes, dim = list(ctx.get(x)), op.arg("dim", 0) % len(ctx.shape(x))
    axis, size = axes[dim], ctx.shape(x)[dim]
    if axis is None:
        return axes
    start, end, step = (op.arg(n) for n in ("start", "end", "step"))
    first, last, stride = slice(start, end, step or 1).indices(size)
    length = last - first
    if stride == 1 and length == size:
        return axes
    if stride == 1 and length > 0 and size % length == 0 and first % length == 0 and size // length <= 4:
        ctx.splits_channels = True
        axes[dim] = ctx.tie_rows(axis.reshape(-1, length).T)
    else:
        ctx.freeze(axis, "a stretch of channels at fixed positions")
        axes[dim] = None
    return axes


def as_strided(ctx: Propagation, op: Op) -> Axes:
    """Keep the labels where adaptive pooling changes the strides of (N, C, 1, ...) alone; else freeze."""
    x, out = op.inputs[0], op.outputs[0]
    assert out is not None
    shape, strides = ctx.shape(x), op.arg("stride")
    if ctx.shape(out) == shape and all(n == 1 for n in shape[2:]) and len(shape) > 2 and strides[1] == 1:
        return list(ctx.get(x))
    for axis in ctx.get(x):
        ctx.freeze(axis, "read with other strides")
    return [None] * len(ctx.shape(out))


def flip(ctx: Propagation, op: Op) -> Axes:
    """Reverse the order of positions."""
    axes = list(ctx.get(op.inputs[0]))
    for d in op.arg("dims"):
        axis = axes[d]
        axes[d] = None if axis is None else axis[::-1].copy()
    return axes


def roll(ctx: Propagation, op: Op) -> Axes:
    """Freeze axes whose positions are shifted: for channels the fixed number would have to change."""
    axes = list(ctx.get(op.inputs[0]))
    dims = op.arg("dims") or list(range(len(axes)))
    for d in dims:
        ctx.freeze(axes[d], "channels shifted by a fixed number")
        axes[d] = None
    return axes


def index(ctx: Propagation, op: Op) -> Axes:
    """Freeze axes whose positions are taken by a tensor of indices; the others keep their labels."""
    x, out = op.inputs[0], op.outputs[0]
    assert out is not None
    axes, chosen = ctx.get(x), list(op.arg("indices"))
    chosen += [None] * (len(axes) - len(chosen))
    indexed = [d for d, i in enumerate(chosen) if i is not None]
    for d in indexed:
        ctx.freeze(axes[d], "channels are taken by index")
    rest: Axes = [a for d, a in enumerate(axes) if d not in indexed]
    new = len(ctx.shape(out)) - len(rest)
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1)) if indexed else True
    at = indexed[0] if indexed and adjacent else 0
    return [*rest[:at], *[None] * new, *rest[at:]]


def pad(ctx: Propagation, op: Op) -> Axes:
    """Make labels for padded channels, so that a pruned module can pad fewer of them."""
    x, amounts = op.inputs[0], op.arg("pad")
    axes = list(ctx.get(x))
    for back in range(len(amounts) // 2):
        d, (left, right) = len(axes) - 1 - back, amounts[2 * back : 2 * back + 2]
        axis = axes[d]
        if axis is None or (left == 0 and right == 0):
            continue
        if left < 0 or right < 0:
            ctx.freeze(axis, "channels are cropped")
            axes[d] = None
        else:
            axes[d] = np.concatenate(
                [_edge(ctx, op, left, d, "left"), axis, _edge(ctx, op, right, d, "right")]
            )
    return axes


PADDING_OPS = frozenset({"slice", "constant_pad_nd", "alias", "avg_pool2d"})


def _edge(ctx: Propagation, op: Op, size: int, dim: int, side: Literal["left", "right"]) -> LabelArray:
    """Return fresh labels where a module only pads and can be replaced, and fixed labels elsewhere."""
    module = ctx.modules.get(op.module)
    is_alone = module is not None and op.module != "" and not any(True for _ in module.children())
    has_state = (
        module is None or any(True for _ in module.parameters()) or any(True for _ in module.buffers())
    )
    does = {o.name for o in ctx.recording.ops if o.module == op.module}
    if (
        ctx.is_lookahead
        or not is_alone
        or has_state
        or does - PADDING_OPS
        or ctx.recording.calls[op.module] != 1
    ):
        return fixed_axis(size)
    if size == 0:
        return fixed_axis(0)
    labels = ctx.labels.new(op.module, dim, size)
    ctx.labels.slots[-1].pad_op, ctx.labels.slots[-1].side = ctx.position, side
    return labels


def pixel_shuffle(ctx: Propagation, op: Op) -> Axes:
    """Tie the r^2 neighbours of one channel: (C r^2, H, W) -> (C, H r, W r), or the other way round."""
    x, out = op.inputs[0], op.outputs[0]
    assert out is not None
    axes = list(ctx.get(x))
    channels = axes[-3]
    for axis in axes[-2:]:
        ctx.freeze(axis, "a spatial axis")
    if channels is not None:
        before, after = ctx.shape(x)[-3], ctx.shape(out)[-3]
        if after < before:
            channels = ctx.tie_rows(channels.reshape(after, -1))
        else:
            channels = np.repeat(channels, after // before)
    return [*axes[:-3], channels, None, None]


def unfold(ctx: Propagation, op: Op) -> Axes:
    """Repeat every channel once for each position of the kernel (im2col)."""
    x, out = op.inputs[0], op.outputs[0]
    assert out is not None
    axes = ctx.get(x)
    channels = axes[-3]
    times = ctx.shape(out)[-2] // ctx.shape(x)[-3]
    return [*axes[:-3], None if channels is None else np.repeat(channels, times), None]


SHAPE_FAMILIES: dict[Rule, str] = {
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
