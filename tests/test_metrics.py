from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.metrics import Evaluation, difference_pp, wilson_interval


def evaluation(correct: list[bool]) -> Evaluation:
    array = np.array(correct)
    return Evaluation(top1=float(array.mean()), loss=0.0, num_samples=len(array), correct=array)


def test_wilson_matches_a_published_value() -> None:
    # 15 of 50, worked out by hand from the formula with z = 1.96.
    interval = wilson_interval(0.3, 50)
    assert (interval.low, interval.high) == pytest.approx((0.1910, 0.4375), abs=2e-4)


@given(successes=st.integers(0, 500), extra=st.integers(0, 500))
def test_wilson_holds_its_value_and_stays_in_range(successes: int, extra: int) -> None:
    n = successes + extra
    share = successes / n if n else 0.0
    interval = wilson_interval(share, n)
    assert 0 <= interval.low <= share + 1e-12
    assert share - 1e-12 <= interval.high <= 1


def test_paired_differences_are_narrower_than_independent_ones() -> None:
    before = evaluation([True] * 90 + [False] * 10)
    after = evaluation([True] * 88 + [False] * 12)
    delta, paired = difference_pp(after, before)
    unpaired = Evaluation(top1=after.top1, loss=0.0, num_samples=100)
    _, independent = difference_pp(unpaired, before)
    assert delta == pytest.approx(-2)
    assert paired.low <= delta <= paired.high
    assert paired.high - paired.low < independent.high - independent.low


def test_the_same_result_differs_by_nothing() -> None:
    same = evaluation([True, False, True])
    delta, interval = difference_pp(same, same)
    assert (delta, interval.low, interval.high) == (0, 0, 0)
