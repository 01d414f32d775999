from __future__ import annotations

from dataclasses import dataclass

import pytest

from autoprune.pruning.prunability import (
    Prospect,
    Region,
    cells,
    drop_at,
    free_and_fragile,
    prunability_sentence,
    region,
)


@dataclass(frozen=True)
class Point:
    group: str
    ratio: float
    drop_pp: float


POINTS = [
    Point("free", 0.4, 0.1),
    Point("free", 0.69, 0.3),
    Point("weak", 0.19, 8.0),
    Point("weak", 0.4, 30.0),
]


def prospect(share: float, kind: Region) -> Prospect:
    return Prospect(macs_share=share, top1=0.5, low=0.4, high=0.6, region=kind)


def test_between_measured_points_a_rising_line_is_read() -> None:
    rows = cells(POINTS, (0.2, 0.3, 0.4, 0.9))
    assert [c.is_measured if c else None for c in rows["weak"]] == [True, False, True, None]
    found = rows["weak"][1]
    assert found is not None
    assert 8.0 < found.drop_pp < 30.0
    assert drop_at([Point("g", 0.5, 3.0), Point("g", 0.8, 1.0)], 0.8) == 3.0, "a dip is no way down"
    assert drop_at([], 0.5) is None


def test_groups_are_free_or_fragile_by_what_half_of_them_costs() -> None:
    assert free_and_fragile(POINTS) == (["free"], ["weak"])


@pytest.mark.parametrize(
    ("top1", "kind"), [(0.9, "safe"), (0.86, "safe"), (0.6, "marginal"), (0.3, "hopeless")]
)
def test_regions_lie_between_the_intact_network_and_guessing(top1: float, kind: Region) -> None:
    assert region(top1, 0.9, 10) == kind


def test_the_answer_names_the_least_share_of_each_region() -> None:
    told = prunability_sentence(
        [prospect(0.9, "safe"), prospect(0.8, "safe"), prospect(0.5, "marginal"), prospect(0.4, "hopeless")]
    )
    assert "safe down to 80 % of the MACs" in told
    assert "marginal down to 50 %" in told
    assert "below that hopeless" in told
    assert "small rounds" in prunability_sentence([prospect(0.9, "hopeless")])
