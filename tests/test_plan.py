from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.errors import ArtifactError, UsageError
from autoprune.plan import PruningPlan


@dataclass(frozen=True)
class Units:
    name: str
    num_units: int
    min_keep: int = 1


@dataclass(frozen=True)
class Groups:
    groups: tuple[Units, ...]


GRAPH = Groups(groups=(Units("a", 8), Units("b", 5)))


def test_a_full_plan_keeps_everything() -> None:
    plan = PruningPlan.full(GRAPH)
    assert {n: list(k) for n, k in plan.keep.items()} == {"a": list(range(8)), "b": list(range(5))}


@given(ratio=st.floats(0, 0.99), again=st.floats(0, 0.99), seed=st.integers(0, 10))
def test_two_plans_are_one(ratio: float, again: float, seed: int) -> None:
    first = PruningPlan.random(GRAPH, ratio, seed)
    left = Groups(groups=tuple(Units(n, len(k)) for n, k in first.keep.items()))
    second = PruningPlan.random(left, again, seed + 1)
    composed = first.compose(second)
    for group in GRAPH.groups:
        channels = np.arange(group.num_units)[first.keep[group.name]][second.keep[group.name]]
        assert list(composed.keep[group.name]) == list(channels)
        assert composed.num_units[group.name] == group.num_units


def test_groups_that_a_plan_does_not_mention_stay_whole() -> None:
    plan = PruningPlan(keep={"a": np.array([1, 3])}, num_units={"a": 8})
    assert list(plan.kept("b", 5)) == [0, 1, 2, 3, 4]
    later = plan.compose(PruningPlan(keep={"b": np.array([2])}, num_units={"b": 5}))
    assert (list(later.keep["a"]), list(later.keep["b"])) == ([1, 3], [2])


def test_plans_that_do_not_fit_are_refused() -> None:
    plan = PruningPlan(keep={"a": np.array([1, 3])}, num_units={"a": 8})
    with pytest.raises(UsageError, match="leaves 2 units of 'a'"):
        plan.compose(PruningPlan(keep={"a": np.array([0])}, num_units={"a": 8}))


@pytest.mark.parametrize("kept", [[], [-1], [8], [3, 3], [4, 2]])
def test_impossible_units_are_refused(kept: list[int]) -> None:
    with pytest.raises(UsageError, match=r"0\.\.7"):
        PruningPlan(keep={"a": np.array(kept, dtype=np.int64)}, num_units={"a": 8})


def test_json_goes_there_and_back() -> None:
    plan = PruningPlan.random(GRAPH, 0.5, 3)
    again = PruningPlan.from_json(plan.to_json())
    assert again == plan
    assert again.digest == plan.digest
    assert hash(again) == hash(plan)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"autoprune_plan": 2, "groups": {}}',
                                  '{"autoprune_plan": 1, "groups": {"a": {}}}'])  # fmt: skip
def test_other_texts_are_refused(text: str) -> None:
    with pytest.raises(ArtifactError, match="not a pruning plan"):
        PruningPlan.from_json(text)
