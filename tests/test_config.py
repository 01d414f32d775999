from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from autoprune.config import (
    Analysis,
    Baseline,
    Budget,
    Finetune,
    Search,
    Study,
    Target,
    check_study,
    next_time,
)
from autoprune.errors import ConfigError, UsageError
from autoprune.heuristics import Heuristics


def study(**changes: object) -> Study:
    return Study(**{"name": "s", "model": lambda: None, "data": lambda: None, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("macs=0.5", ("macs", 0.5, True)),
        ("params=300k", ("params", 300e3, False)),
        ("macs=2e6", ("macs", 2e6, False)),
        ("size=2MB", ("size", 2e6, False)),
        ("latency=4ms", ("latency", 0.004, False)),
        ("latency=0.7", ("latency", 0.7, True)),
        ("memory=0.6", ("memory", 0.6, True)),
        ("memory=20MB", ("memory", 20e6, False)),
    ],
)
def test_targets_are_read(text: str, expected: tuple[str, float, bool]) -> None:
    target = Target.parse(text)
    assert (target.metric, target.value, target.relative) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["flops=0.5", "macs", "macs=1.5.2", "macs=0", "size=3", "latency=2MB", ""])
def test_other_targets_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        Target.parse(text)
    assert "macs=0.5" in caught.value.hint


def test_relative_targets_are_taken_of_the_original() -> None:
    assert Target.parse("macs=0.5").absolute(1000) == 500
    assert Target.parse("params=300").absolute(1000) == 300


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("30m", 1800), ("1h30m", 5400), ("0.5h", 1800)])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert Budget.parse(text) == Budget(seconds=seconds)


def test_epoch_budgets_are_read() -> None:
    assert Budget.parse("epochs=40") == Budget(epochs=40)


def test_a_time_to_end_is_the_next_that_the_clock_shows() -> None:
    evening = datetime(2026, 3, 1, 22, 30)
    assert next_time("07:00", evening) - evening == timedelta(hours=8.5)
    assert next_time("22:31", evening) - evening == timedelta(minutes=1)
    assert next_time("22:30", evening) - evening == timedelta(days=1)
    assert next_time("2026-02-01T07:00", evening) == datetime(2026, 2, 1, 7)


def test_a_time_to_end_leaves_what_is_left_until_then() -> None:
    then = datetime.now() + timedelta(hours=1)
    budget = Budget.parse(f"until={then.isoformat()}")
    assert budget == Budget(until=then)
    assert budget == Budget.parse(f"until={then.astimezone(UTC).isoformat()}")
    before = datetime.now()
    left = budget.counted(600).seconds
    assert left is not None
    assert (then - datetime.now()).total_seconds() <= left - 600 <= (then - before).total_seconds()
    assert Budget.parse("until=2026-02-01T07:00").counted(600) == Budget(seconds=601)
    assert Budget(seconds=90).counted(600) == Budget(seconds=90)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "30",
        "m",
        "0s",
        "epochs=",
        "epochs=0",
        "epochs=inf",
        "epochs=nan",
        "5 m",
        "until=",
        "until=7",
        "until=24:00",
        "until=07:60",
        "until=now",
        "until=2026-02-30T07:00",
    ],
)
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="neither"):
        Budget.parse(text)


def test_defaults_are_allowed() -> None:
    check_study(study())


def test_all_problems_are_told_together() -> None:
    bad = study(
        name="a/b", target="flops=2", max_drop=-1, analysis=Analysis(share=0.3),
        finetune=Finetune(batch_size=1, optimizer="lion"), search=Search(decays=("cubic",)),  # type: ignore[arg-type]
        baseline=Baseline(epochs=0, lr=-1, batch_size=1, optimizer="adam"), norms="drop",  # type: ignore[arg-type]
    )  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        check_study(bad)
    words = ("a/b", "flops", "max_drop", "analysis.share", "finetune.batch_size", "lion", "cubic")
    of_baseline = ("baseline.epochs", "baseline.lr", "baseline.batch_size", "baseline.optimizer=adam")
    for word in (*words, *of_baseline, "norms=drop"):
        assert word in caught.value.message
    assert caught.value.exit_code == 2


def test_heuristics_are_checked_by_what_their_names_say() -> None:
    check_study(study(heuristics=Heuristics(extension_factor=3.0, final_share=1.0)))
    with pytest.raises(ConfigError) as caught:
        check_study(study(heuristics=Heuristics(final_share=1.5, min_trials=0)))
    assert {p.message for p in caught.value.problems} == {
        "heuristics.final_share=1.5 is not allowed", "heuristics.min_trials=0 is not allowed",
    }  # fmt: skip
