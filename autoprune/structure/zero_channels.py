"""Where a removed channel is exactly zero in the masked network, and not only unread.

For most operators it is enough that nothing reads a removed channel. A sum over the channels needs more:
removed channels must be zero. A tensor is *zero* here if all its labelled positions that a plan removes are
zero in the masked network. The outputs of plain layers are, as the rows of their weights and their shifts
are masked; operators with f(0) = 0 keep zeros; a product is zero where one factor is.

The lists below hold ATen operators that were checked by their definitions. An operator that is missing
costs prunable channels, never correctness.
"""

from __future__ import annotations

from collections.abc import Container

from autoprune.structure.recorder import Op, Recording

SHAPES = """
    expand view _unsafe_view unsqueeze squeeze slice select permute transpose t clone detach alias _to_copy
"""
ZERO_SAFE = """
    add sub mul cat copy convolution addmm mm bmm baddbmm native_batch_norm native_layer_norm
    native_group_norm _native_batch_norm_legit_no_training addcmul
"""  # a parameter with zeros in it does no harm there; dividing by one would
KEEPS_ZERO = """
    relu gelu silu hardswish leaky_relu elu mish tanh neg abs roll flip split split_with_sizes unbind cat
    stack constant_pad_nd mean sum avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d native_dropout div
    add sub addcmul linalg_vector_norm norm sqrt square amax max_pool1d max_pool3d avg_pool1d avg_pool3d
    upsample_nearest2d upsample_bilinear2d pixel_shuffle pixel_unshuffle hardshrink softshrink erf sin
    _adaptive_avg_pool3d leaky_relu relu6
"""  # f(0) = 0
SHAPE_NAMES = frozenset(SHAPES.split())
ZERO_SAFE_NAMES = SHAPE_NAMES | frozenset(ZERO_SAFE.split())
KEEPS_ZERO_NAMES = SHAPE_NAMES | frozenset(KEEPS_ZERO.split())
NON_NEGATIVE = frozenset(
    ("relu", "relu6", "sigmoid", "hardsigmoid", "abs", "exp", "softplus", "_softmax", "square")
)  # f(x) >= 0
KEEPS_SIGN = """
    cat stack mean sum amax mul add native_dropout max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d
    upsample_nearest2d upsample_bilinear2d
"""
KEEPS_SIGN_NAMES = SHAPE_NAMES | frozenset(KEEPS_SIGN.split())
PRODUCTS = frozenset({"mul", "bmm"})
NORMS = frozenset(
    {"native_batch_norm", "_native_batch_norm_legit_no_training", "native_layer_norm", "native_group_norm"}
)


def maskable(recording: Recording) -> frozenset[str]:
    """Return the names of the parameters and buffers that the masked network may hold zeros in.

    Variances, and whatever an operator may divide by, are left out.
    """
    unsafe: set[int] = set()
    source = {index: index for index in recording.parameters}
    for op in recording.ops:
        for ref in op.inputs:
            origin = source.get(ref.index)
            if origin is None:
                continue
            if op.name not in ZERO_SAFE_NAMES or ref == op.arg("running_var"):
                unsafe.add(origin)
            if op.name in SHAPE_NAMES:
                source.update({r.index: origin for r in op.outputs if r is not None})
    return frozenset(name for index, name in recording.parameters.items() if index not in unsafe)


def stays_zero(op: Op, zero: set[int], labelled: Container[int]) -> bool:
    """Return whether an operator's result is zero wherever a removed channel would be.

    Args:
        zero: Ref indices of the tensors that are zero there.
        labelled: Ref indices of the tensors that hold channels at all.
    """
    inputs = [r.index for r in op.inputs if r.index in labelled]
    if op.name in ("convolution", "addmm", "mm", "baddbmm"):
        makers = [op.arg(n) for n in ("weight", "mat2", "batch2", "bias") if op.arg(n) is not None]
        if op.name in ("addmm", "baddbmm"):
            makers.append(op.arg("self"))
        return all(r.index in zero for r in makers)
    if op.name in NORMS:
        scales = [op.arg("weight"), op.arg("bias")]
        return all(r is not None and r.index in zero for r in scales)
    if op.name == "div":
        return op.inputs[0].index in zero and inputs == [op.inputs[0].index]
    if op.name in PRODUCTS:
        return any(i in zero for i in inputs)
    if op.name in ("add", "sub") and not all(
        isinstance(op.arg(n), type(op.inputs[0])) for n in ("self", "other")
    ):
        return False  # a number is added
    return op.name in KEEPS_ZERO_NAMES and bool(inputs) and all(i in zero for i in inputs)


def is_non_negative(op: Op, non_negative: Container[int]) -> bool:
    """Return whether no entry of an operator's result is negative.

    Args:
        non_negative: Ref indices of the tensors without negative entries.
    """
    if op.name in NON_NEGATIVE:
        return True
    if op.name == "hardtanh":
        return float(op.arg("min_val", -1)) >= 0
    numbers = [v for v in op.arguments.values() if type(v) in (int, float)]
    has_negative = op.name in ("mul", "add") and any(n < 0 for n in numbers)
    is_kept = (
        op.name in KEEPS_SIGN_NAMES and bool(op.inputs) and all(r.index in non_negative for r in op.inputs)
    )
    return is_kept and not has_negative
