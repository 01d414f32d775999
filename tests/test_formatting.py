from __future__ import annotations

import pytest

from autoprune import formatting


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (999, "999"),
        (999.6, "1.00 k"),
        (40_813_184, "40.8 M"),
        (269_722, "270 k"),
        (4.1e9, "4.10 G"),
    ],
)
def test_counts_have_three_digits_and_a_prefix(value: float, text: str) -> None:
    assert formatting.count(value) == text


def test_sizes_and_latencies() -> None:
    assert formatting.size(621_000) == "621 kB"
    assert formatting.size(None) == formatting.MISSING
    assert formatting.milliseconds(4.187) == "4.19 ms"
    assert formatting.milliseconds(123.4) == "123 ms"


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.2, "4.2 s"), (59.96, "1:00 min"), (83, "1:23 min"), (7325, "2:02 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert formatting.duration(seconds) == text


def test_a_difference_that_rounds_to_zero_has_no_sign() -> None:
    assert formatting.signed(-0.04) == "0.0"
    assert formatting.signed(-0.26) == f"{formatting.MINUS}0.3"
    assert formatting.signed(0.26) == "+0.3"
