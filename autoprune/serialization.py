"""The conversion of dataclasses to plain values (those that JSON has) and back; msgspec does the work.

Two readers use it. The records of a run are read leniently: attributes that a dataclass does not name
belong to other readers. The manifest of a delivered file, which a stranger may have written, is read
exactly: `docs/format.md`, section 3, demands more than msgspec checks, so doubled keys, wide integers, deep
nesting and keys that no field has are refused here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")

MAX_DEPTH = 64  # a guess: what we write has less than ten levels, and Python gives up at a thousand


class SerializationError(ValueError):
    """The error of values that a dataclass does not allow, or of a text that is no strict JSON.

    The message names the place.
    """


def to_plain(value: Any) -> Any:
    """Return a value as dicts, lists, texts and numbers; paths become texts.

    Raises:
        TypeError: something in the value is none of these and no dataclass.
    """
    return msgspec.to_builtins(value, str_keys=True, enc_hook=_encode)


def json_text(value: Any, *, indent: int = 0) -> str:
    """Return a value as JSON text; a number that is not finite becomes null, as JSON has none.

    Raises:
        TypeError: the value cannot be converted, see `to_plain`.
    """
    data = msgspec.json.encode(value, enc_hook=_encode)
    return (msgspec.json.format(data, indent=indent) if indent else data).decode()


def _encode(value: Any) -> Any:
    # msgspec takes no subclass of a plain type: `torch.__version__` is one, NumPy's float64 another.
    if isinstance(value, str | Path):
        return str(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a {type(value).__qualname__} is no plain value")


def from_plain(kind: type[T], value: object, *, exact: bool = False) -> T:
    """Return the value of type `kind`, a dataclass or a collection of them, that `to_plain` converted.

    Every value is checked against its annotation. The only conversions are those of lists to tuples and of
    whole numbers to floats.

    Args:
        kind: the type of the result.
        value: the plain values.
        exact: whether keys that a dataclass has no field for are refused; otherwise they are passed over.

    Raises:
        SerializationError: a key is missing, or unknown where that matters, or a value has another type.
    """
    try:
        result = msgspec.convert(value, kind, strict=True)
    except msgspec.ValidationError as error:
        raise SerializationError(str(error)) from None
    if exact:
        _check_keys(value, msgspec.to_builtins(result), "$")
    return result


def _check_keys(value: Any, read_back: Any, where: str) -> None:
    # msgspec can forbid unknown keys for its own Structs only. What was read, turned back, has all keys that
    # the dataclasses name.
    if isinstance(value, dict):
        if unknown := value.keys() - read_back.keys():
            raise SerializationError(f"unknown key {min(unknown)[:60]!r} - at `{where}`")
        for key, inner in value.items():
            _check_keys(inner, read_back[key], f"{where}.{key[:60]}")
    elif isinstance(value, list):
        for inner, inner_back in zip(value, read_back, strict=True):
            if isinstance(inner, dict | list):
                _check_keys(inner, inner_back, f"{where}[...]")


def parse_json(data: bytes) -> Any:
    """Return the plain values of a strict JSON text.

    Doubled keys, half surrogate pairs, deep nesting, and numbers that are not finite or need more than
    64 bits are refused.

    Raises:
        SerializationError: the text is not strict JSON.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_unique_keys, parse_constant=_refuse_constant,
            parse_float=_finite_float, parse_int=_short_int,
        )  # fmt: skip
        _check_nesting(value, 0)
    except (ValueError, RecursionError):
        raise SerializationError("it is no plain JSON") from None
    return value


def _check_nesting(value: dict[str, Any] | list[Any] | str | float | None, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        value.encode()  # half a surrogate pair has no UTF-8
    elif isinstance(value, dict):
        for key, inner in value.items():
            key.encode()
            _check_nesting(inner, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            if isinstance(inner, str | dict | list):  # most lists hold thousands of indices
                _check_nesting(inner, depth + 1)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key occurs twice")
    return result


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite_float(text: str) -> float:
    number = float(text)
    if math.isinf(number):  # 1e999 is written as a number
        raise ValueError(f"{text} is too large")
    return number


def _short_int(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 1 << 64:  # the length first: long texts are slow to read
        raise ValueError(f"{text[:20]}... is too large")
    return int(text)
