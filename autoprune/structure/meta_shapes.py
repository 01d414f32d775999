"""Rules for the shapes that frequent operators make of tensors without values.

For tensors on the `meta` device torch runs many operators through decompositions in Python: a layer norm
takes a millisecond, a hardswish more. The shape of the result is plain, so a rule makes it in a few
microseconds. A rule answers only the plain case (floating point, dense, shapes that fit) and leaves
everything else, errors included, to torch. Measured: without these rules a trace takes 1.9 times as long
(docs/log.md, 2026-11-28).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

ShapeRule = Callable[..., Any]  # the operator's arguments -> its result, or None: torch finds it
FLOATS = frozenset({torch.float32, torch.float64, torch.float16, torch.bfloat16})

LIKE_INPUT = """
    relu gelu silu hardtanh hardswish hardsigmoid sigmoid tanh elu leaky_relu mish softplus clamp clamp_min
    masked_fill _softmax _log_softmax _safe_softmax exp log sqrt rsqrt neg abs erf roll
"""
BINARY = "add sub mul div"


def shape_rule(name: str, overload: str) -> ShapeRule | None:
    """Return the rule of an ATen operator, or None where it has no rule.

    Args:
        name: without overload, with the underscore of an operator in place (`relu_`).
        overload: `default`, `Tensor`, `Scalar`...
    """
    plain = name.rstrip("_")
    if plain in RULES:
        return RULES[plain] if plain == name else None
    if plain in BINARY.split() and overload in ("Tensor", "Scalar"):
        return _first if plain != name else _binary
    if plain in LIKE_INPUT.split() and overload in ("default", "Scalar", "int"):
        return _first if plain != name else _like
    return None


def _same(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)  # empty_like takes a tenth of a millisecond


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_meta and x.dtype in FLOATS and x.is_contiguous()


def _fits(x: Tensor, others: tuple[Any, ...]) -> bool:
    """Return whether every other tensor broadcasts to `x` without changing it, and all numbers are real."""
    for other in others:
        if isinstance(other, Tensor):
            if other.dtype is not x.dtype and other.dtype is not torch.bool:
                return False
            lead = x.ndim - other.ndim
            if not other.is_meta or lead < 0:
                return False
            if any(n not in (1, m) for n, m in zip(other.shape, x.shape[lead:], strict=True)):
                return False
        elif isinstance(other, complex):
            return False
    return True


def _like(x: Tensor, *others: Any, **options: Any) -> Tensor | None:
    if _is_plain(x) and _fits(x, others) and options.get("dtype") is None:
        return _same(x)
    return None


def _first(x: Tensor, *others: Any, **_: Any) -> Tensor | None:
    return x if _is_plain(x) and _fits(x, others) else None


def _binary(x: Any, other: Any, **_: Any) -> Tensor | None:
    if isinstance(other, Tensor) and isinstance(x, Tensor) and x.ndim < other.ndim:
        x, other = other, x
    if _is_plain(x) and (not isinstance(other, Tensor) or other.dtype is x.dtype) and _fits(x, (other,)):
        return _same(x)
    return None


def _batch_norm(x: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, ...] | None:
    uses_batch = arguments[4] if len(arguments) > 4 else options.get("training", True)
    if not _is_plain(x) or uses_batch:
        return None
    if any(isinstance(t, Tensor) and t.shape != x.shape[1:2] for t in arguments[:4]):
        return None
    return _same(x), x.new_empty(0), x.new_empty(0)


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 0.0
) -> tuple[Tensor, ...] | None:
    lead = x.ndim - len(shape)
    if not _is_plain(x) or lead < 1 or list(x.shape[lead:]) != list(shape):
        return None
    if any(
        t is not None and (list(t.shape) != list(shape) or t.dtype is not x.dtype) for t in (weight, bias)
    ):
        return None
    statistics = [*x.shape[:lead], *[1] * len(shape)]
    return _same(x), x.new_empty(statistics), x.new_empty(statistics)


def _are_matrices(left: Tensor, right: Tensor, rank: int) -> bool:
    return (
        left.is_meta
        and right.is_meta
        and left.dtype is right.dtype
        and left.dtype in FLOATS
        and left.ndim == right.ndim == rank
        and left.shape[-1] == right.shape[-2]
        and left.shape[:-2] == right.shape[:-2]
    )


def _mm(left: Tensor, right: Tensor) -> Tensor | None:
    return left.new_empty(left.shape[0], right.shape[1]) if _are_matrices(left, right, 2) else None


def _bmm(left: Tensor, right: Tensor) -> Tensor | None:
    if not _are_matrices(left, right, 3):
        return None
    return left.new_empty(left.shape[0], left.shape[1], right.shape[2])


def _addmm(addend: Tensor, left: Tensor, right: Tensor, **_: Any) -> Tensor | None:
    if not _are_matrices(left, right, 2) or addend.dtype is not left.dtype or addend.ndim > 2:
        return None
    shape = (left.shape[0], right.shape[1])
    tail = shape[2 - addend.ndim :]
    if any(n not in (1, m) for n, m in zip(addend.shape, tail, strict=True)):
        return None
    return left.new_empty(shape)


def _convolution(  # noqa: PLR0913 (the operator's own arguments)
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
) -> Tensor | None:
    rank = x.ndim - 2
    if transposed or not _is_plain(x) or not _is_plain(weight) or x.dtype is not weight.dtype:
        return None
    if weight.ndim != x.ndim or x.shape[1] != weight.shape[1] * groups or weight.shape[0] % groups:
        return None
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype is not x.dtype):
        return None
    if not rank == len(stride) == len(padding) == len(dilation):
        return None
    sizes = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    ]
    return x.new_empty(x.shape[0], weight.shape[0], *sizes) if min(sizes) > 0 else None


def _mean(x: Tensor, dims: list[int] | None, keepdim: bool = False, **options: Any) -> Tensor | None:
    if not _is_plain(x) or not dims or options or any(not -x.ndim <= d < x.ndim for d in dims):
        return None
    over = {d % x.ndim for d in dims}
    return x.new_empty([1 if d in over else n for d, n in enumerate(x.shape) if keepdim or d not in over])


def _cat(tensors: list[Tensor], dim: int = 0) -> Tensor | None:
    first = tensors[0]
    if not all(_is_plain(t) and t.dtype is first.dtype and t.ndim == first.ndim for t in tensors):
        return None
    if not -first.ndim <= dim < first.ndim:
        return None
    dim %= first.ndim
    rest = {(*t.shape[:dim], *t.shape[dim + 1 :]) for t in tensors}
    if len(rest) > 1:
        return None
    return first.new_empty([*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :]])


RULES: dict[str, ShapeRule] = {
    "native_batch_norm": _batch_norm,
    "native_layer_norm": _layer_norm,
    "mm": _mm,
    "bmm": _bmm,
    "addmm": _addmm,
    "convolution": _convolution,
    "mean": _mean,
    "cat": _cat,
}
