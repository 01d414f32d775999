from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from autoprune import events as ev
from autoprune.cli.live_view import event_display
from autoprune.cli.tables import comparison_table
from autoprune.report.narrative import comparison
from tests.example_record import REACHED, ROUNDS


def story() -> list[ev.Event]:
    """What a short run tells."""
    told: list[ev.Event] = [
        ev.RunStarted(name="digits", out=Path("runs/digits"), target="macs=0.5", max_drop_pp=1.0, budget="2m",
                      device="cpu", resumed=False),
        ev.StageStarted(stage="baseline", round=0, detail="training the baseline"),
        ev.StageProgress(stage="baseline", round=0, done=3, total=10),
        ev.BaselineMeasured(top1=0.9173, num_samples=5000, floor=0.9073, metric="macs", cost=40.8e6,
                            target_share=0.5, macs=40_813_184, params=269_722),
    ]  # fmt: skip
    for one in ROUNDS[:2]:
        told += [
            ev.StageStarted(stage="analysis", round=one.number, detail="each of 12 groups alone"),
            ev.StageStarted(stage="search", round=one.number, detail=""),
            ev.RoundStarted(round=one.number, started_from=one.started_from, ceiling=one.ceiling,
                            floor=one.floor, trials=4, epochs=3.0, cost_share=one.cost_share),
        ]  # fmt: skip
        for trial in one.trials:
            told.append(ev.TrialStarted(round=one.number, trial=trial.number, params=trial.params))
            told.append(ev.EpochFinished(round=one.number, trial=trial.number, epoch=1.0, epochs=3.0, lr=0.01,
                                         train_loss=0.3, images_per_s=612.0))  # fmt: skip
            told.append(ev.BudgetUsed(seconds=30.0, seconds_total=120.0, epochs=1.0, epochs_total=None))
            told.append(ev.TrialFinished(round=one.number, record=trial))
        told.append(ev.RoundDecided(round=one.number, action=one.action or "stop", reason=one.reason,
                                    ceiling=0.2, cost_share=0.69, top1=0.9162))  # fmt: skip
    told.append(ev.Note(message="the budget affords one round more"))
    return told


def tell(console: Console, *, quiet: bool = False) -> None:
    with event_display(quiet=quiet, console=console) as on_event:
        for event in story():
            on_event(event)


def test_without_a_terminal_each_event_is_one_plain_line() -> None:
    text = io.StringIO()
    tell(Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert "\x1b" not in text.getvalue()
    assert any("round 1 trial 3: failed: the loss became infinite" in line for line in lines)
    assert any(line.endswith(ROUNDS[1].reason) for line in lines)
    assert sum("trial" in line and "recovered" in line for line in lines) >= 1
    assert not any(line.endswith("search") for line in lines)


def test_on_a_terminal_nothing_is_wider_than_80_columns() -> None:
    text = io.StringIO()
    tell(
        Console(file=text, width=80, height=24, force_terminal=True, legacy_windows=False, color_system=None)
    )
    plain = Console(file=io.StringIO(), width=200)
    assert (
        max(plain.measure(line).maximum for line in text.getvalue().split("\n") if "\x1b" not in line) <= 80
    )


def test_the_panel_says_where_the_run_stands() -> None:
    text = io.StringIO()
    console = Console(
        file=text, width=80, height=24, force_terminal=True, legacy_windows=False, color_system=None
    )
    with event_display(console=console) as on_event:
        for event in story()[:-12]:
            on_event(event)
    shown = text.getvalue()
    for wanted in ("round 2 · search", "ceiling", "43.8 %", "promoted: 3 of 4", "to the target of 50.0 %",
                   "of the budget left", "pp to the floor of 90.7 %"):  # fmt: skip
        assert wanted in shown, wanted


def test_the_panel_leaves_room_for_the_echo_of_ctrl_c() -> None:
    """In the last column `^C` would begin a new line, and the panel would be cleared one line too low."""
    text = io.StringIO()
    console = Console(
        file=text, width=80, height=24, force_terminal=True, legacy_windows=False, color_system=None
    )
    with event_display(console=console) as on_event:
        for event in story()[:-12]:
            on_event(event)
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue()).replace("\r", "\n")
    panel = [line for line in plain.split("\n") if re.match(r"(time|ceiling|top-1|epoch|MACs) ", line)]
    assert panel
    assert max(len(line) for line in panel) <= 74


def test_quiet_is_silent() -> None:
    text = io.StringIO()
    tell(Console(file=text), quiet=True)
    assert text.getvalue() == ""


@pytest.mark.parametrize("width", [40, 80, 200])
def test_the_table_keeps_its_columns(width: int) -> None:
    text = io.StringIO()
    table = comparison_table(comparison(REACHED.before, REACHED.after, REACHED.difference))
    Console(file=text, width=width).print(table)
    assert "latency" in text.getvalue()
