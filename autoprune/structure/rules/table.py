"""The operator table: what each family of operators does to labels.

One small function per family. It gets the propagation (`ctx`) and the operator, ties or freezes what must be,
and returns the axes of the outputs. An operator that is not here freezes what it touches: unknown operators
cost prunable channels, never correctness. To teach a new one, write its function and enter its names below
(docs/structure.md shows how); operators that only move axes are in `shape_ops`, those that work over space in
`space_ops`.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from autoprune.structure.labels import BEHIND_LAYER_NORM, LabelArray
from autoprune.structure.propagate import Axes, Handler, Propagation, UnitCount
from autoprune.structure.recorder import Op, Ref
from autoprune.structure.rules.shape import SHAPE_TABLE
from autoprune.structure.rules.space import SPACE_TABLE


def unknown(ctx: Propagation, op: Op) -> list[Axes]:
    """Freeze every axis of every input."""
    for ref in op.inputs:
        for axis in ctx.get(ref):
            ctx.freeze(axis, f"operator {op.name!r} is not known to keep channels apart")
    return _untracked(ctx, op)


def _untracked(ctx: Propagation, op: Op) -> list[Axes]:
    return [[None] * len(ctx.shape(r)) for r in op.outputs if r is not None]


def _first(ctx: Propagation, op: Op, axes: Axes) -> list[Axes]:
    """Axes for the first output; the others are statistics that nothing reads."""
    return [axes, *_untracked(ctx, op)[1:]]


def constant(ctx: Propagation, op: Op) -> list[Axes]:
    """A result that does not depend on the values of its inputs."""
    return _untracked(ctx, op)


def uniform(ctx: Propagation, op: Op) -> list[Axes]:
    """A fresh tensor with the same value everywhere."""
    shapes = [ctx.shape(r) for r in op.outputs if r is not None]
    return [[ctx.open_axis(d, n) for d, n in enumerate(shape)] for shape in shapes]


def pointwise(ctx: Propagation, op: Op) -> Axes:
    """Position by position, with broadcasting: axes of the same length tie."""
    out = op.outputs[0]
    assert out is not None
    shape = ctx.shape(out)
    operands = [r for r in op.inputs if len(ctx.shape(r)) > 0]
    if op.name == "copy":
        operands = operands[:2]
    axes: Axes = []
    for axis, size in enumerate(shape):
        parts = []
        for ref in operands:
            at = axis - len(shape) + len(ctx.shape(ref))
            if at >= 0 and ctx.shape(ref)[at] == size:
                parts.append(ctx.get(ref)[at])
        axes.append(ctx.join(parts) if size > 1 else None)
    return axes


def like(ctx: Propagation, op: Op) -> Axes:
    """A fresh tensor of the same shape."""
    return list(ctx.get(op.inputs[0]))


def convolution(ctx: Propagation, op: Op) -> Axes:
    """Reads the input's channels with the weight's second axis, makes new ones from the first."""
    x, weight, bias = op.arg("input"), op.arg("weight"), op.arg("bias")
    groups, transposed = op.arg("groups"), op.arg("transposed")
    out = op.outputs[0]
    assert out is not None
    for axis in ctx.get(weight)[2:]:
        ctx.freeze(axis, "a kernel's extent", is_structural=True)
    for axis in ctx.get(x)[2:]:
        ctx.freeze(axis, "convolved over")
    _convolution_cost(ctx, op, x if transposed else out)
    if groups > 1 or ctx.earlier_choice(_owner(ctx, weight), "autoprune_conv_groups"):
        made = _grouped_transposed(ctx, op) if transposed else _grouped(ctx, op)
    else:
        reads, makes = (0, 1) if transposed else (1, 0)
        ctx.contract((x, 1), (weight, reads))
        made = ctx.get(weight)[makes]
    ctx.mark(made, "out")
    if bias is not None:
        ctx.mark(ctx.get(bias)[0], "out")
        made = ctx.join([made, ctx.get(bias)[0]])
    return [ctx.get(x)[0], made, *[None] * (len(ctx.shape(out)) - 2)]


def _owner(ctx: Propagation, weight: Ref) -> str:
    """Name of the module that holds a parameter."""
    return ctx.recording.parameters.get(weight.index, "").rpartition(".")[0]


def _convolution_cost(ctx: Propagation, op: Op, over: Ref) -> None:
    weight = op.arg("weight")
    kernel = ctx.shape(weight)
    positions = int(np.prod(ctx.shape(over)[2:], dtype=np.int64) * np.prod(kernel[2:], dtype=np.int64))
    axes, x = ctx.get(weight), op.arg("input")
    batch = (ctx.shape(x)[0], ctx.get(x)[0])  # heads may be folded into it
    ctx.cost(positions, [(kernel[0], axes[0]), (kernel[1], axes[1]), batch])


def _grouped(ctx: Propagation, op: Op) -> LabelArray | None:
    """Whole groups go, or equal positions inside every group, whichever leaves more units.

    An earlier pruning's choice stands (`autoprune_grouped` on the module), so that plans compose.
    """
    x, weight, groups = op.arg("input"), op.arg("weight"), op.arg("groups")
    read, makes = ctx.get(x)[1], ctx.get(weight)[0]
    per_in, per_out = ctx.shape(weight)[1], ctx.shape(weight)[0] // groups
    owner = _owner(ctx, weight)
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
        UnitCount(owner, n, units) for n in _counters(ctx, owner, groups, ("groups", "channels"))
    ]
    return np.repeat(units, per_out)


def _counters(ctx: Propagation, owner: str, count: int | None, words: tuple[str, ...]) -> list[str]:
    """Integer attributes of a module named with one of the words, that hold `count` if it is given."""
    module = ctx.modules.get(owner)
    values = vars(module) if module is not None else {}
    numbers = {n: v for n, v in values.items() if type(v) is int and any(w in n for w in words)}
    return [n for n, v in numbers.items() if count is None or v == count]


def _grouped_transposed(ctx: Propagation, op: Op) -> LabelArray | None:
    """Whole groups go: the weight is (in, out per group)."""
    x, weight, groups = op.arg("input"), op.arg("weight"), op.arg("groups")
    ctx.freeze(ctx.get(weight)[1], "a group's own width", is_structural=True)
    axis = ctx.join([ctx.get(x)[1], ctx.get(weight)[0]])
    if axis is None:
        return None
    units = ctx.tie_rows(axis.reshape(groups, -1))
    owner = _owner(ctx, weight)
    ctx.unit_counts += [UnitCount(owner, n, units) for n in _counters(ctx, owner, groups, ("groups",))]
    return np.repeat(units, ctx.shape(weight)[1])


def matrix_product(ctx: Propagation, op: Op) -> Axes:
    """(..., n, k) x (..., k, m), with an optional addend: the inner axes tie, batch axes tie."""
    names = ("batch1", "batch2") if op.name == "baddbmm" else ("mat1", "mat2")
    left, right = (op.arg(n, op.arg(s)) for n, s in zip(names, ("self", "mat2"), strict=True))
    a, b = ctx.get(left), ctx.get(right)
    shapes = ctx.shape(left), ctx.shape(right)
    ctx.contract((left, len(a) - 1), (right, len(b) - 2))
    summed = a[-1] if op.name == "bmm" else None
    if summed is not None and (ctx.is_weight(left) or ctx.is_weight(right)):
        ctx.two_unit_axes.append(summed)  # einsum multiplies position by position where one is left
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
    """(n, k) x (k,)."""
    matrix, vector = op.arg("self", op.arg("mat")), op.arg("vec")
    ctx.contract((matrix, 1), (vector, 0))
    return [ctx.get(matrix)[0]]


def attention(ctx: Propagation, op: Op) -> list[Axes]:
    """Fused scaled dot-product attention: batch and head axes tie, the value's width goes on."""
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
    return _first(ctx, op, first)


def _tie_mask(ctx: Propagation, mask: Ref, batch: Axes) -> None:
    shape, axes = ctx.shape(mask), ctx.get(mask)
    for index in range(len(batch)):
        at = index - len(batch) - 2 + len(shape)
        if at >= 0 and shape[at] > 1:
            batch[index] = ctx.join([batch[index], axes[at]])
    for axis in axes[-2:]:
        ctx.freeze(axis, "added to attention over positions")


def batch_norm(ctx: Propagation, op: Op) -> list[Axes]:
    """Each channel on its own: scale, shift and statistics follow the channel axis."""
    x = op.arg("input")
    axes = list(ctx.get(x))
    uses_batch = bool(op.arg("training", op.arg("use_input_stats", False))) or op.arg("running_mean") is None
    for index, axis in enumerate(axes):
        if index != 1 and uses_batch:
            ctx.freeze(axis, "normalised over")
            axes[index] = None
    for name in ("weight", "bias", "running_mean", "running_var"):
        ref = op.arg(name)
        if ref is not None:
            axes[1] = ctx.join([axes[1], ctx.get(ref)[0]])
    if op.arg("weight") is None and op.arg("running_mean") is None and axes[1] is not None:
        for name in _counters(ctx, op.module, None, ("num_features",)):
            per = len(axes[1]) // int(getattr(ctx.modules[op.module], name))
            ctx.unit_counts.append(UnitCount(op.module, name, axes[1], per))
    return _first(ctx, op, axes)


def weight_norm(ctx: Propagation, op: Op) -> list[Axes]:
    """Direction over its norm, times a length (Salimans & Kingma 2016): the axes of the norm stay."""
    direction, length, dim = op.arg("v"), op.arg("g"), op.arg("dim", 0)
    axes = list(ctx.get(direction))
    for index, axis in enumerate(axes):
        if index != dim:
            ctx.freeze(axis, "weight norm over it")
            axes[index] = None
    axes[dim] = ctx.join([axes[dim], ctx.get(length)[dim]])
    return _first(ctx, op, axes)


def group_norm(ctx: Propagation, op: Op) -> list[Axes]:
    """Whole normalisation groups go, because statistics over the kept part of one would differ."""
    x, groups = op.arg("input"), op.arg("group", op.arg("num_groups"))
    axes = list(ctx.get(x))
    for index, axis in enumerate(axes):
        if index > 1:
            ctx.freeze(axis, "normalised over")
    channels = axes[1]
    if groups == 1:
        for labels in (channels, *[ctx.get(op.arg(n))[0] for n in ("weight", "bias") if op.arg(n)]):
            ctx.freeze(labels, "normalised over all channels")
        channels = None
    elif channels is not None:
        units = ctx.tie_rows(channels.reshape(groups, -1))
        channels = np.repeat(units, ctx.shape(x)[1] // groups)
        owners = {_owner(ctx, op.arg(n)) for n in ("weight", "bias") if op.arg(n)}
        for owner in sorted(owners | {op.module}):
            ctx.unit_counts += [
                UnitCount(owner, a, units) for a in _counters(ctx, owner, groups, ("num_groups",))
            ]
    for name in ("weight", "bias"):
        if op.arg(name) is not None and groups > 1:
            channels = ctx.join([channels, ctx.get(op.arg(name))[0]])
    axes = [axes[0], channels, *[None] * (len(axes) - 2)]
    return _first(ctx, op, axes)


def layer_norm(ctx: Propagation, op: Op) -> list[Axes]:
    """The normalised axes stay, unless asked for: statistics over fewer channels are others."""
    x, count = op.arg("input"), len(op.arg("normalized_shape"))
    axes = list(ctx.get(x))
    scales = [op.arg(n) for n in ("weight", "bias") if op.arg(n) is not None]
    if ctx.rescales_norms and count == 1 and len(scales) == 2 and x.index in ctx.zero_refs:
        owner = ctx.modules.get(_owner(ctx, scales[0]))
        if isinstance(owner, nn.LayerNorm):
            axes[-1] = ctx.join([axes[-1], *[ctx.get(s)[0] for s in scales]])
            ctx.norm_widths[_owner(ctx, scales[0])] = ctx.shape(x)[-1]
            return _first(ctx, op, axes)
    for axis in (*axes[-count:], *[a for s in scales for a in ctx.get(s)]):
        ctx.freeze(axis, BEHIND_LAYER_NORM)
    if count == 1 and axes[-1] is not None:  # what scales them and what reads them stays for one reason
        axes[-1] = ctx.join([axes[-1], *[ctx.get(s)[0] for s in scales]])
    return _first(ctx, op, axes)


def reduction(ctx: Propagation, op: Op) -> list[Axes]:
    """Sums, means, norms, extremes over some axes: those stay, the others go on."""
    x = op.arg("self")
    rank = len(ctx.shape(x))
    dims = op.arg("dim")
    over = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {d % rank for d in over} if rank else set()
    axes = ctx.get(x)
    for d in reduced:
        if axes[d] is not None and not _counts_zeros(ctx, op, x):
            ctx.freeze(axes[d], f"{op.name} over the channels")
    keep = bool(op.arg("keepdim", False))
    out: Axes = [None if d in reduced else a for d, a in enumerate(axes) if keep or d not in reduced]
    return [list(out) for r in op.outputs if r is not None]


def _counts_zeros(ctx: Propagation, op: Op, x: Ref) -> bool:
    """Whether a sum, mean or maximum over channels is the same without zeros; `rescaled` divides."""
    width = ctx.earlier_choice(op.module, "autoprune_norm_width")
    if x.index not in ctx.zero_refs or ctx.is_lookahead:
        return False
    if op.name in ("max", "amax"):
        places = [r for r in op.outputs[1:] if r is not None and ctx.readers.get(r.index)]
        return x.index in ctx.non_negative_refs and not places
    if op.name in ("sum", "linalg_vector_norm", "norm"):
        ctx.norm_widths.setdefault(op.module, width or 0)
        return ctx.rescales_norms or not isinstance(ctx.modules.get(op.module), nn.LayerNorm)
    if op.name != "mean" or not isinstance(op.arg("dim"), list) or len(op.arg("dim")) != 1:
        return False
    dim = op.arg("dim")[0]
    inside = f"{op.module}." if op.module else ""  # the means of modules in it would be rescaled with it
    means = [o for o in ctx.recording.ops if o.name == "mean" and f"{o.module}.".startswith(inside)]
    if any(ctx.shape(o.inputs[0])[dim] != ctx.shape(x)[dim] or o.arg("dim") != [dim] for o in means):
        return False
    ctx.norm_widths[op.module] = ctx.shape(x)[dim]
    return True


def along(ctx: Propagation, op: Op) -> list[Axes]:
    """Softmax, cumulative sums, sorting: the axis worked along stays, the others go on."""
    x = op.arg("self", op.arg("input"))
    axes = list(ctx.get(x))
    dim = op.arg("dim", -1)
    if axes:
        ctx.freeze(axes[dim], f"{op.name} along the channels")
        axes[dim] = None
    return [list(axes) for r in op.outputs if r is not None]


def embedding(ctx: Propagation, op: Op) -> Axes:
    """Rows are looked up, so their number stays; the width goes on."""
    weight, indices = op.arg("weight"), op.arg("indices")
    rows, width = ctx.get(weight)
    ctx.freeze(rows, "rows are looked up by index", is_structural=True)
    ctx.mark(width, "out")
    return [*[None] * len(ctx.shape(indices)), width]


def embedding_bag(ctx: Propagation, op: Op) -> list[Axes]:
    """Sums, means or maxima of rows that are looked up."""
    weight = op.arg("weight")
    rows, width = ctx.get(weight)
    ctx.freeze(rows, "rows are looked up by index", is_structural=True)
    ctx.mark(width, "out")
    return _first(ctx, op, [None, width])


def bilinear(ctx: Propagation, op: Op) -> Axes:
    """(..., i) x (o, i, j) x (..., j) -> (..., o), as `nn.Bilinear` asks for it."""
    left, weight, right = op.arg("i1"), op.arg("i2"), op.arg("i3")
    if (op.arg("expand1"), op.arg("expand2"), op.arg("sumdim")) != ([1, 3], [0], [2, 3]):
        return unknown(ctx, op)[0]
    ctx.contract((left, 1), (weight, 1))
    ctx.contract((right, 1), (weight, 2))
    made = ctx.get(weight)[0]
    ctx.mark(made, "out")
    return [ctx.join([ctx.get(left)[0], ctx.get(right)[0]]), made]


FAMILIES: dict[Handler, str] = {
    constant: "empty new_empty arange scalar_tensor randn rand randint linspace eye tril_indices "
    "triu_indices empty_strided new_empty_strided",
    uniform: "new_zeros new_ones new_full zeros ones full",
    like: "zeros_like ones_like full_like empty_like rand_like randn_like zero fill",
    pointwise: "pointwise hardswish hardsigmoid hardtanh leaky_relu elu selu celu mish softplus hardshrink "
    "prelu _prelu_kernel rrelu gelu silu relu relu6 threshold softshrink log_sigmoid log_sigmoid_forward "
    "clone contiguous detach alias _to_copy to type_as lift_fresh lift_fresh_copy copy dropout "
    "native_dropout alpha_dropout feature_dropout bernoulli nan_to_num masked_fill where",
    convolution: "convolution convolution_overrideable _convolution mkldnn_convolution",
    matrix_product: "mm addmm bmm baddbmm",
    matrix_vector: "mv",
    attention: "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention "
    "_scaled_dot_product_efficient_attention _scaled_dot_product_cudnn_attention "
    "_scaled_dot_product_fused_attention_overrideable scaled_dot_product_attention",
    batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training batch_norm "
    "cudnn_batch_norm _batch_norm_with_update _batch_norm_no_update instance_norm",
    weight_norm: "_weight_norm_interface _weight_norm",
    group_norm: "native_group_norm group_norm",
    layer_norm: "native_layer_norm layer_norm _fused_rms_norm rms_norm",
    reduction: "mean sum amax amin prod any all var std var_mean std_mean logsumexp norm linalg_vector_norm "
    "argmax argmin max min median nansum nanmean count_nonzero",
    along: "_softmax softmax _log_softmax log_softmax _safe_softmax cumsum cumprod sort topk logcumsumexp",
    embedding: "embedding",
    embedding_bag: "_embedding_bag _embedding_bag_forward_only",
    bilinear: "_trilinear",
    unknown: "unknown",
}

TABLE: dict[str, Handler] = (
    {n: f for f, names in FAMILIES.items() for n in names.split()} | SHAPE_TABLE | SPACE_TABLE
)
