"""JSON for dataclasses, as strict in reading as in writing.

Reading checks every value against the annotation of its field: a missing, unknown or doubled key, a number
that is not finite or needs more than 64 bits, half a surrogate pair, deep nesting, a value of another type
is refused. Nothing is converted but lists to tuples and whole numbers to floats.
"""

from __future__ import annotations

import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

MAX_DEPTH = 64  # a guess: what we write has less than ten levels, and Python gives up at a thousand


class StrictJsonError(ValueError):
    """The text is not what the dataclass says; the message says where."""


def plain(value: Any) -> Any:
    """A value as `json.dumps` takes it: dataclasses and mappings as objects, other unknown things as text."""
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def parse(data: bytes) -> Any:
    """Plain JSON without doubled keys, wild numbers, half characters or deep nesting.

    Raises:
        StrictJsonError: it is not.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_not_finite,
            parse_float=_finite, parse_int=_short,
        )  # fmt: skip
        _check_depth(value, 0)
        return value
    except (ValueError, RecursionError):
        raise StrictJsonError("it is no plain JSON") from None


def _check_depth(value: Any, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        for key, inner in value.items():
            key.encode()
            _check_depth(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_depth(inner, depth + 1)
    elif isinstance(value, str):
        value.encode()  # half a surrogate pair has no UTF-8


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _not_finite(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # 1e999 is written as a number
        raise ValueError(f"{text} is too large")
    return number


def _short(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 1 << 64:
        raise ValueError(f"{text[:20]}... is too large")
    return int(text)


def decode(kind: Any, value: Any, where: str) -> Any:
    """`value`, checked against the type annotation `kind` and turned into it.

    Raises:
        StrictJsonError: it does not fit.
    """
    if kind is Any:
        return value
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _decode_union(arguments, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(decode(arguments[0], v, where) for v in value)
    if origin is dict and isinstance(value, dict):
        return {k: decode(arguments[1], v, f"{where}.{k[:60]}") for k, v in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        return _decode_fields(kind, value, where)
    if kind is float and type(value) in (int, float):
        return float(value)
    if isinstance(kind, type) and type(value) is kind:
        return value
    raise StrictJsonError(f"{where} has a value of another type")


def _decode_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    for kind in kinds:
        if (value is None) if kind is types.NoneType else type(value) is kind:
            return value
    for kind in kinds:
        if kind is not types.NoneType and value is not None:
            return decode(kind, value, where)
    raise StrictJsonError(f"{where} has a value of another type")


def _decode_fields(kind: Any, value: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(kind)
    if unknown := set(value) - set(hints):
        raise StrictJsonError(f"{where} has the unknown key {min(unknown)[:60]!r}")
    missing = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    if lacking := missing - set(value):
        raise StrictJsonError(f"{where} lacks {min(lacking)!r}")
    return kind(**{name: decode(hints[name], v, f"{where}.{name}") for name, v in value.items()})
