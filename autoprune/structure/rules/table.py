"""The operator table: what each family of operators does to labels.

One small function per family. It gets the walk and the operator, ties or freezes what must be, and returns
the axes of the outputs. An operator that is not here freezes what it touches: unknown operators cost
prunable channels, never correctness. To teach a new one, write its function and enter its names below
(docs/structure.md shows how); operators that only move axes are in `shape_ops`,
those that work over space in `space_ops`.
"""

from __future__ import annotations

import numpy as np
from torch import nn

from autoprune.structure.labels import BEHIND_LAYER_NORM, LabelArray
from autoprune.structure.propagate import AttributeRule, Axes, Handler, Walk
from autoprune.structure.recorder import Op, Ref
from autoprune.structure.rules.shape import SHAPE_TABLE
from autoprune.structure.rules.space import SPACE_TABLE


def unknown(walk: Walk, op: Op) -> list[Axes]:
    """Freeze every axis of every input."""
    for ref in op.inputs:
        for axis in walk.get(ref):
            walk.freeze(axis, f"operator {op.name!r} is not known to keep channels apart")
    return _untracked(walk, op)


def _untracked(walk: Walk, op: Op) -> list[Axes]:
    return [[None] * len(walk.shape(r)) for r in op.outputs if r is not None]


def _first(walk: Walk, op: Op, axes: Axes) -> list[Axes]:
    """Axes for the first output; the others are statistics that nothing reads."""
    return [axes, *_untracked(walk, op)[1:]]


def constant(walk: Walk, op: Op) -> list[Axes]:
    """A result that does not depend on the values of its inputs."""
    return _untracked(walk, op)


def uniform(walk: Walk, op: Op) -> list[Axes]:
    """A fresh tensor with the same value everywhere."""
    shapes = [walk.shape(r) for r in op.outputs if r is not None]
    return [[walk.open_axis(d, n) for d, n in enumerate(shape)] for shape in shapes]


def pointwise(walk: Walk, op: Op) -> Axes:
    """Position by position, with broadcasting: axes of the same length tie."""
    out = op.outputs[0]
    assert out is not None
    shape = walk.shape(out)
    operands = [r for r in op.inputs if len(walk.shape(r)) > 0]
    if op.name == "copy":
        operands = operands[:2]
    axes: Axes = []
    for axis, size in enumerate(shape):
        parts = []
        for ref in operands:
            at = axis - len(shape) + len(walk.shape(ref))
            if at >= 0 and walk.shape(ref)[at] == size:
                parts.append(walk.get(ref)[at])
        axes.append(walk.join(parts) if size > 1 else None)
    return axes


def like(walk: Walk, op: Op) -> Axes:
    """A fresh tensor of the same shape."""
    return list(walk.get(op.inputs[0]))


def convolution(walk: Walk, op: Op) -> Axes:
    """Reads the input's channels with the weight's second axis, makes new ones from the first."""
    x, weight, bias = op.arg("input"), op.arg("weight"), op.arg("bias")
    groups, transposed = op.arg("groups"), op.arg("transposed")
    out = op.outputs[0]
    assert out is not None
    for axis in walk.get(weight)[2:]:
        walk.freeze(axis, "a kernel's extent", is_structural=True)
    for axis in walk.get(x)[2:]:
        walk.freeze(axis, "convolved over")
    _convolution_cost(walk, op, x if transposed else out)
    if groups > 1 or walk.stamp(_owner(walk, weight), "autoprune_grouped"):
        made = _grouped_transposed(walk, op) if transposed else _grouped(walk, op)
    else:
        reads, makes = (0, 1) if transposed else (1, 0)
        walk.contract((x, 1), (weight, reads))
        made = walk.get(weight)[makes]
    walk.mark(made, "out")
    if bias is not None:
        walk.mark(walk.get(bias)[0], "out")
        made = walk.join([made, walk.get(bias)[0]])
    return [walk.get(x)[0], made, *[None] * (len(walk.shape(out)) - 2)]


def _owner(walk: Walk, weight: Ref) -> str:
    """Name of the module that holds a parameter."""
    return walk.recording.parameters.get(weight.index, "").rpartition(".")[0]


def _convolution_cost(walk: Walk, op: Op, over: Ref) -> None:
    weight = op.arg("weight")
    kernel = walk.shape(weight)
    positions = int(np.prod(walk.shape(over)[2:], dtype=np.int64) * np.prod(kernel[2:], dtype=np.int64))
    axes, x = walk.get(weight), op.arg("input")
    batch = (walk.shape(x)[0], walk.get(x)[0])  # heads may be folded into it
    walk.cost(positions, [(kernel[0], axes[0]), (kernel[1], axes[1]), batch])


def _grouped(walk: Walk, op: Op) -> LabelArray | None:
    """Whole groups go, or equal positions inside every group, whichever leaves more units.

    An earlier pruning's choice stands (`autoprune_grouped` on the module), so that plans compose.
    """
    x, weight, groups = op.arg("input"), op.arg("weight"), op.arg("groups")
    read, makes = walk.get(x)[1], walk.get(weight)[0]
    per_in, per_out = walk.shape(weight)[1], walk.shape(weight)[0] // groups
    owner = _owner(walk, weight)
    stamped = walk.stamp(owner, "autoprune_grouped")
    whole = stamped == "whole" if stamped else groups >= max(per_in, per_out) or per_in == 1
    if max(per_in, per_out) > 1 or stamped:
        walk.grouped[owner] = "whole" if whole else "positions"
    if not whole:
        first = walk.tie_rows(read.reshape(groups, per_in).T) if read is not None else None
        walk.mark(walk.get(weight)[1], "in")
        walk.join([first, walk.get(weight)[1]], "reads an axis of fixed length")
        return np.tile(walk.tie_rows(makes.reshape(groups, per_out).T), groups) if makes is not None else None
    walk.freeze(walk.get(weight)[1], "a group's own width", is_structural=True)
    if read is None or makes is None:
        axis = walk.join([read, makes]) if not walk.is_probe else (read if makes is None else makes)
        return None if axis is None else np.repeat(axis.reshape(groups, -1)[:, 0], per_out)
    rows = np.concatenate([read.reshape(groups, per_in), makes.reshape(groups, per_out)], axis=1)
    units = walk.tie_rows(rows)
    walk.rules += [
        AttributeRule(owner, n, units) for n in _counters(walk, owner, groups, ("groups", "channels"))
    ]
    return np.repeat(units, per_out)


def _counters(walk: Walk, owner: str, count: int | None, words: tuple[str, ...]) -> list[str]:
    """Integer attributes of a module named with one of the words, that hold `count` if it is given."""
    module = walk.modules.get(owner)
    values = vars(module) if module is not None else {}
    numbers = {n: v for n, v in values.items() if type(v) is int and any(w in n for w in words)}
    return [n for n, v in numbers.items() if count is None or v == count]


def _grouped_transposed(walk: Walk, op: Op) -> LabelArray | None:
    """Whole groups go: the weight is (in, out per group)."""
    x, weight, groups = op.arg("input"), op.arg("weight"), op.arg("groups")
    walk.freeze(walk.get(weight)[1], "a group's own width", is_structural=True)
    axis = walk.join([walk.get(x)[1], walk.get(weight)[0]])
    if axis is None:
        return None
    units = walk.tie_rows(axis.reshape(groups, -1))
    owner = _owner(walk, weight)
    walk.rules += [AttributeRule(owner, n, units) for n in _counters(walk, owner, groups, ("groups",))]
    return np.repeat(units, walk.shape(weight)[1])


def matrix_product(walk: Walk, op: Op) -> Axes:
    """(..., n, k) x (..., k, m), with an optional addend: the inner axes tie, batch axes tie."""
    names = ("batch1", "batch2") if op.name == "baddbmm" else ("mat1", "mat2")
    left, right = (op.arg(n, op.arg(s)) for n, s in zip(names, ("self", "mat2"), strict=True))
    a, b = walk.get(left), walk.get(right)
    shapes = walk.shape(left), walk.shape(right)
    walk.contract((left, len(a) - 1), (right, len(b) - 2))
    summed = a[-1] if op.name == "bmm" else None
    if summed is not None and (walk.is_weight(left) or walk.is_weight(right)):
        walk.pairs.append(summed)  # einsum multiplies position by position where one is left
    for ref, axis in ((left, len(a) - 2), (right, len(b) - 1)):
        if walk.is_weight(ref):
            walk.mark(walk.get(ref)[axis], "out")
    batch = _batch_axes(walk, a[:-2], b[:-2])
    sizes = [
        *zip(shapes[0][:-2], batch, strict=True),
        (shapes[0][-2], a[-2]),
        (shapes[0][-1], a[-1] if a[-1] is not None else b[-2]),
    ]
    walk.cost(1, [*sizes, (shapes[1][-1], b[-1])])
    result: Axes = [*batch, a[-2], b[-1]]
    return _with_addend(walk, op, result) if op.name in ("addmm", "baddbmm") else result


def _batch_axes(walk: Walk, *operands: Axes) -> Axes:
    batch = [walk.join(parts) for parts in zip(*operands, strict=True)]
    walk.votes += sum(a is not None for a in batch)
    return batch


def _with_addend(walk: Walk, op: Op, result: Axes) -> Axes:
    addend = op.arg("self")
    axes, shape = walk.get(addend), walk.shape(addend)
    for back in range(1, len(shape) + 1):
        if shape[-back] > 1:
            if walk.is_weight(addend):
                walk.mark(axes[-back], "out")
            result[-back] = walk.join([result[-back], axes[-back]])
    return result


def matrix_vector(walk: Walk, op: Op) -> Axes:
    """(n, k) x (k,)."""
    matrix, vector = op.arg("self", op.arg("mat")), op.arg("vec")
    walk.contract((matrix, 1), (vector, 0))
    return [walk.get(matrix)[0]]


def attention(walk: Walk, op: Op) -> list[Axes]:
    """Fused scaled dot-product attention: batch and head axes tie, the value's width goes on."""
    query, key, value = (op.arg(n) for n in ("query", "key", "value"))
    q, k, v = walk.get(query), walk.get(key), walk.get(value)
    for axis in (*q[-2:], *k[-2:], v[-2]):
        walk.freeze(axis, "summed over in attention")
    mask = op.arg("attn_mask", op.arg("attn_bias"))
    batch = _batch_axes(walk, q[:-2], k[:-2], v[:-2])
    if isinstance(mask, Ref):
        _tie_mask(walk, mask, batch)
    lead = list(zip(walk.shape(query)[:-2], batch, strict=True))
    length, keys, width = walk.shape(query)[-2], walk.shape(key)[-2], walk.shape(query)[-1]
    walk.cost(length * keys * width, lead)
    walk.cost(length * keys, [*lead, (walk.shape(value)[-1], v[-1])])
    first: Axes = [*batch, None, v[-1]]
    return _first(walk, op, first)


def _tie_mask(walk: Walk, mask: Ref, batch: Axes) -> None:
    shape, axes = walk.shape(mask), walk.get(mask)
    for index in range(len(batch)):
        at = index - len(batch) - 2 + len(shape)
        if at >= 0 and shape[at] > 1:
            batch[index] = walk.join([batch[index], axes[at]])
    for axis in axes[-2:]:
        walk.freeze(axis, "added to attention over positions")


def batch_norm(walk: Walk, op: Op) -> list[Axes]:
    """Each channel on its own: scale, shift and statistics follow the channel axis."""
    x = op.arg("input")
    axes = list(walk.get(x))
    uses_batch = bool(op.arg("training", op.arg("use_input_stats", False))) or op.arg("running_mean") is None
    for index, axis in enumerate(axes):
        if index != 1 and uses_batch:
            walk.freeze(axis, "normalised over")
            axes[index] = None
    for name in ("weight", "bias", "running_mean", "running_var"):
        ref = op.arg(name)
        if ref is not None:
            axes[1] = walk.join([axes[1], walk.get(ref)[0]])
    if op.arg("weight") is None and op.arg("running_mean") is None and axes[1] is not None:
        for name in _counters(walk, op.module, None, ("num_features",)):
            per = len(axes[1]) // int(getattr(walk.modules[op.module], name))
            walk.rules.append(AttributeRule(op.module, name, axes[1], per))
    return _first(walk, op, axes)


def weight_norm(walk: Walk, op: Op) -> list[Axes]:
    """Direction over its norm, times a length (Salimans & Kingma 2016): the axes of the norm stay."""
    direction, length, dim = op.arg("v"), op.arg("g"), op.arg("dim", 0)
    axes = list(walk.get(direction))
    for index, axis in enumerate(axes):
        if index != dim:
            walk.freeze(axis, "weight norm over it")
            axes[index] = None
    axes[dim] = walk.join([axes[dim], walk.get(length)[dim]])
    return _first(walk, op, axes)


def group_norm(walk: Walk, op: Op) -> list[Axes]:
    """Whole normalisation groups go, because statistics over the kept part of one would differ."""
    x, groups = op.arg("input"), op.arg("group", op.arg("num_groups"))
    axes = list(walk.get(x))
    for index, axis in enumerate(axes):
        if index > 1:
            walk.freeze(axis, "normalised over")
    channels = axes[1]
    if groups == 1:
        for labels in (channels, *[walk.get(op.arg(n))[0] for n in ("weight", "bias") if op.arg(n)]):
            walk.freeze(labels, "normalised over all channels")
        channels = None
    elif channels is not None:
        units = walk.tie_rows(channels.reshape(groups, -1))
        channels = np.repeat(units, walk.shape(x)[1] // groups)
        owners = {_owner(walk, op.arg(n)) for n in ("weight", "bias") if op.arg(n)}
        for owner in sorted(owners | {op.module}):
            walk.rules += [
                AttributeRule(owner, a, units) for a in _counters(walk, owner, groups, ("num_groups",))
            ]
    for name in ("weight", "bias"):
        if op.arg(name) is not None and groups > 1:
            channels = walk.join([channels, walk.get(op.arg(name))[0]])
    axes = [axes[0], channels, *[None] * (len(axes) - 2)]
    return _first(walk, op, axes)


def layer_norm(walk: Walk, op: Op) -> list[Axes]:
    """The normalised axes stay, unless asked for: statistics over fewer channels are others."""
    x, count = op.arg("input"), len(op.arg("normalized_shape"))
    axes = list(walk.get(x))
    scales = [op.arg(n) for n in ("weight", "bias") if op.arg(n) is not None]
    if walk.rescales_norms and count == 1 and len(scales) == 2 and x.index in walk.zero:
        owner = walk.modules.get(_owner(walk, scales[0]))
        if isinstance(owner, nn.LayerNorm):
            axes[-1] = walk.join([axes[-1], *[walk.get(s)[0] for s in scales]])
            walk.rescaled[_owner(walk, scales[0])] = walk.shape(x)[-1]
            return _first(walk, op, axes)
    for axis in (*axes[-count:], *[a for s in scales for a in walk.get(s)]):
        walk.freeze(axis, BEHIND_LAYER_NORM)
    if count == 1 and axes[-1] is not None:  # what scales them and what reads them stays for one reason
        axes[-1] = walk.join([axes[-1], *[walk.get(s)[0] for s in scales]])
    return _first(walk, op, axes)


def reduction(walk: Walk, op: Op) -> list[Axes]:
    """Sums, means, norms, extremes over some axes: those stay, the others go on."""
    x = op.arg("self")
    rank = len(walk.shape(x))
    dims = op.arg("dim")
    over = range(rank) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {d % rank for d in over} if rank else set()
    axes = walk.get(x)
    for d in reduced:
        if axes[d] is not None and not _counts_zeros(walk, op, x):
            walk.freeze(axes[d], f"{op.name} over the channels")
    keep = bool(op.arg("keepdim", False))
    out: Axes = [None if d in reduced else a for d, a in enumerate(axes) if keep or d not in reduced]
    return [list(out) for r in op.outputs if r is not None]


def _counts_zeros(walk: Walk, op: Op, x: Ref) -> bool:
    """Whether a sum, mean or maximum over channels is the same without zeros; `rescaled` divides."""
    width = walk.stamp(op.module, "autoprune_norm_width")
    if x.index not in walk.zero or walk.is_probe:
        return False
    if op.name in ("max", "amax"):
        places = [r for r in op.outputs[1:] if r is not None and walk.readers.get(r.index)]
        return x.index in walk.above_zero and not places
    if op.name in ("sum", "linalg_vector_norm", "norm"):
        walk.rescaled.setdefault(op.module, width or 0)
        return walk.rescales_norms or not isinstance(walk.modules.get(op.module), nn.LayerNorm)
    if op.name != "mean" or not isinstance(op.arg("dim"), list) or len(op.arg("dim")) != 1:
        return False
    dim = op.arg("dim")[0]
    inside = f"{op.module}." if op.module else ""  # the means of modules in it would be rescaled with it
    means = [o for o in walk.recording.ops if o.name == "mean" and f"{o.module}.".startswith(inside)]
    if any(walk.shape(o.inputs[0])[dim] != walk.shape(x)[dim] or o.arg("dim") != [dim] for o in means):
        return False
    walk.rescaled[op.module] = walk.shape(x)[dim]
    return True


def along(walk: Walk, op: Op) -> list[Axes]:
    """Softmax, cumulative sums, sorting: the axis worked along stays, the others go on."""
    x = op.arg("self", op.arg("input"))
    axes = list(walk.get(x))
    dim = op.arg("dim", -1)
    if axes:
        walk.freeze(axes[dim], f"{op.name} along the channels")
        axes[dim] = None
    return [list(axes) for r in op.outputs if r is not None]


def embedding(walk: Walk, op: Op) -> Axes:
    """Rows are looked up, so their number stays; the width goes on."""
    weight, indices = op.arg("weight"), op.arg("indices")
    rows, width = walk.get(weight)
    walk.freeze(rows, "rows are looked up by index", is_structural=True)
    walk.mark(width, "out")
    return [*[None] * len(walk.shape(indices)), width]


def embedding_bag(walk: Walk, op: Op) -> list[Axes]:
    """Sums, means or maxima of rows that are looked up."""
    weight = op.arg("weight")
    rows, width = walk.get(weight)
    walk.freeze(rows, "rows are looked up by index", is_structural=True)
    walk.mark(width, "out")
    return _first(walk, op, [None, width])


def bilinear(walk: Walk, op: Op) -> Axes:
    """(..., i) x (o, i, j) x (..., j) -> (..., o), as `nn.Bilinear` asks for it."""
    left, weight, right = op.arg("i1"), op.arg("i2"), op.arg("i3")
    if (op.arg("expand1"), op.arg("expand2"), op.arg("sumdim")) != ([1, 3], [0], [2, 3]):
        return unknown(walk, op)[0]
    walk.contract((left, 1), (weight, 1))
    walk.contract((right, 1), (weight, 2))
    made = walk.get(weight)[0]
    walk.mark(made, "out")
    return [walk.join([walk.get(left)[0], walk.get(right)[0]]), made]


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
