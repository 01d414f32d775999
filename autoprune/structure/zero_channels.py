"""Where a removed channel is exactly zero in the masked network, and not only unread.

Most operators do not ask: it is enough that nothing reads a removed channel. A sum over the channels does. A
value is *zero* here if all its labelled positions that a plan removes are zero in the masked network: what
plain layers make is, as their rows and shifts are masked; operators with f(0) = 0 keep it; a product is zero
where one factor is.
"""

from __future__ import annotations

from collections.abc import Container

from autoprune.structure.recorder import Op, Recording

SHAPES = """
    expand view _unsafe_view unsqueeze squeeze slice select permute transpose t clone detach alias _to_copy
"""
HARMLESS = """
    add sub mul cat copy convolution addmm mm bmm baddbmm native_batch_norm native_layer_norm
    native_group_norm _native_batch_norm_legit_no_training addcmul
"""  # they do nothing bad to a parameter with zeros in it; dividing by one would
KEEPS = """
    relu gelu silu hardswish leaky_relu elu mish tanh neg abs roll flip split split_with_sizes unbind cat
    stack constant_pad_nd mean sum avg_pool2d max_pool2d_with_indices _adaptive_avg_pool2d native_dropout div
    add sub addcmul linalg_vector_norm norm sqrt square amax max_pool1d max_pool3d avg_pool1d avg_pool3d
    upsample_nearest2d upsample_bilinear2d pixel_shuffle pixel_unshuffle hardshrink softshrink erf sin
    _adaptive_avg_pool3d leaky_relu relu6
"""  # f(0) = 0
SHAPE_NAMES = frozenset(SHAPES.split())
HARMLESS_NAMES = SHAPE_NAMES | frozenset(HARMLESS.split())
KEEPING_NAMES = SHAPE_NAMES | frozenset(KEEPS.split())
ABOVE_ZERO = frozenset(
    ("relu", "relu6", "sigmoid", "hardsigmoid", "abs", "exp", "softplus", "_softmax", "square")
)  # f(x) >= 0
KEEPS_ABOVE = """
    cat stack mean sum amax mul add native_dropout max_pool2d_with_indices avg_pool2d _adaptive_avg_pool2d
    upsample_nearest2d upsample_bilinear2d
"""
KEEPS_ABOVE_NAMES = SHAPE_NAMES | frozenset(KEEPS_ABOVE.split())
PRODUCTS = frozenset({"mul", "bmm"})
NORMS = frozenset(
    {"native_batch_norm", "_native_batch_norm_legit_no_training", "native_layer_norm", "native_group_norm"}
)


def maskable(recording: Recording) -> frozenset[str]:
    """Parameters and buffers in which zeros are harmless; variances and what may be divided by are not."""
    harmful: set[int] = set()
    source = {index: index for index in recording.parameters}
    for op in recording.ops:
        for ref in op.inputs:
            origin = source.get(ref.index)
            if origin is None:
                continue
            if op.name not in HARMLESS_NAMES or ref == op.arg("running_var"):
                harmful.add(origin)
            if op.name in SHAPE_NAMES:
                source.update({r.index: origin for r in op.outputs if r is not None})
    return frozenset(name for index, name in recording.parameters.items() if index not in harmful)


def stays_zero(op: Op, zero: set[int], labelled: Container[int]) -> bool:
    """Whether an operator's result is zero wherever a removed channel would be."""
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
    return op.name in KEEPING_NAMES and bool(inputs) and all(i in zero for i in inputs)


def is_non_negative(op: Op, above: Container[int]) -> bool:
    """Whether no entry of an operator's result is negative.

    Args:
        above: the tensors of which that is known.
    """
    if op.name in ABOVE_ZERO:
        return True
    if op.name == "hardtanh":
        return float(op.arg("min_val", -1)) >= 0
    numbers = [v for v in op.arguments.values() if type(v) in (int, float)]
    has_negative = op.name in ("mul", "add") and any(n < 0 for n in numbers)
    is_kept = op.name in KEEPS_ABOVE_NAMES and bool(op.inputs) and all(r.index in above for r in op.inputs)
    return is_kept and not has_negative
