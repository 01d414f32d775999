"""The operator table: which rule tells what an operator does to labels.

A rule is a small function for a family of operators. It gets the propagation (`ctx`) and the operator, ties
or freezes labels, and returns those of the outputs' axes. Here are the rules of operators that work
position by position or make fresh tensors; the others are in `products`, `norms`, `shape`, `spatial` and
`channel_shuffle`.

An operator that is in no table freezes what it touches: unknown operators cost prunable channels, never
correctness. docs/structure.md shows how to teach a new one.
"""

from __future__ import annotations

from autoprune.structure.propagate import Axes, Propagation, Rule, untracked
from autoprune.structure.recorder import Op
from autoprune.structure.rules.norms import NORM_FAMILIES
from autoprune.structure.rules.products import PRODUCT_FAMILIES
from autoprune.structure.rules.shape import SHAPE_FAMILIES
from autoprune.structure.rules.spatial import SPATIAL_FAMILIES


def unknown(ctx: Propagation, op: Op) -> list[Axes]:
    """Freeze every axis of every input."""
    for ref in op.inputs:
        for axis in ctx.get(ref):
            ctx.freeze(axis, f"operator {op.name!r} is not known to keep channels apart")
    return untracked(ctx, op)


def constant(ctx: Propagation, op: Op) -> list[Axes]:
    """Return no labels, for a result that does not depend on the values of its inputs."""
    return untracked(ctx, op)


def uniform(ctx: Propagation, op: Op) -> list[Axes]:
    """Make open labels for a fresh tensor with the same value everywhere."""
    shapes = [ctx.shape(r) for r in op.outputs if r is not None]
    return [[ctx.open_axis(d, n) for d, n in enumerate(shape)] for shape in shapes]


def pointwise(ctx: Propagation, op: Op) -> Axes:
    """Tie axes of the same length that an operator broadcasts and combines position by position."""
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
    """Return the input's labels, for a fresh tensor of the same shape."""
    return list(ctx.get(op.inputs[0]))


FAMILIES: dict[Rule, str] = {
    constant: "empty new_empty arange scalar_tensor randn rand randint linspace eye tril_indices "
    "triu_indices empty_strided new_empty_strided",
    uniform: "new_zeros new_ones new_full zeros ones full",
    like: "zeros_like ones_like full_like empty_like rand_like randn_like zero fill",
    pointwise: "pointwise hardswish hardsigmoid hardtanh leaky_relu elu selu celu mish softplus hardshrink "
    "prelu _prelu_kernel rrelu gelu silu relu relu6 threshold softshrink log_sigmoid log_sigmoid_forward "
    "clone contiguous detach alias _to_copy to type_as lift_fresh lift_fresh_copy copy dropout "
    "native_dropout alpha_dropout feature_dropout bernoulli nan_to_num masked_fill where",
    unknown: "unknown",
}

TABLE: dict[str, Rule] = {
    name: rule
    for families in (FAMILIES, PRODUCT_FAMILIES, NORM_FAMILIES, SHAPE_FAMILIES, SPATIAL_FAMILIES)
    for rule, names in families.items()
    for name in names.split()
}
