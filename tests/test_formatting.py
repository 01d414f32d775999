from __future__ import annotations

import dataclasses

import pytest

from autoprune import formatting
from autoprune.record import Difference, RunRecord
from tests.example_record import FELL_SHORT, REACHED, UNFINISHED


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


def test_the_answer_is_one_sentence_with_interval_and_machine() -> None:
    sentence = formatting.answer(REACHED)
    assert sentence.startswith("resnet20-cifar10: 50.2 % fewer MACs, 91.73 → 91.21 % top-1")
    assert "95 % interval" in sentence
    assert sentence.endswith("1.55× faster on Intel Xeon, 2 cores.")  # noqa: RUF001
    assert "not finished" in formatting.answer(UNFINISHED)


def test_a_slower_model_is_called_slower() -> None:
    swapped = formatting.comparison(FELL_SHORT.after or FELL_SHORT.before, FELL_SHORT.before, None)
    assert swapped[-1].change.endswith("slower")


def test_without_a_result_the_table_shows_the_original_alone() -> None:
    rows = formatting.comparison(UNFINISHED.before, None, None)
    assert {r.after for r in rows} == {formatting.MISSING}


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
    tuned = formatting.ending(made_by(0.9119))
    assert tuned.startswith("What was left of the budget, 3 epochs, took trial 0 of round 4 from 91.19 %")
    missed = dataclasses.replace(tuning, before=0.90)
    assert "had missed the floor with 90.00 %" in formatting.ending(made_by(0.90, tuning=missed))
    worse = dataclasses.replace(tuning, kept=False)
    assert "trial 0 of round 4 is delivered as it was" in formatting.ending(made_by(0.9119, tuning=worse))
    assert "nothing of the budget was left" in formatting.ending(made_by(0.9119, tuning=None))
    nothing = dataclasses.replace(REACHED, after=REACHED.before)
    assert formatting.ending(nothing) == "The original is delivered: no trial stayed inside the floor."
    assert formatting.ending(UNFINISHED) == ""


def test_the_same_network_is_neither_faster_nor_slower() -> None:
    noisy = dataclasses.replace(REACHED.before, latency_ms=5.0)
    assert formatting.comparison(REACHED.before, noisy, None)[-1].change == formatting.MISSING


def test_an_unfinished_run_says_how_far_it_is() -> None:
    assert "round 1 promoted a network with 69.0 % of the MACs and 91.62 % top-1" in formatting.answer(
        UNFINISHED
    )
    begun = dataclasses.replace(UNFINISHED, rounds=())
    assert formatting.answer(begun).endswith("not finished; nothing is promoted yet.")


def test_a_larger_loss_on_the_test_split_is_explained() -> None:
    assert formatting.caution(REACHED) == ""
    lost = dataclasses.replace(REACHED, difference=Difference(delta_pp=-1.8, low_pp=-2.9, high_pp=-0.7))
    told = formatting.caution(lost)
    assert "allowed are kept on the search split" in told
    assert "this may be chance" in told
    sure = dataclasses.replace(REACHED, difference=Difference(delta_pp=-3.0, low_pp=-4.0, high_pp=-2.0))
    assert "more than chance explains" in formatting.caution(sure)
    assert formatting.caution(UNFINISHED) == ""
