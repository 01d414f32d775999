from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from autoprune import events as ev
from autoprune.config import Control, Protection, Search
from autoprune.heuristics import DEFAULTS
from autoprune.pipeline.run import run
from autoprune.record import RoundRecord, Rung, TrialRecord
from autoprune.search.controller import Goal, Promotion, State, initial_state
from autoprune.search.near_miss import best_near_miss, can_recover, final_lr, is_near, with_recovered
from tests.tiny import Scripted, tiny_study

GOAL = Goal(baseline_top1=0.92, max_drop_pp=1.0, target_share=0.5)
BEST = Promotion(round=1, trial=0, cost_share=0.8, top1=0.915)


def state(best: Promotion = BEST) -> State:
    return replace(initial_state(GOAL, Control()), best=best, ended="budget")


def trial(number: int, share: float, *tops: float) -> TrialRecord:
    rungs = tuple(Rung(epochs=3.0**i, top1=t) for i, t in enumerate(tops))
    return TrialRecord(
        number=number, state="complete", params={}, cost_share=share, top1=tops[-1], rungs=rungs
    )


def round_of(*trials: TrialRecord) -> RoundRecord:
    return RoundRecord(
        number=2, started_from=1, ceiling=0.5, floor=0.91, planned_trials=3, epochs=1.0, cost_share=0.8,
        trials=trials, sensitivity=(), action="lower", reason="", seconds=1.0,
    )  # fmt: skip


def test_a_model_at_the_target_is_worth_it_before_any_other() -> None:
    cheap_and_hopeful, at_target, further_off = (
        trial(0, 0.51, 0.90, 0.9099), trial(1, 0.5, 0.9049, 0.905), trial(2, 0.4, 0.89, 0.904),
    )  # fmt: skip
    miss = best_near_miss(GOAL, state(), [round_of(cheap_and_hopeful, at_target, further_off)], epochs=1.0)
    assert miss is not None
    assert miss.model.trial == 1
    hopeless = trial(1, 0.5, 0.894, 0.8949)
    miss = best_near_miss(GOAL, state(), [round_of(cheap_and_hopeful, hopeless)], epochs=1.0)
    assert miss is not None
    assert miss.model.trial == 0, "what is too far below the floor was not kept"


def test_the_cheapest_that_may_come_back_is_chosen() -> None:
    hopeful, deeper_but_flat, hopeless = (
        trial(0, 0.55, 0.90, 0.908), trial(1, 0.52, 0.9049, 0.905), trial(2, 0.51, 0.85, 0.88),
    )  # fmt: skip
    miss = best_near_miss(GOAL, state(), [round_of(hopeful, deeper_but_flat, hopeless)], epochs=6.0)
    assert miss is not None
    assert (miss.model.round, miss.model.trial) == (2, 0)
    assert miss.promised == pytest.approx(0.908 + 0.008), "three times the epochs gain as much again"


def test_nothing_is_risked_for_nothing() -> None:
    barely_cheaper, inside, no_time = (
        trial(0, 0.79, 0.90, 0.909), trial(1, 0.5, 0.90, 0.911), trial(2, 0.6, 0.90, 0.905),
    )  # fmt: skip
    assert best_near_miss(GOAL, state(), [round_of(barely_cheaper, inside)], epochs=6.0) is None
    assert best_near_miss(GOAL, state(), [round_of(no_time)], epochs=0.1) is None
    assert best_near_miss(GOAL, state(), [], epochs=6.0) is None


def test_where_only_the_original_is_left_the_nearest_is_tried() -> None:
    original = replace(BEST, round=0, cost_share=1.0, top1=0.92)
    flat, falling = trial(0, 0.5, 0.9059, 0.906), trial(1, 0.6, 0.907, 0.905)
    miss = best_near_miss(GOAL, state(original), [round_of(flat, falling)], epochs=0.1)
    assert miss is not None
    assert miss.model.trial == 0


@pytest.mark.parametrize(
    ("share", "tops", "epochs", "hopeful"),
    [
        (0.5, (0.88, 0.904, 0.905), 6.0, True),  # 2.5 points in two factors of three: 0.6 are missing
        (0.5, (0.904, 0.9045, 0.905), 6.0, False),
        (0.6, (0.88, 0.904, 0.905), 6.0, False),  # short of the target
        (0.5, (0.80, 0.88, 0.89), 60.0, False),  # two points below the floor
        (0.5, (0.905,), 60.0, False),  # nothing is known of its gains
    ],
)
def test_who_may_come_back(share: float, tops: tuple[float, ...], epochs: float, hopeful: bool) -> None:
    assert can_recover(GOAL, trial(0, share, *tops), epochs) is hopeful


def test_a_longer_schedule_has_a_higher_rate() -> None:
    rungs, limits = (Rung(epochs=0.5, top1=0.8), Rung(epochs=2.5, top1=0.9)), (1e-3, 0.2)
    assert final_lr(0.01, rungs, 4.5, limits) == pytest.approx(0.015), "2.25 times the last schedule"
    assert final_lr(0.01, rungs[:1], 8.0, limits) == pytest.approx(0.02), "twice at the most"
    assert final_lr(0.01, rungs, 1.0, limits) == 0.01, "a shorter one keeps it"
    assert final_lr(0.1, rungs, 18.0, limits) == 0.2
    assert final_lr(0.3, rungs, 18.0, limits) == 0.3
    assert final_lr(0.01, (), 8.0, limits) == 0.01


def test_what_came_back_is_the_result() -> None:
    deep = Promotion(round=2, trial=0, cost_share=0.5, top1=0.911)
    assert with_recovered(GOAL, state(), deep).ended == "target"
    assert with_recovered(GOAL, state(), replace(deep, cost_share=0.6)).ended == "budget"
    assert with_recovered(GOAL, state(), deep).best == deep
    assert is_near(GOAL, 0.91 - DEFAULTS.near_margin + 1e-9)
    assert not is_near(GOAL, 0.91 - DEFAULTS.near_margin - 1e-3)


def test_a_run_whose_trials_were_too_short_reaches_its_target_in_the_end(tmp_path: Path) -> None:
    """What is pruned comes back in fifty steps; a trial has one, the final tuning a hundred and more."""
    notes: list[str] = []
    scripted = Scripted(lambda share, steps: 0.92 if share == 1 or steps > 50 else 0.912)
    study = tiny_study(
        budget="epochs=30", max_drop=0.4, search=Search(trials=1, epochs=0.17, criteria=("l1",)),
        control=Control(first_ceiling=0.5, min_rate=0.4), loss=scripted.loss, evaluate=scripted.score,
    )  # fmt: skip
    result = run(
        study, out=tmp_path / "run", protection=Protection(plain=True),
        on_event=lambda e: notes.append(e.message) if isinstance(e, ev.Note) else None,
    )  # fmt: skip
    assert not result.record.rounds[0].trials[0].recovered
    assert "missed the floor" in notes[0]
    assert result.reached
    assert result.after.search_top1 >= result.record.floor
    assert result.after.macs <= 0.5 * result.before.macs
