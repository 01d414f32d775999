"""Dataclasses become plain values and come back; a stranger's text is read as strictly as its format says."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoprune.record import RunRecord
from autoprune.serialization import SerializationError, from_plain, json_text, parse_json, to_plain
from tests.example_record import REACHED


@dataclass(frozen=True, kw_only=True)
class Inner:
    size: int
    share: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    kind: Literal["a", "b"] = "a"
    parts: tuple[Inner, ...] = ()
    by_name: dict[str, Inner] = field(default_factory=dict)
    anything: Any = None


OUTER = Outer(
    name="ü", kind="b", parts=(Inner(size=1), Inner(size=2, share=1.0)), by_name={"x": Inner(size=3)},
    anything={"deep": [1, {"free": None}]},
)  # fmt: skip


def test_values_come_back() -> None:
    assert from_plain(Outer, to_plain(OUTER), exact=True) == OUTER
    assert from_plain(RunRecord, json.loads(json_text(REACHED)), exact=True) == REACHED


def test_a_path_a_numpy_float_and_a_number_that_is_none_are_written() -> None:
    values = {"path": Path("a/b"), "number": np.float64(0.1), "torch": torch.__version__}
    assert to_plain(values) == {"path": "a/b", "number": 0.1, "torch": str(torch.__version__)}
    assert json.loads(json_text({"a": [math.nan, math.inf, -math.inf, 0.5]})) == {
        "a": [None, None, None, 0.5]
    }
    assert json_text([1, {"a": "ü"}], indent=1) == '[\n 1,\n {\n  "a": "ü"\n }\n]'


def test_what_is_no_value_is_not_written_as_text() -> None:
    with pytest.raises(TypeError, match="object"):
        to_plain({"a": object()})


@pytest.mark.parametrize(
    ("change", "where"),
    [
        ({"parts": [{"size": 1}, {"size": 2, "code": "x"}]}, "code"),
        ({"by_name": {"x": {"size": 1, "code": "x"}}}, "code"),
        ({"extra": 1}, "extra"),
    ],
)
def test_unknown_keys_are_refused_where_exactness_is_asked_for(change: dict[str, Any], where: str) -> None:
    values = to_plain(OUTER) | change
    assert from_plain(Outer, values).name == "ü"
    with pytest.raises(SerializationError, match=where):
        from_plain(Outer, values, exact=True)


@pytest.mark.parametrize(
    "change",
    [
        {"name": 1}, {"name": None}, {"kind": "c"}, {"parts": [{}]}, {"parts": [{"size": True}]},
        {"parts": [{"size": 1.5}]}, {"parts": [{"size": "1"}]}, {"parts": {"size": 1}}, {"by_name": []},
        {"parts": [{"size": 1, "share": "0.5"}]}, {"parts": [{"size": 1, "share": True}]},
    ],
)  # fmt: skip
def test_another_type_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(SerializationError):
        from_plain(Outer, to_plain(OUTER) | change)


REFUSED = {
    "a doubled key": b'{"a":{"b":1,"b":1}}',
    "no number": b"[NaN]",
    "an infinite number": b"[-Infinity]",
    "a number that is too large": b"[1e999]",
    "an integer of 65 bits": b"[18446744073709551616]",
    "a long integer": b"[" + b"9" * 5000 + b"]",
    "half a character": b'["\\ud800"]',
    "half a character in a key": b'{"\\udfff":1}',
    "deep nesting": b"[" * 66 + b"]" * 66,
    "very deep nesting": b"[" * 99_999,
    "Latin-1": b'["\xfc"]',
    "text after the end": b"[1] x",
    "nothing": b"",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_strict_json_is_refused(what: str) -> None:
    with pytest.raises(SerializationError):
        parse_json(REFUSED[what])


@given(st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
))  # fmt: skip
def test_strict_json_is_read_as_it_was_written(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value
    assert parse_json(b"[" * 64 + b"]" * 64) is not None
