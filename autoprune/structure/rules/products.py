"""Rules of operators that multiply and sum over channels: convolutions, products, attention, embeddings.

The axis that is summed over ties on both sides, as a channel that is removed must be removed in the weight
that reads it; the other axes of the weight make new channels. Only these operators have multiply-adds.
"""

from __future__ import annotations

import numpy as np

from autoprune.structure.labels import LabelArray
from autoprune.structure.propagate import Axes, Propagation, Rule, UnitCount, only_first, untracked
from autoprune.structure.recorder import Op, Ref


def convolution(ctx: Propagation, op: Op) -> Axes:
    """Tie the input's channels to the weight's second axis, which reads them; the first makes new ones."""
    x, weight, bias = op.arg("input"), op.arg("weight"), op.arg("bias")
    groups, transposed = op.arg("groups"), op.arg("transposed")
    out = op.outputs[0]
    assert out is not None
    for axis in ctx.get(weight)[2:]:
        ctx.freeze(axis, "a kernel's extent", is_structural=True)
    for axis in ctx.get(x)[2:]:
        ctx.freeze(axis, "convolved over")
    _convolution_cost(ctx, op, x if transposed else out)
    if groups > 1 or ctx.earlier_choice(ctx.owner(weight), "autoprune_conv_groups"):
        new_channels = _grouped_transposed(ctx, op) if transposed else _grouped(ctx, op)
    else:
        reads, makes = (0, 1) if transposed else (1, 0)
        ctx.contract((x, 1), (weight, reads))
        new_channels = ctx.get(weight)[makes]
    ctx.mark(new_channels, "out")
    if bias is not None:
        ctx.mark(ctx.get(bias)[0], "out")
        new_channels = ctx.join([new_channels, ctx.get(bias)[0]])
    return [ctx.get(x)[0], new_channels, *[None] * (len(ctx.shape(out)) - 2)]


def _convolution_cost(ctx: Propagation, op: Op, over: Ref) -> None:
    weight = op.arg("weight")
    kernel = ctx.shape(weight)
    positions = int(np.prod(ctx.shape(over)[2:], dtype=np.int64) * np.prod(kernel[2:], dtype=np.int64))
    axes, x = ctx.get(weight), op.arg("input")
    batch = (ctx.shape(x)[0], ctx.get(x)[0])  # heads may be folded into it
    ctx.cost(positions, [(kernel[0], axes[0]), (kernel[1], axes[1]), batch])


def _grouped(ctx: Propagation, op: Op) -> LabelArray | None:
    """Tie whole groups, or equal positions inside every group, whichever leaves more units.

    An earlier pruning's choice stands (`autoprune_conv_groups` on the module), so that plans compose.
    """
    x, weight, groups = op.arg("input"), op.arg("weight"), op.arg("groups")
    read, makes = ctx.get(x)[1], ctx.get(weight)[0]
    per_in, per_out = ctx.shape(weight)[1], ctx.shape(weight)[0] // groups
    owner = ctx.owner(weight)
    earlier = ctx.earlier_choice(owner, "autoprune_conv_groups")
    whole = earlier == "whole" if earlier else groups >= max(per_in, per_out) or per_in == 1
    if max(per_in, per_out) > 1 or earlier:
        ctx.conv_group_policies[owner] = "whole" if whole else "positions"
    if not whole:
        first = ctx.tie_rows(read.reshape(groups, per_in).T) if read is not None else None
        ctx.mark(ctx.get(weight)[1], "in")
        ctx.join([first, ctx.get(weight)[1]], "reads an axis of fixed length")
        return np.tile(ctx.tie_rows(makes.reshape(groups, per_out).T), groups) if makes is not None else None
    ctx.freeze(ctx.get(weight)[1], "a group's own width", is_structural=True)
    if read is None or makes is None:
        axis = ctx.join([read, makes]) if not ctx.is_lookahead else (read if makes is None else makes)
        return None if axis is None else np.repeat(axis.reshape(groups, -1)[:, 0], per_out)
    rows = np.concatenate([read.reshape(groups, per_in), makes.reshape(groups, per_out)], axis=1)
    units = ctx.tie_rows(rows)
    ctx.unit_counts += [
        UnitCount(owner, n, units) for n in ctx.integer_attributes(owner, ("groups", "channels"), groups)
    ]
    return np.repeat(units, per_out)


def _grouped_transposed(ctx: Propagation, op: Op) -> LabelArray | None:
    """Tie whole groups of a weight (in, out per group)."""
    x, weight, groups = op.arg("input"), op.arg("weight"), op.arg("groups")
    ctx.freeze(ctx.get(weight)[1], "a group's own width", is_structural=True)
    axis = ctx.join([ctx.get(x)[1], ctx.get(weight)[0]])
    if axis is None:
        return None
    units = ctx.tie_rows(axis.reshape(groups, -1))
    owner = ctx.owner(weight)
    ctx.unit_counts += [
        UnitCount(owner, n, units) for n in ctx.integer_attributes(owner, ("groups",), groups)
    ]
    return np.repeat(units, ctx.shape(weight)[1])


def matrix_product(ctx: Propagation, op: Op) -> Axes:
    """Tie the inner axes, and the batch axes, of (..., n, k) x (..., k, m) with an optional addend."""
    names = ("batch1", "batch2") if op.name == "baddbmm" else ("mat1", "mat2")
    left, right = (op.arg(n, op.arg(s)) for n, s in zip(names, ("self", "mat2"), strict=True))
    a, b = ctx.get(left), ctx.get(right)
    shapes = ctx.shape(left), ctx.shape(right)
    ctx.contract((left, len(a) - 1), (right, len(b) - 2))
    summed = a[-1] if op.name == "bmm" else None
    if summed is not None and (ctx.is_weight(left) or ctx.is_weight(right)):
        ctx.two_unit_axes.append(summed)  # where one unit is left, einsum multiplies position by position
    for ref, axis in ((left, len(a) - 2), (right, len(b) - 1)):
        if ctx.is_weight(ref):
            ctx.mark(ctx.get(ref)[axis], "out")
    batch = _batch_axes(ctx, a[:-2], b[:-2])
    sizes = [
        *zip(shapes[0][:-2], batch, strict=True),
        (shapes[0][-2], a[-2]),
        (shapes[0][-1], a[-1] if a[-1] is not None else b[-2]),
    ]
    ctx.cost(1, [*sizes, (shapes[1][-1], b[-1])])
    result: Axes = [*batch, a[-2], b[-1]]
    return _with_addend(ctx, op, result) if op.name in ("addmm", "baddbmm") else result


def _batch_axes(ctx: Propagation, *operands: Axes) -> Axes:
    batch = [ctx.join(parts) for parts in zip(*operands, strict=True)]
    ctx.batch_uses += sum(a is not None for a in batch)
    return batch


def _with_addend(ctx: Propagation, op: Op, result: Axes) -> Axes:
    addend = op.arg("self")
    axes, shape = ctx.get(addend), ctx.shape(addend)
    for back in range(1, len(shape) + 1):
        if shape[-back] > 1:
            if ctx.is_weight(addend):
                ctx.mark(axes[-back], "out")
            result[-back] = ctx.join([result[-back], axes[-back]])
    return result


def matrix_vector(ctx: Propagation, op: Op) -> Axes:
    """Tie the summed axes of (n, k) x (k,)."""
    matrix, vector = op.arg("self", op.arg("mat")), op.arg("vec")
    ctx.contract((matrix, 1), (vector, 0))
    return [ctx.get(matrix)[0]]


def bilinear(ctx: Propagation, op: Op) -> Axes:
    """Tie both inputs of `nn.Bilinear` to the weight: (..., i) x (o, i, j) x (..., j) -> (..., o)."""
    left, weight, right = op.arg("i1"), op.arg("i2"), op.arg("i3")
    if (op.arg("expand1"), op.arg("expand2"), op.arg("sumdim")) != ([1, 3], [0], [2, 3]):
        for axis in (a for ref in op.inputs for a in ctx.get(ref)):
            ctx.freeze(axis, f"operator {op.name!r} is not known to keep channels apart")
        return untracked(ctx, op)[0]
    ctx.contract((left, 1), (weight, 1))
    ctx.contract((right, 1), (weight, 2))
    new_channels = ctx.get(weight)[0]
    ctx.mark(new_channels, "out")
    return [ctx.join([ctx.get(left)[0], ctx.get(right)[0]]), new_channels]


def attention(ctx: Propagation, op: Op) -> list[Axes]:
    """Tie batch and head axes of fused scaled dot-product attention; the value's width goes on."""
    query, key, value = (op.arg(n) for n in ("query", "key", "value"))
    q, k, v = ctx.get(query), ctx.get(key), ctx.get(value)
    for axis in (*q[-2:], *k[-2:], v[-2]):
        ctx.freeze(axis, "summed over in attention")
    mask = op.arg("attn_mask", op.arg("attn_bias"))
    batch = _batch_axes(ctx, q[:-2], k[:-2], v[:-2])
    if isinstance(mask, Ref):
        _tie_mask(ctx, mask, batch)
    lead = list(zip(ctx.shape(query)[:-2], batch, strict=True))
    length, keys, width = ctx.shape(query)[-2], ctx.shape(key)[-2], ctx.shape(query)[-1]
    ctx.cost(length * keys * width, lead)
    ctx.cost(length * keys, [*lead, (ctx.shape(value)[-1], v[-1])])
    first: Axes = [*batch, None, v[-1]]
    return only_first(ctx, op, first)


def _tie_mask(ctx: Propagation, mask: Ref, batch: Axes) -> None:
    shape, axes = ctx.shape(mask), ctx.get(mask)
    for index in range(len(batch)):
        at = index - len(batch) - 2 + len(shape)
        if at >= 0 and shape[at] > 1:
            batch[index] = ctx.join([batch[index], axes[at]])
    for axis in axes[-2:]:
        ctx.freeze(axis, "added to attention over positions")


def embedding(ctx: Propagation, op: Op) -> Axes:
    """Freeze the rows, which are looked up by index; the width goes on."""
    weight, indices = op.arg("weight"), op.arg("indices")
    rows, width = ctx.get(weight)
    ctx.freeze(rows, "rows are looked up by index", is_structural=True)
    ctx.mark(width, "out")
    return [*[None] * len(ctx.shape(indices)), width]


def embedding_bag(ctx: Propagation, op: Op) -> list[Axes]:
    """Freeze the rows, which are looked up and then summed, averaged or compared; the width goes on."""
    weight = op.arg("weight")
    rows, width = ctx.get(weight)
    ctx.freeze(rows, "rows are looked up by index", is_structural=True)
    ctx.mark(width, "out")
    return only_first(ctx, op, [None, width])


PRODUCT_FAMILIES: dict[Rule, str] = {
    convolution: "convolution convolution_overrideable _convolution mkldnn_convolution",
    matrix_product: "mm addmm bmm baddbmm",
    matrix_vector: "mv",
    bilinear: "_trilinear",
    attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention",
    embedding: "embedding",
    embedding_bag: "_embedding_bag _embedding_bag_forward_only",
}
