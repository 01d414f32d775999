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
from autoprune.config import Budget, Protection, Search, Study
from autoprune.errors import RunError
from autoprune.heuristics import DEFAULTS
from autoprune.pipeline.baseline import start_run
from autoprune.pipeline.preflight import prepare
from autoprune.pipeline.run import analyze, load_round_start
from autoprune.record import Rung, TrialRecord
from autoprune.search.budget import BudgetTracker, rung_epochs
from autoprune.search.context import RunContext
from autoprune.search.controller import initial_state
from autoprune.search.history import CHECKPOINT, RESULT, read_trials
from autoprune.search.proposals import suggest
from autoprune.search.round import (
    FAILED_VALUE,
    RoundSearch,
    _affords_trial,
    _has_enough_trials,
    _of_previous_round,
    _of_running_trials,
    _should_continue,
    next_point,
    same_failure,
    search_round,
    should_tune_near_miss,
    starting_points,
    value_of,
)
from autoprune.search.trial import RungState, TrialParams, run_trial
from autoprune.storage.run_store import RunStore, completed_trials, quiet_optuna, set_attrs
from autoprune.storage.trial_slots import SLOT, claim_slot, finish_trial, release_stale, start_trial
from autoprune.tasks import task_of
from tests.clock import Clock
from tests.tiny import tiny_study
from tests.training.test_divergence import scaled


@pytest.fixture
def run(tmp_path: Path) -> Iterator[RunContext]:
    study = tiny_study(search=Search(trials=3, epochs=0.5))
    with quiet_optuna(), closing(RunStore(tmp_path, "tiny", create=True)) as store:
        yield start_run(prepare(study, protection=Protection(plain=True)), store, ev.ignore_event, "")


def vary(search: RoundSearch, *, study: Study | None = None, **changes: object) -> RoundSearch:
    """The same round of another study, or with another goal, budget, or field of its entry."""
    problem = search.run.problem
    if study is not None:
        problem = replace(problem, study=study, task=task_of(study))
    run = replace(search.run, problem=problem)
    run = replace(run, **{n: changes.pop(n) for n in ("goal", "budget") if n in changes})
    context = replace(search.context, problem=problem)
    return replace(search, run=run, context=context, entry=replace(search.entry, **changes))


def first_round(run: RunContext) -> tuple[RoundSearch, optuna.Study]:
    state = initial_state(run.goal, run.problem.study.control)
    return analyze(run, state, load_round_start(run, state))


def test_a_round_runs_its_planned_trials_and_keeps_models_inside_the_floor(run: RunContext) -> None:
    search, study = first_round(run)
    search_round(search, study, starting_points(search))
    assert len(completed_trials(study)) == 3
    for record, trial in zip(read_trials(study), completed_trials(study), strict=True):
        assert record.state == "complete"
        assert record.top1 is not None
        assert (CHECKPOINT in trial.user_attrs) == (record.top1 >= search.run.goal.floor - 1e-9)
        assert trial.value == pytest.approx(value_of(record, search))
        assert record.prune_rate == pytest.approx(record.params["prune_rate"], abs=0.05)


def test_the_first_trial_is_the_prior_at_the_ceiling(run: RunContext) -> None:
    search, study = first_round(run)
    search_round(vary(search, trials=1), study, starting_points(search))
    params = read_trials(study)[0].params
    assert params["prune_rate"] == search.entry.ceiling
    assert params["decay"] == "cosine"
    assert search.settings.lr[0] <= params["lr"] <= search.settings.lr[1]


def test_a_later_round_starts_from_the_best_of_the_last_and_knows_its_trials(run: RunContext) -> None:
    search, study = first_round(run)
    search_round(search, study, starting_points(search))
    best = max(read_trials(study), key=lambda t: t.top1 or 0)
    later, attempt = vary(search, number=2, ceiling=0.2), run.store.create_study(2, {})
    deep, safe = starting_points(later)
    assert deep == replace(TrialParams.from_optuna(best.params), prune_rate=0.2)
    assert safe.prune_rate == pytest.approx(0.1)
    earlier = _of_previous_round(later)
    assert [p.params.lr for p in earlier] == [t.params["lr"] for t in completed_trials(study)]
    assert [p.value for p in earlier] == pytest.approx([t.value for t in completed_trials(study)])
    point = next_point(later, attempt, [])
    assert later.space.min_rate <= point.prune_rate <= 0.2
    assert point == next_point(later, attempt, [])


def test_what_a_promoted_round_removed_is_told_as_a_share_of_the_ceiling(run: RunContext) -> None:
    search, study = first_round(run)
    search_round(search, study, starting_points(search))
    later = vary(search, number=2, started_from=1, ceiling=search.entry.ceiling / 2)
    for past, trial in zip(_of_previous_round(later), read_trials(study), strict=True):
        assert past.params.prune_rate == pytest.approx(trial.params["prune_rate"] / 2)
        assert (past.value > 0) == trial.recovered


def test_a_round_that_recovered_at_its_ceiling_keeps_the_rate_there(run: RunContext) -> None:
    search, study = first_round(run)
    easy = vary(search, goal=replace(search.run.goal, max_drop_pp=90), floor=0.1, trials=5)
    search_round(easy, study, starting_points(easy))
    trials = read_trials(study)
    assert trials[0].recovered
    assert {t.params["prune_rate"] for t in trials} == {search.entry.ceiling}
    assert len({t.params["lr"] for t in trials[:3]}) > 1


@pytest.mark.parametrize(("epochs", "budget", "enough"), [(0.5, 40, True), (5.0, 6, True), (5.0, 40, False)])
def test_a_round_ends_at_the_target_unless_more_trials_cost_little(
    run: RunContext, epochs: float, budget: float, enough: bool
) -> None:
    search, study = first_round(run)
    free = replace(search.run.problem.study, search=Search())
    goal = replace(search.run.goal, max_drop_pp=90, target_share=1 - search.entry.ceiling)
    search = vary(
        search, study=free, trials=4, epochs=epochs, goal=goal, budget=BudgetTracker(Budget(epochs=budget)),
    )  # fmt: skip
    assert not _has_enough_trials(search, study)
    slot = claim_slot(study, 1, search.run.owner)
    assert slot is not None
    trial = start_trial(study, slot, starting_points(search)[0].to_optuna())
    suggest(trial, search.space)
    record = TrialRecord(
        number=0, state="running", params={}, prune_rate=search.entry.ceiling, top1=0.9, recovered=True,
        cost_share=search.run.goal.target_share, seconds=1.0,
    )  # fmt: skip
    set_attrs(trial, **{RESULT: record})
    finish_trial(study, trial, 0.5)
    assert _has_enough_trials(search, study) is enough
    small = vary(search, budget=BudgetTracker(Budget(epochs=8 * rung_epochs(5.0, extend=False)[0])))
    assert not _has_enough_trials(small, study) or epochs < DEFAULTS.informative_epochs, (
        "an eighth of the budget for one more"
    )
    asked = vary(search, study=replace(free, search=Search(trials=4)))
    assert not _has_enough_trials(asked, study), "who asks for a number of trials gets it"


def test_a_trial_that_was_killed_between_two_suggestions_is_tried_again_whole(run: RunContext) -> None:
    search, study = first_round(run)
    point = starting_points(search)[0]
    slot = claim_slot(study, 3, owner=7)
    assert slot is not None
    trial = start_trial(study, slot, point.to_optuna())
    trial.suggest_float("prune_rate", search.space.min_rate, search.space.ceiling)
    (now,) = _of_running_trials(study)
    assert now.params == point, "others know at once what it will try"
    assert search.space.contains(next_point(search, study, []))
    release_stale(study, alive=())
    again = claim_slot(study, 3, owner=8)
    assert again is not None
    assert (again.number, again.num_deaths, again.retry_point) == (slot.number, 1, point.to_optuna())


def test_a_run_without_any_trial_may_use_what_is_kept_for_the_final_tuning(run: RunContext) -> None:
    search, study = first_round(run)
    short = vary(search, budget=BudgetTracker(Budget(epochs=1.2 * search.entry.epochs)))
    assert _affords_trial(short, study)
    shorter = vary(search, budget=BudgetTracker(Budget(epochs=0.9 * search.entry.epochs)))
    assert not _affords_trial(shorter, study)
    assert claim_slot(study, search.entry.trials, owner=7) is not None
    assert not _affords_trial(short, study)


def finished(number: int, share: float, *tops: float, recovered: bool) -> TrialRecord:
    rungs = tuple(Rung(epochs=3.0**i, top1=top1) for i, top1 in enumerate(tops))
    return TrialRecord(
        number=number, state="complete", params={}, cost_share=share, top1=tops[-1], rungs=rungs,
        recovered=recovered, prune_rate=1 - share, seconds=1.0,
    )  # fmt: skip


def test_a_short_budget_goes_to_a_near_miss_at_the_target_once_something_is_safe(run: RunContext) -> None:
    search, study = first_round(run)
    free = replace(search.run.problem.study, search=Search())
    goal = replace(search.run.goal, baseline_top1=0.92, max_drop_pp=1.0, target_share=0.5)
    short = vary(
        search,
        study=free,
        goal=goal,
        trials=4,
        epochs=3.0,
        ceiling=0.5,
        budget=BudgetTracker(Budget(epochs=20.0)),
    )
    miss, milder = (
        finished(0, 0.5, 0.88, 0.905, recovered=False), finished(1, 0.75, 0.915, recovered=True),
    )  # fmt: skip
    decided = []
    for number, record in enumerate((miss, milder)):
        slot = claim_slot(study, 4, short.run.owner)
        assert slot is not None
        trial = start_trial(study, slot, starting_points(short)[number].to_optuna())
        suggest(trial, short.space)
        set_attrs(trial, **{RESULT: record})
        finish_trial(study, trial, 0.1)
        decided.append((should_tune_near_miss(short, study), _has_enough_trials(short, study)))
    assert decided == [(False, False), (True, True)]
    assert not should_tune_near_miss(vary(short, budget=BudgetTracker(Budget(epochs=200.0))), study), (
        "the search goes on"
    )
    asked = replace(free, search=Search(trials=4))
    assert not should_tune_near_miss(vary(short, study=asked), study)
    near = climb(0.88, 0.905, share=0.5)
    assert not _should_continue(short, near), "the final tuning has more epochs than a third rung"
    assert _should_continue(vary(short, budget=BudgetTracker(Budget(epochs=200.0))), near)
    assert _should_continue(short, climb(0.85, 0.89, share=0.5)), "too far off for the final tuning"


def climb(*tops: float, share: float = 0.8) -> RungState:
    return RungState(prune_rate=0.2, cost_share=share, top1s=tops, epochs=1.0, next_epochs=2.0)


def test_a_trial_leaves_the_ladder_when_it_recovered_or_cannot(run: RunContext) -> None:
    search, _ = first_round(run)
    floor = search.entry.floor
    assert not _should_continue(search, climb(floor + 0.001))
    assert _should_continue(search, climb(floor - 0.5)), "nothing is known of gains yet"
    assert _should_continue(search, climb(floor - 0.02, floor - 0.01)), "as much again is enough"
    assert not _should_continue(search, climb(floor - 0.02, floor - 0.015)), "as much again is too little"
    used_up = vary(search, budget=BudgetTracker(Budget(epochs=1.0)))
    assert not _should_continue(used_up, climb(floor - 0.02, floor - 0.01)), "there are no epochs for it"


def test_a_trial_below_every_gain_so_far_is_given_up(run: RunContext) -> None:
    search, study = first_round(run)
    for gain in (0.01, 0.02):
        trial = study.ask()
        rungs = (Rung(epochs=1, top1=0.5), Rung(epochs=3, top1=0.5 + gain))
        record = TrialRecord(number=0, state="complete", params={}, top1=0.5, rungs=rungs)
        set_attrs(trial, **{RESULT: record})
        study.tell(trial, -0.1)
    assert _should_continue(search, climb(search.entry.floor - 0.019))
    assert not _should_continue(search, climb(search.entry.floor - 0.021))


def test_a_trial_for_which_time_is_short_hurries_to_its_end(run: RunContext, clock: Clock) -> None:
    """A training step takes a second: of 600 that are planned the budget allows 100."""
    search, study = first_round(run)

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        clock.advance(1.0 if output.requires_grad else 1e-3)
        return torch.nn.functional.cross_entropy(output, target)

    point = replace(starting_points(search)[0], criterion="l1")  # ranks without a loss
    search = replace(search, speed=replace(search.speed, epoch_s=0.0, trial_s=0.0))
    timed = replace(search.run.problem.study, loss=loss)
    budget = BudgetTracker(Budget(seconds=100.0))
    search_round(vary(search, study=timed, budget=budget, trials=1, epochs=100.0), study, [point])
    (trial,) = read_trials(study)
    assert trial.state == "complete"
    assert trial.epochs[-1].epoch == pytest.approx(100 / 6, abs=1), "the time was used, and no more"
    assert trial.epochs[-1].lr < 0.02 * max(e.lr for e in trial.epochs), "the schedule came to its end"


@pytest.mark.parametrize("way", ["rates that no arithmetic survives", "finite losses that stay far too high"])
def test_a_diverged_trial_fails_alone(run: RunContext, way: str) -> None:
    search, study = first_round(run)
    hot = replace(search.run.problem.study, search=Search(trials=1, epochs=1, lr=(1e9, 1e10)))
    if way.startswith("finite"):
        mild = Search(trials=1, epochs=1, lr=(1e-12, 1e-11), criteria=("l1",))
        hot = replace(hot, search=mild, loss=scaled(lambda step: 1e6 if step > 1 else 1.0))
    search = vary(search, study=hot, trials=1, epochs=1.0)
    search_round(search, study, [])
    (trial,) = read_trials(study)
    assert trial.state == "failed"
    assert "diverged" in trial.failure
    assert completed_trials(study)[0].value == FAILED_VALUE


def test_whatever_is_raised_fails_the_trial_alone(run: RunContext) -> None:
    search, _ = first_round(run)
    params = search.space.snap(starting_points(search)[0])

    def failing(error: Exception) -> RoundSearch:
        def loss(output: object, target: object) -> torch.Tensor:
            raise error

        return vary(search, study=replace(search.run.problem.study, loss=loss))

    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        result = run_trial(failing(error).context, params, rungs=(0.1,), seed=0)
        assert "memory" in result.record.failure
        assert result.model is None
    result = run_trial(failing(OSError("no such image")).context, params, rungs=(0.1,), seed=0)
    assert result.record.failure.startswith("OSError: no such image (test_round.py:")
    with pytest.raises(RunError):  # storage is away: that is not the trial's fault
        run_trial(failing(RunError("no database", "wait")).context, params, rungs=(0.1,), seed=0)


def fails_when_tuning(run: RunContext, wanted: int) -> tuple[RoundSearch, list[TrialParams]]:
    """A round in which the first `wanted` trials meet a loss that raises, and what it tries first."""
    search, _ = first_round(run)
    seen: list[int] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if output.requires_grad and len(seen) < wanted:
            seen.append(1)
            raise ValueError("sample 17 is broken")
        return torch.nn.functional.cross_entropy(output, target)

    broken = vary(search, study=replace(search.run.problem.study, loss=loss))
    return broken, starting_points(search)


def test_a_round_should_continue_after_a_failure_and_all_failing_alike_is_noticed(run: RunContext) -> None:
    study = first_round(run)[1]
    search, known = fails_when_tuning(run, 1)
    search_round(search, study, known)
    trials = read_trials(study)
    assert [t.state for t in trials] == ["failed", "complete", "complete"]
    assert "sample 17 is broken" in trials[0].failure
    assert trials[0].params["lr"] > 0
    assert same_failure(study) is None
    other = run.store.create_study(7, {})
    search, known = fails_when_tuning(run, 3)
    search_round(search, other, known)
    assert "sample 17 is broken" in (same_failure(other) or "")


def test_a_slot_is_taken_once_and_given_back(run: RunContext) -> None:
    search, study = first_round(run)
    first, second = claim_slot(study, 3, owner=5), claim_slot(study, 3, owner=6)
    assert first is not None
    assert second is not None
    assert (first.number, second.number) == (0, 1)
    point = starting_points(search)[0]
    trial = start_trial(study, first, point.to_optuna())
    assert suggest(trial, search.space) == search.space.snap(point)
    assert [t.number for t in release_stale(study, alive={6})] == [0]
    assert not finish_trial(study, trial, 0.5), "who slept cannot overwrite"
    with pytest.raises(UpdateFinishedTrialError):
        set_attrs(trial, **{RESULT: {}})
    again = claim_slot(study, 3, owner=6)
    assert again is not None
    assert (again.number, again.retry_point, again.num_deaths) == (0, point.to_optuna(), 1)
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


def test_many_processes_never_take_more_slots_than_planned(run: RunContext) -> None:
    study = run.store.create_study(9, {})
    command = [sys.executable, "-c", CLAIMER, str(run.store.folder)]
    claimers = [subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, text=True) for n in range(3)]
    for claimer in claimers:
        claimer.communicate("\n")
    assert [s.returncode for s in claimers] == [0] * 3
    slots = [t.user_attrs[SLOT] for t in completed_trials(study)]
    assert sorted(slots) == list(range(40))


def test_a_slot_that_kills_every_process_counts_as_failed(run: RunContext) -> None:
    search, study = first_round(run)
    for _ in range(DEFAULTS.max_deaths):
        assert claim_slot(study, 1, owner=3) is not None
        release_stale(study, alive=())
    search_round(vary(search, trials=1), study, starting_points(search))
    assert "processes died" in read_trials(study)[-1].failure
    assert completed_trials(study)[0].value == FAILED_VALUE


def test_values_are_lexicographic(run: RunContext) -> None:
    search, _ = first_round(run)

    def value(rate: float, top1: float | None) -> float:
        share = search.state.current.cost_share * (1 - rate)
        record = TrialRecord(
            number=0, state="complete", params={}, prune_rate=rate, cost_share=share, top1=top1
        )
        return value_of(record, search)

    floor = search.entry.floor
    ranked = [value(0.1, None), value(0.5, 0.0), value(0.3, floor - 0.1), value(0.1, floor - 0.01),
              value(0.05, 1.0), value(0.3, floor), value(0.3, floor + 0.01), value(0.35, floor)]  # fmt: skip
    assert ranked == sorted(ranked)
    assert value(0.35, floor - 0.001) < 0 < value(0.05, floor)
