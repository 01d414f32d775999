"""Rules of operators that take statistics: normalisations, sums, means and extremes, softmax and sorting.

An axis over which a statistic is taken stays, because over fewer channels it would be another one. Exceptions
are statistics that zeros do not change (`zero_channels`), and those that a patch can take over the original
width (`patches.norm_patch`).
"""

from __future__ import annotations

import numpy as np
from torch import nn

from autoprune.structure.labels import BEHIND_LAYER_NORM
from autoprune.structure.propagate import Axes, Propagation, Rule, UnitCount, only_first
from autoprune.structure.recorder import Op, Ref


def batch_norm(ctx: Propagation, op: Op) -> list[Axes]:
    """Tie scale, shift and statistics to the channel axis, as each channel is normalised on its own."""
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
        for name in ctx.integer_attributes(op.module, ("num_features",), None):
            per = len(axes[1]) // int(getattr(ctx.modules[op.module], name))
            ctx.unit_counts.append(UnitCount(op.module, name, axes[1], per))
    return only_first(ctx, op, axes)


def weight_norm(ctx: Propagation, op: Op) -> list[Axes]:
    """Freeze the axes that the norm sums over, and tie the length to the remaining axis.

    Weight norm (Salimans & Kingma 2016) divides a direction by its norm and multiplies it by a length.
    """
    direction, length, dim = op.arg("v"), op.arg("g"), op.arg("dim", 0)
    axes = list(ctx.get(direction))
    for index, axis in enumerate(axes):
        if index != dim:
            ctx.freeze(axis, "weight norm over it")
            axes[index] = None
    axes[dim] = ctx.join([axes[dim], ctx.get(length)[dim]])
    return only_first(ctx, op, axes)


def group_norm(ctx: Propagation, op: Op) -> list[Axes]:
    """Tie whole normalisation groups, because statistics over the kept part of one would differ."""
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
        owners = {ctx.owner(op.arg(n)) for n in ("weight", "bias") if op.arg(n)}
        for owner in sorted(owners | {op.module}):
            ctx.unit_counts += [
                UnitCount(owner, a, units) for a in ctx.integer_attributes(owner, ("num_groups",), groups)
            ]
    for name in ("weight", "bias"):
        if op.arg(name) is not None and groups > 1:
            channels = ctx.join([channels, ctx.get(op.arg(name))[0]])
    axes = [axes[0], channels, *[None] * (len(axes) - 2)]
    return only_first(ctx, op, axes)


def layer_norm(ctx: Propagation, op: Op) -> list[Axes]:
    """Freeze the normalised axes, as statistics over fewer channels differ.

    Where the user asks for rescaled norms, channels that are zero when removed may go.
    """
    x, count = op.arg("input"), len(op.arg("normalized_shape"))
    axes = list(ctx.get(x))
    scales = [op.arg(n) for n in ("weight", "bias") if op.arg(n) is not None]
    if ctx.rescales_norms and count == 1 and len(scales) == 2 and x.index in ctx.zero_refs:
        owner = ctx.modules.get(ctx.owner(scales[0]))
        if isinstance(owner, nn.LayerNorm):
            axes[-1] = ctx.join([axes[-1], *[ctx.get(s)[0] for s in scales]])
            ctx.norm_widths[ctx.owner(scales[0])] = ctx.shape(x)[-1]
            return only_first(ctx, op, axes)
    for axis in (*axes[-count:], *[a for s in scales for a in ctx.get(s)]):
        ctx.freeze(axis, BEHIND_LAYER_NORM)
    if count == 1 and axes[-1] is not None:  # its scales and readers freeze for the same reason
        axes[-1] = ctx.join([axes[-1], *[ctx.get(s)[0] for s in scales]])
    return only_first(ctx, op, axes)


def reduction(ctx: Propagation, op: Op) -> list[Axes]:
    """Freeze axes over which a sum, mean, norm or extreme is taken; the others keep their labels."""
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
    """Return whether a sum, mean or maximum over channels is the same without zeros.

    A mean is the same once `norm_patch` divides it by the original width.
    """
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
    """Freeze the axis along which a softmax, cumulative sum or sort works; the others keep their labels."""
    x = op.arg("self", op.arg("input"))
    axes = list(ctx.get(x))
    dim = op.arg("dim", -1)
    if axes:
        ctx.freeze(axes[dim], f"{op.name} along the channels")
        axes[dim] = None
    return [list(axes) for r in op.outputs if r is not None]


NORM_FAMILIES: dict[Rule, str] = {
    batch_norm: "native_batch_norm _native_batch_norm_legit _native_batch_norm_legit_no_training batch_norm "
    "cudnn_batch_norm _batch_norm_with_update _batch_norm_no_update instance_norm",
    weight_norm: "_weight_norm_interface _weight_norm",
    group_norm: "native_group_norm group_norm",
    layer_norm: "native_layer_norm layer_norm _fused_rms_norm rms_norm",
    reduction: "mean sum amax amin prod any all var std var_mean std_mean logsumexp norm linalg_vector_norm "
    "argmax argmin max min median nansum nanmean count_nonzero",
    along: "_softmax softmax _log_softmax log_softmax _safe_softmax cumsum cumprod sort topk logcumsumexp",
}
