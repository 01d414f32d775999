from __future__ import annotations

import dataclasses

from autoprune.formatting import MISSING
from autoprune.record import Difference, RunRecord
from autoprune.report import narrative
from tests.example_record import FELL_SHORT, REACHED, UNFINISHED


def test_the_answer_is_one_sentence_with_interval_and_machine() -> None:
    sentence = narrative.answer(REACHED)
    assert sentence.startswith("resnet20-cifar10: 50.2 % fewer MACs, 91.73 → 91.21 % top-1")
    assert "95 % interval" in sentence
    assert sentence.endswith("1.55× faster on Intel Xeon, 2 cores.")  # noqa: RUF001
    assert "not finished" in narrative.answer(UNFINISHED)


def test_a_slower_model_is_called_slower() -> None:
    swapped = narrative.comparison(FELL_SHORT.after or FELL_SHORT.before, FELL_SHORT.before, None)
    assert swapped[-1].change.endswith("slower")


def test_without_a_result_the_table_shows_the_original_alone() -> None:
    rows = narrative.comparison(UNFINISHED.before, None, None)
    assert {r.after for r in rows} == {MISSING}


def made_by(trial_top1: float, **changes: object) -> RunRecord:
    """A finished run whose last round's first trial is what was delivered."""
    assert REACHED.after is not None
    last = REACHED.rounds[-1]
    same = dataclasses.replace(
        last.trials[0], macs=REACHED.after.macs, num_params=REACHED.after.params, top1=trial_top1
    )
    rounds = (*REACHED.rounds[:-1], dataclasses.replace(last, trials=(same, *last.trials[1:])))
    return dataclasses.replace(REACHED, rounds=rounds, **changes)  # type: ignore[arg-type]


def test_the_end_says_where_the_delivered_network_came_from() -> None:
    tuning = REACHED.tuning
    assert tuning is not None
    tuned = narrative.ending(made_by(0.9119))
    assert tuned.startswith("What was left of the budget, 3 epochs, took trial 0 of round 4 from 91.19 %")
    missed = dataclasses.replace(tuning, before=0.90)
    assert "had missed the floor with 90.00 %" in narrative.ending(made_by(0.90, tuning=missed))
    worse = dataclasses.replace(tuning, kept=False)
    assert "trial 0 of round 4 is delivered as it was" in narrative.ending(made_by(0.9119, tuning=worse))
    assert "nothing of the budget was left" in narrative.ending(made_by(0.9119, tuning=None))
    nothing = dataclasses.replace(REACHED, after=REACHED.before)
    assert narrative.ending(nothing) == "The original is delivered: no trial stayed inside the floor."
    assert narrative.ending(UNFINISHED) == ""


def test_the_same_network_is_neither_faster_nor_slower() -> None:
    noisy = dataclasses.replace(REACHED.before, latency_ms=5.0)
    assert narrative.comparison(REACHED.before, noisy, None)[-1].change == MISSING


def test_an_unfinished_run_says_how_far_it_is() -> None:
    assert "round 1 promoted a network with 69.0 % of the MACs and 91.62 % top-1" in narrative.answer(
        UNFINISHED
    )
    begun = dataclasses.replace(UNFINISHED, rounds=())
    assert narrative.answer(begun).endswith("not finished; nothing is promoted yet.")


def test_a_larger_loss_on_the_test_split_is_explained() -> None:
    assert narrative.caution(REACHED) == ""
    lost = dataclasses.replace(REACHED, difference=Difference(delta_pp=-1.8, low_pp=-2.9, high_pp=-0.7))
    told = narrative.caution(lost)
    assert "allowed are kept on the search split" in told
    assert "this may be chance" in told
    sure = dataclasses.replace(REACHED, difference=Difference(delta_pp=-3.0, low_pp=-4.0, high_pp=-2.0))
    assert "more than chance explains" in narrative.caution(sure)
    assert narrative.caution(UNFINISHED) == ""
