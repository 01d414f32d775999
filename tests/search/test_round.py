from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch
from optuna.exceptions import UpdateFinishedTrialError

from autoprune import events as ev
from autoprune.config import Budget, Protection, Search
from autoprune.errors import RunError
from autoprune.pipeline.baseline import Work, begin
from autoprune.pipeline.preflight import prepare
from autoprune.pipeline.run import analyse, known_points, stand
from autoprune.record import Rung, TrialRecord
from autoprune.search.budget import Meter, ladder
from autoprune.search.controller import start
from autoprune.search.history import CHECKPOINT, RESULT, read_trials
from autoprune.search.proposals import SHALLOW, Point, params_of, suggest
from autoprune.search.round import (
    FAILED_VALUE,
    MAX_DEATHS,
    TELLING_EPOCHS,
    RoundJob,
    _affordable,
    _earlier,
    _goes_on,
    _is_served,
    _under_way,
    next_point,
    same_failure,
    search_round,
    should_tune_near_miss,
    value_of,
)
from autoprune.search.trial import Climb, run_trial
from autoprune.storage.run_store import RunStore, completed_trials, quiet_optuna, set_attrs
from autoprune.storage.trial_slots import SLOT, claim_slot, finish_trial, release_stale, start_trial
from tests.clock import Clock
from tests.tiny import tiny_study
from tests.training.test_divergence import scaled


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Work]:
    study = tiny_study(search=Search(trials=3, epochs=0.5))
    with quiet_optuna(), closing(RunStore(tmp_path, "tiny", create=True)) as store:
        yield begin(prepare(study, protection=Protection(plain=True)), store, ev.ignore_event, "")


def first_round(work: Work) -> tuple[RoundJob, optuna.Study]:
    state = start(work.goal, work.setup.study.control)
    return analyse(work, state, stand(work, state))


def test_a_round_runs_its_planned_trials_and_keeps_models_inside_the_floor(work: Work) -> None:
    job, study = first_round(work)
    search_round(job, study, known_points(job))
    assert len(completed_trials(study)) == 3
    for record, trial in zip(read_trials(study), completed_trials(study), strict=True):
        assert record.state == "complete"
        assert record.top1 is not None
        assert (CHECKPOINT in trial.user_attrs) == (record.top1 >= job.goal.floor - 1e-9)
        assert trial.value == pytest.approx(value_of(record, job))
        assert record.prune_rate == pytest.approx(record.params["prune_rate"], abs=0.05)


def test_the_first_trial_is_the_prior_at_the_ceiling(work: Work) -> None:
    job, study = first_round(work)
    search_round(replace(job, plan=replace(job.plan, trials=1)), study, known_points(job))
    params = read_trials(study)[0].params
    assert params["prune_rate"] == job.plan.ceiling
    assert params["decay"] == "cosine"
    assert job.search.lr[0] <= params["lr"] <= job.search.lr[1]


def test_a_later_round_starts_from_the_best_of_the_last_and_knows_its_trials(work: Work) -> None:
    job, study = first_round(work)
    search_round(job, study, known_points(job))
    best = max(read_trials(study), key=lambda t: t.top1 or 0)
    plan = replace(job.plan, number=2, ceiling=0.2)
    later, attempt = replace(job, plan=plan), work.store.create_study(2, {})
    deep, safe = known_points(later)
    assert deep == best.params | {"prune_rate": 0.2}
    assert safe["prune_rate"] == pytest.approx(0.1)
    earlier = _earlier(later)
    assert [p.point["lr"] for p in earlier] == [t.params["lr"] for t in completed_trials(study)]
    assert [p.value for p in earlier] == pytest.approx([t.value for t in completed_trials(study)])
    point = next_point(later, attempt, [])
    assert SHALLOW * 0.2 <= point["prune_rate"] <= 0.2
    assert point == next_point(later, attempt, [])


def test_what_a_promoted_round_removed_is_told_as_a_share_of_the_ceiling(work: Work) -> None:
    job, study = first_round(work)
    search_round(job, study, known_points(job))
    plan = replace(job.plan, number=2, started_from=1, ceiling=job.plan.ceiling / 2)
    for past, trial in zip(_earlier(replace(job, plan=plan)), read_trials(study), strict=True):
        assert past.point["prune_rate"] == pytest.approx(trial.params["prune_rate"] / 2)
        assert (past.value > 0) == trial.recovered


def test_a_round_that_recovered_at_its_ceiling_keeps_the_rate_there(work: Work) -> None:
    job, study = first_round(work)
    easy = replace(job, goal=replace(job.goal, max_drop_pp=90), plan=replace(job.plan, floor=0.1, trials=5))
    search_round(easy, study, known_points(easy))
    trials = read_trials(study)
    assert trials[0].recovered
    assert {t.params["prune_rate"] for t in trials} == {job.plan.ceiling}
    assert len({t.params["lr"] for t in trials[:3]}) > 1


@pytest.mark.parametrize(("epochs", "budget", "enough"), [(0.5, 40, True), (5.0, 6, True), (5.0, 40, False)])
def test_a_round_ends_at_the_target_unless_more_trials_cost_little(
    work: Work, epochs: float, budget: float, enough: bool
) -> None:
    job, study = first_round(work)
    free = replace(job.ground.study, search=Search())
    job = replace(
        job, ground=replace(job.ground, study=free), plan=replace(job.plan, trials=4, epochs=epochs),
        goal=replace(job.goal, max_drop_pp=90, target_share=1 - job.plan.ceiling),
        meter=Meter(Budget(epochs=budget)),
    )  # fmt: skip
    assert not _is_served(job, study)
    seat = claim_slot(study, 1, job.owner)
    assert seat is not None
    trial = start_trial(study, seat, known_points(job)[0])
    suggest(trial, job.space)
    record = TrialRecord(
        number=0, state="running", params={}, prune_rate=job.plan.ceiling, top1=0.9, recovered=True,
        cost_share=job.goal.target_share, seconds=1.0,
    )  # fmt: skip
    set_attrs(trial, **{RESULT: record})
    finish_trial(study, trial, 0.5)
    assert _is_served(job, study) is enough
    small = replace(job, meter=Meter(Budget(epochs=8 * ladder(5.0, longer=False)[0])))
    assert not _is_served(small, study) or epochs < TELLING_EPOCHS, "an eighth of the budget for one more"
    asked = replace(job, ground=replace(job.ground, study=replace(free, search=Search(trials=4))))
    assert not _is_served(asked, study), "who asks for a number of trials gets it"


def test_a_trial_that_was_killed_between_two_suggestions_is_tried_again_whole(work: Work) -> None:
    job, study = first_round(work)
    point = known_points(job)[0]
    taken = claim_slot(study, 3, owner=7)
    assert taken is not None
    trial = start_trial(study, taken, point)
    trial.suggest_float("prune_rate", SHALLOW * job.space.ceiling, job.space.ceiling)
    (now,) = _under_way(study)
    assert now.point == point, "others know at once what it will try"
    assert job.space.holds(next_point(job, study, []))
    release_stale(study, alive=())
    again = claim_slot(study, 3, owner=8)
    assert again is not None
    assert (again.number, again.num_deaths, again.retry_point) == (taken.number, 1, point)


def test_a_run_without_any_trial_may_use_what_is_kept_for_the_final_tuning(work: Work) -> None:
    job, study = first_round(work)
    short = replace(job, meter=Meter(Budget(epochs=1.2 * job.plan.epochs)))
    assert _affordable(short, study)
    assert not _affordable(replace(short, meter=Meter(Budget(epochs=0.9 * job.plan.epochs))), study)
    taken = claim_slot(study, job.plan.trials, owner=7)
    assert taken is not None
    assert not _affordable(short, study)


def finished(number: int, share: float, *tops: float, recovered: bool) -> TrialRecord:
    rungs = tuple(Rung(epochs=3.0**i, top1=top1) for i, top1 in enumerate(tops))
    return TrialRecord(
        number=number, state="complete", params={}, cost_share=share, top1=tops[-1], rungs=rungs,
        recovered=recovered, prune_rate=1 - share, seconds=1.0,
    )  # fmt: skip


def test_a_short_budget_goes_to_a_near_miss_at_the_target_once_something_is_safe(work: Work) -> None:
    job, study = first_round(work)
    free = replace(job.ground.study, search=Search())
    goal = replace(job.goal, baseline_top1=0.92, max_drop_pp=1.0, target_share=0.5)
    short = replace(
        job, ground=replace(job.ground, study=free), goal=goal,
        plan=replace(job.plan, trials=4, epochs=3.0, ceiling=0.5), meter=Meter(Budget(epochs=20.0)),
    )  # fmt: skip
    miss, milder = (
        finished(0, 0.5, 0.88, 0.905, recovered=False), finished(1, 0.75, 0.915, recovered=True),
    )  # fmt: skip
    decided = []
    for number, record in enumerate((miss, milder)):
        seat = claim_slot(study, 4, short.owner)
        assert seat is not None
        trial = start_trial(study, seat, known_points(short)[number])
        suggest(trial, short.space)
        set_attrs(trial, **{RESULT: record})
        finish_trial(study, trial, 0.1)
        decided.append((should_tune_near_miss(short, study), _is_served(short, study)))
    assert decided == [(False, False), (True, True)]
    assert not should_tune_near_miss(replace(short, meter=Meter(Budget(epochs=200.0))), study), (
        "the search goes on"
    )
    asked = replace(free, search=Search(trials=4))
    assert not should_tune_near_miss(replace(short, ground=replace(short.ground, study=asked)), study)
    near = climb(0.88, 0.905, share=0.5)
    assert not _goes_on(short, near), "the final tuning has more epochs than a third rung"
    assert _goes_on(replace(short, meter=Meter(Budget(epochs=200.0))), near)
    assert _goes_on(short, climb(0.85, 0.89, share=0.5)), "too far off for the final tuning"


def climb(*tops: float, share: float = 0.8) -> Climb:
    return Climb(prune_rate=0.2, cost_share=share, tops=tops, done=1.0, next_epochs=2.0)


def test_a_trial_leaves_the_ladder_when_it_recovered_or_cannot(work: Work) -> None:
    job, _ = first_round(work)
    floor = job.plan.floor
    assert not _goes_on(job, climb(floor + 0.001))
    assert _goes_on(job, climb(floor - 0.5)), "nothing is known of gains yet"
    assert _goes_on(job, climb(floor - 0.02, floor - 0.01)), "as much again is enough"
    assert not _goes_on(job, climb(floor - 0.02, floor - 0.015)), "as much again is too little"
    used_up = replace(job, meter=Meter(Budget(epochs=1.0)))
    assert not _goes_on(used_up, climb(floor - 0.02, floor - 0.01)), "there are no epochs for it"


def test_a_trial_below_every_gain_so_far_is_given_up(work: Work) -> None:
    job, study = first_round(work)
    for gain in (0.01, 0.02):
        trial = study.ask()
        rungs = (Rung(epochs=1, top1=0.5), Rung(epochs=3, top1=0.5 + gain))
        record = TrialRecord(number=0, state="complete", params={}, top1=0.5, rungs=rungs)
        set_attrs(trial, **{RESULT: record})
        study.tell(trial, -0.1)
    assert _goes_on(job, climb(job.plan.floor - 0.019))
    assert not _goes_on(job, climb(job.plan.floor - 0.021))


def test_a_trial_for_which_time_is_short_hurries_to_its_end(work: Work, clock: Clock) -> None:
    """A training step takes a second: of 600 that are planned the budget allows 100."""
    job, study = first_round(work)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        clock.advance(1.0 if output.requires_grad else 1e-3)
        return torch.nn.functional.cross_entropy(output, target)

    point = known_points(job)[0] | {"criterion": "l1"}  # ranks without a loss
    job = replace(
        job, ground=replace(job.ground, study=replace(job.ground.study, loss=loss)),
        meter=Meter(Budget(seconds=100.0)), speed=replace(job.speed, epoch_s=0.0, trial_s=0.0),
        plan=replace(job.plan, trials=1, epochs=100.0),
    )  # fmt: skip
    search_round(job, study, [point])
    (trial,) = read_trials(study)
    assert trial.state == "complete"
    assert trial.epochs[-1].epoch == pytest.approx(100 / 6, abs=1), "the time was used, and no more"
    assert trial.epochs[-1].lr < 0.02 * max(e.lr for e in trial.epochs), "the schedule came to its end"


@pytest.mark.parametrize("way", ["rates that no arithmetic survives", "finite losses that stay far too high"])
def test_a_diverged_trial_fails_alone(work: Work, way: str) -> None:
    job, study = first_round(work)
    hot = replace(job.ground.study, search=Search(trials=1, epochs=1, lr=(1e9, 1e10)))
    if way.startswith("finite"):
        mild = Search(trials=1, epochs=1, lr=(1e-12, 1e-11), criteria=("l1",))
        hot = replace(hot, search=mild, loss=scaled(lambda step: 1e6 if step > 1 else 1.0))
    job = replace(job, ground=replace(job.ground, study=hot), plan=replace(job.plan, trials=1, epochs=1.0))
    search_round(job, study, [])
    (trial,) = read_trials(study)
    assert trial.state == "failed"
    assert "diverged" in trial.failure
    assert completed_trials(study)[0].value == FAILED_VALUE


def test_whatever_is_raised_fails_the_trial_alone(work: Work) -> None:
    job, _ = first_round(work)
    params = params_of(known_points(job)[0], job.plan.ceiling)

    def failing(error: Exception) -> RoundJob:
        def loss(output: object, target: object) -> torch.Tensor:
            raise error

        study = replace(job.ground.study, loss=loss)
        return replace(job, ground=replace(job.ground, study=study, cached_scores=job.ground.cached_scores))

    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        result = run_trial(failing(error).ground, params, epochs=(0.1,), seed=0)
        assert "memory" in result.record.failure
        assert result.model is None
    told = run_trial(failing(OSError("no such image")).ground, params, epochs=(0.1,), seed=0).record.failure
    assert told.startswith("OSError: no such image (test_round.py:")
    with pytest.raises(RunError):  # storage is away: that is not the trial's fault
        run_trial(failing(RunError("no database", "wait")).ground, params, epochs=(0.1,), seed=0)


def fails_when_tuning(work: Work, wanted: int) -> tuple[RoundJob, list[Point]]:
    """A round in which the first `wanted` trials meet a loss that raises, and what it tries first."""
    job, _ = first_round(work)
    seen: list[int] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if output.requires_grad and len(seen) < wanted:
            seen.append(1)
            raise ValueError("sample 17 is broken")
        return torch.nn.functional.cross_entropy(output, target)

    broken = replace(job, ground=replace(job.ground, study=replace(job.ground.study, loss=loss)))
    return broken, known_points(job)


def test_a_round_goes_on_after_a_failure_and_all_failing_alike_is_noticed(work: Work) -> None:
    study = first_round(work)[1]
    job, known = fails_when_tuning(work, 1)
    search_round(job, study, known)
    trials = read_trials(study)
    assert [t.state for t in trials] == ["failed", "complete", "complete"]
    assert "sample 17 is broken" in trials[0].failure
    assert trials[0].params["lr"] > 0
    assert same_failure(study) is None
    other = work.store.create_study(7, {})
    job, known = fails_when_tuning(work, 3)
    search_round(job, other, known)
    assert "sample 17 is broken" in (same_failure(other) or "")


def test_a_seat_is_taken_once_and_given_back(work: Work) -> None:
    job, study = first_round(work)
    first, second = claim_slot(study, 3, owner=5), claim_slot(study, 3, owner=6)
    assert first is not None
    assert second is not None
    assert (first.number, second.number) == (0, 1)
    point = known_points(job)[0]
    trial = start_trial(study, first, point)
    assert suggest(trial, job.space) == params_of(point, job.plan.ceiling)
    assert [t.number for t in release_stale(study, alive={6})] == [0]
    assert not finish_trial(study, trial, 0.5), "who slept cannot overwrite"
    with pytest.raises(UpdateFinishedTrialError):
        set_attrs(trial, **{RESULT: {}})
    again = claim_slot(study, 3, owner=6)
    assert again is not None
    assert (again.number, again.retry_point, again.num_deaths) == (0, point, 1)
    assert claim_slot(study, 3, owner=7) is not None
    assert claim_slot(study, 3, owner=8) is None
    assert completed_trials(study) == []


CLAIMER = """
import sys
from pathlib import Path
from autoprune.storage.trial_slots import claim_slot
from autoprune.storage.run_store import RunStore
study = RunStore(Path(sys.argv[1]), "tiny").study(9)
sys.stdin.readline()
while (slot := claim_slot(study, 40, owner=int(sys.argv[2]))) is not None:
    study.tell(slot.trial.number, 1.0)
"""


def test_many_processes_never_take_more_seats_than_planned(work: Work) -> None:
    study = work.store.create_study(9, {})
    command = [sys.executable, "-c", CLAIMER, str(work.store.folder)]
    sitters = [subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, text=True) for n in range(3)]
    for sitter in sitters:
        sitter.communicate("\n")
    assert [s.returncode for s in sitters] == [0] * 3
    slots = [t.user_attrs[SLOT] for t in completed_trials(study)]
    assert sorted(slots) == list(range(40))


def test_a_seat_that_kills_every_process_counts_as_failed(work: Work) -> None:
    job, study = first_round(work)
    for _ in range(MAX_DEATHS):
        assert claim_slot(study, 1, owner=3) is not None
        release_stale(study, alive=())
    search_round(replace(job, plan=replace(job.plan, trials=1)), study, known_points(job))
    assert "processes died" in read_trials(study)[-1].failure
    assert completed_trials(study)[0].value == FAILED_VALUE


def test_values_are_lexicographic(work: Work) -> None:
    job, _ = first_round(work)

    def value(rate: float, top1: float | None) -> float:
        share = job.state.current.cost_share * (1 - rate)
        record = TrialRecord(
            number=0, state="complete", params={}, prune_rate=rate, cost_share=share, top1=top1
        )
        return value_of(record, job)

    floor = job.plan.floor
    ranked = [value(0.1, None), value(0.5, 0.0), value(0.3, floor - 0.1), value(0.1, floor - 0.01),
              value(0.05, 1.0), value(0.3, floor), value(0.3, floor + 0.01), value(0.35, floor)]  # fmt: skip
    assert ranked == sorted(ranked)
    assert value(0.35, floor - 0.001) < 0 < value(0.05, floor)
