from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.config import DECAYS
from autoprune.errors import UsageError
from autoprune.training.schedule import WARMUP_START, Schedule, make_scheduler

EXTRA: dict[str, dict[str, Any]] = {
    "cosine": {}, "linear": {}, "step": {"gamma": 0.1, "milestones": 2}, "exponential": {"gamma": 0.01},
    "onecycle": {"peak": 0.3},
}  # fmt: skip


def rates(schedule: Schedule, num_steps: int) -> list[float]:
    """The rate of every step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make_scheduler(optimizer, schedule, num_steps)
    found = []
    for _ in range(num_steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@given(
    decay=st.sampled_from(DECAYS), num_steps=st.integers(1, 60), lr=st.floats(1e-5, 1.0),
    warmup=st.sampled_from([0.0, 0.1, 0.5, 0.9]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_the_rate_rises_to_its_top_and_only_falls_from_there(
    decay: Any, num_steps: int, lr: float, warmup: float
) -> None:
    found = rates(Schedule(lr=lr, decay=decay, warmup=warmup, **EXTRA[decay]), num_steps)
    top = found.index(max(found))
    assert all(0 <= r <= lr * (1 + 1e-9) for r in found)
    assert all(a <= b * (1 + 1e-9) for a, b in itertools.pairwise(found[: top + 1]))
    assert all(a >= b * (1 - 1e-9) for a, b in itertools.pairwise(found[top:]))
    assert found[top] == pytest.approx(lr)


def test_each_decay_has_its_shape() -> None:
    cosine = rates(Schedule(lr=1.0, decay="cosine", warmup=0.0), 100)
    assert cosine[50] == pytest.approx(0.5)
    assert cosine[-1] < 1e-3
    linear = rates(Schedule(lr=1.0, decay="linear", warmup=0.0, final=0.2), 100)
    assert linear[50] == pytest.approx(0.6)
    step = rates(Schedule(lr=1.0, decay="step", warmup=0.0, gamma=0.1, milestones=2), 90)
    assert [step[i] for i in (0, 29, 30, 59, 60, 89)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    exponential = rates(Schedule(lr=1.0, decay="exponential", warmup=0.0, gamma=0.01), 100)
    assert exponential[50] == pytest.approx(0.1)
    cycle = rates(Schedule(lr=1.0, decay="onecycle", warmup=0.9, peak=0.3), 100)
    assert cycle.index(max(cycle)) == 30
    assert cycle[65] == pytest.approx(0.5)


def test_the_warm_up_starts_at_a_tenth() -> None:
    found = rates(Schedule(lr=0.1, decay="cosine", warmup=0.2), 50)
    assert found[0] == pytest.approx(0.1 * WARMUP_START)
    assert found[10] == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr=0.0 is not allowed"),
        ({"lr": float("inf")}, "lr=inf"),
        ({"warmup": 1.0}, "warmup=1.0"),
        ({"final": 1.0}, "final=1.0"),
        ({"decay": "square"}, "decay='square'"),
        ({"gamma": 0.5}, "gamma=0.5"),
        ({"milestones": 2}, "milestones=2"),
        ({"decay": "step", "gamma": 0.1}, "milestones=None"),
        ({"decay": "step", "milestones": 2}, "gamma=None"),
        ({"decay": "exponential", "gamma": 1.5}, "gamma=1.5"),
        ({"decay": "exponential", "gamma": 0.1, "final": 0.1}, "final=0.1"),
        ({"decay": "onecycle"}, "peak=None"),
        ({"decay": "cosine", "peak": 0.3}, "peak=0.3"),
    ],
)
def test_a_setting_that_is_wrong_or_without_effect_is_an_error(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Schedule(**({"lr": 0.1, "decay": "cosine"} | changes))
