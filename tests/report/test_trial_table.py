from __future__ import annotations

import io
from dataclasses import replace

import pandas as pd

from autoprune.report.trial_table import importances, trial_frame, trials_csv
from tests.example_record import REACHED, UNFINISHED, one_round, trial


def test_every_trial_is_a_row_with_all_that_it_tried() -> None:
    table = pd.read_csv(io.StringIO(trials_csv(REACHED)))
    assert len(table) == sum(len(r.trials) for r in REACHED.rounds)
    assert set(table["params_decay"]) == {"linear", "cosine", "step"}
    won = table[table["promoted"]]
    assert list(won["round"]) == [1, 3, 4]
    failed = table[table["state"] == "failed"]
    assert list(failed["failure"]) == ["the loss became infinite at step 41"]
    assert failed["top1"].isna().all()


def test_a_running_trial_is_a_row_too() -> None:
    assert list(trial_frame(UNFINISHED)["state"])[-1] == "running"


def test_what_decides_is_found_and_what_does_not_is_not() -> None:
    trials = tuple(
        replace(
            trial(n, 0.3, 0.90 + 0.02 * (lr > 0.01), 0.7),
            params={"prune_rate": 0.3, "lr": lr, "criterion": criterion},
        )
        for n, (lr, criterion) in enumerate(
            [(0.002, "l1"), (0.05, "l1"), (0.004, "l2"), (0.08, "l2"), (0.003, "l1"), (0.06, "l2"),
             (0.02, "l1"), (0.005, "l2")]
        )
    )  # fmt: skip
    record = replace(REACHED, rounds=(one_round(1, 0, 0.35, 1.0, "promote", "", trials),))
    found = importances(record)
    assert found is not None
    assert found.num_trials == 8
    shares = {s.name: s.share for s in found.shares}
    assert shares["lr"] > 0.8 > shares["criterion"]
    assert "prune_rate" not in shares, "it was the same in all trials"


def test_too_few_trials_say_nothing() -> None:
    few = replace(REACHED, rounds=(one_round(1, 0, 0.35, 1.0, "promote", "", REACHED.rounds[0].trials),))
    assert importances(few) is None
