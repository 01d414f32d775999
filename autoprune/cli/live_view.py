"""The progress of a run for people: finished steps as lines, the present step as a small live panel.

Both are drawn from the events alone, on stderr. Where stderr is no terminal only the lines are written.
Lines that scrolled by stay readable in the scrollback, and the panel is short enough for 80 by 24.
"""

from __future__ import annotations

import math
import re
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.control import Control
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.rule import Rule
from rich.segment import ControlCode, ControlType
from rich.table import Table
from rich.text import Text

from autoprune import events as ev
from autoprune.events import Event, OnEvent
from autoprune.formatting import ACTIONS, METRICS, clock, count, duration, percent, plural, setting, signed

VERBS = ACTIONS | {"finish": "done"}  # its reason says that the target is reached
PANEL = 74  # columns, where there is room: a window that is made narrower has less to fold
ECHOED = 6  # columns left free: a terminal echoes Ctrl-C as ^C, and in the last column that makes a line
GOOD, BAD, MUTED = "green", "yellow", "dim"


@contextmanager
def event_display(*, quiet: bool = False, console: Console | None = None) -> Iterator[OnEvent]:
    """Yield the `on_event` of a run that is watched on this terminal; `quiet` shows nothing."""
    screen = console or Console(stderr=True, highlight=False)
    if quiet:
        yield ev.ignore_event
    elif not screen.is_terminal:
        yield _Lines(screen)
    else:
        panel, lines = _Panel(), _Lines(screen)

        def draw_and_print(event: Event) -> None:
            panel.update(event)
            lines(event)

        window = _Window(screen, panel)
        with Live(console=screen, transient=True, refresh_per_second=4, get_renderable=window.draw):
            yield draw_and_print


class _Window:
    """The panel as wide as the terminal allows, also while somebody drags the terminal's edge."""

    def __init__(self, screen: Console, panel: _Panel) -> None:
        self._screen, self._panel = screen, panel
        self._width, self._height = 0, 0  # of the panel that was drawn last

    def draw(self) -> RenderableType:
        """Return the panel of this moment, which `Live` draws over the last one."""
        screen = self._screen
        if self._width > screen.width:
            self._erase_folds()
        self._width = max(1, min(PANEL, screen.width - ECHOED))
        panel = Constrain(self._panel.render(), self._width)
        self._height = len(screen.render_lines(panel, pad=False))
        return panel

    def _erase_folds(self) -> None:
        """Erase lines that `Live` does not count.

        A terminal that was made narrower folds each line of the last panel into several.
        """
        folds = self._height * (math.ceil(self._width / max(1, self._screen.width)) - 1)
        line: tuple[ControlCode, ...] = ((ControlType.CURSOR_UP, 1), (ControlType.ERASE_IN_LINE, 2))
        self._screen.control(
            Control(ControlType.CARRIAGE_RETURN, (ControlType.ERASE_IN_LINE, 2), *line * folds)
        )


class _Lines:
    """A listener that prints one line for each finished step, with the time since the start."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.start = time.monotonic()

    def __call__(self, event: Event) -> None:
        say = LINES.get(type(event))
        if say is None or (isinstance(event, ev.StageStarted) and event.stage == "search"):
            return
        stamp = Text(f"{clock(time.monotonic() - self.start)}  ", MUTED)
        if self.console.is_terminal:
            hanging = Table.grid(padding=0)
            hanging.add_column(width=len(stamp), no_wrap=True)
            hanging.add_column(no_wrap=True)
            room = max(20, self.console.width - len(stamp))
            hanging.add_row(stamp, Text("\n").join(wrapped(say(event), room)))
            self.console.print(hanging)
        else:  # one event, one line: logs are searched line by line
            self.console.print(stamp + say(event), soft_wrap=True)


def wrapped(text: Text, width: int) -> list[Text]:
    """Break a text into lines of at most `width` that keep a number and its unit together.

    `rich` would part them.
    """
    bound = re.sub(r"(?<=\d) (?=[%A-Za-z])|(?<=\blr) ", "\u00a0", text.plain)
    lines, start = [], 0
    for line in textwrap.wrap(bound, width, break_on_hyphens=False) or [""]:
        start = bound.index(line, start)
        lines.append(text[start : start + len(line)])
        start += len(line)
    return lines


def _run_started(event: ev.RunStarted) -> Text:
    how = "resumed" if event.resumed else "started"
    return Text(
        f"{event.name} {how}: {event.target} within {event.max_drop_pp:g} pp, budget {event.budget}, "
        f"on {event.device}, in {event.out}", "bold",
    )  # fmt: skip


def _stage_started(event: ev.StageStarted) -> Text:
    where = f"round {event.round} " if event.round else ""
    return Text(f"{where}{event.stage}: {event.detail}" if event.detail else f"{where}{event.stage}", MUTED)


def _baseline(event: ev.BaselineMeasured) -> Text:
    metric = METRICS.get(event.metric, event.metric)
    return Text(
        f"baseline: top-1 {percent(event.top1, 2)} (search split, n = {event.num_samples:,}), "
        f"{count(event.macs)} MACs, {count(event.params)} parameters; "
        f"floor {percent(event.floor, 2)}, target {percent(event.target_share)} of the {metric}"
    )


def _round_started(event: ev.RoundStarted) -> Text:
    origin = "the original" if event.started_from == 0 else f"round {event.started_from}"
    return Text(
        f"round {event.round} from {origin}: {plural(event.trials, 'trial')} of "
        f"{setting(event.epochs)} epochs, removing up to {percent(event.ceiling)}, "
        f"floor {percent(event.floor, 2)}", "bold",
    )  # fmt: skip


def _trial_finished(event: ev.TrialFinished) -> Text:
    trial = event.record
    name = f"round {event.round} trial {trial.number}: "
    took = f", {duration(trial.seconds)}"
    if trial.state != "complete":
        return Text(f"{name}failed: {trial.failure}{took}", BAD)
    fate, look = ("recovered", GOOD) if trial.recovered else ("below the floor", BAD)
    return Text.assemble(
        f"{name}{percent(trial.top1, 2)} with {percent(trial.cost_share)} left, ", (fate, look),
        (f"  {describe(trial.params)}{took}", MUTED),
    )  # fmt: skip


def _decided(event: ev.RoundDecided) -> Text:
    look = GOOD if event.action in ("promote", "finish") else BAD
    return Text.assemble(f"round {event.round} ", (VERBS[event.action], f"bold {look}"), f": {event.reason}")


def _note(event: ev.Note) -> Text:
    return Text(f"note: {event.message}", MUTED)


def _run_finished(event: ev.RunFinished) -> Text:
    return Text(event.outcome.message, f"bold {GOOD if event.outcome.reached else BAD}")


LINES: dict[type, Callable[[Any], Text]] = {
    ev.RunStarted: _run_started, ev.StageStarted: _stage_started, ev.BaselineMeasured: _baseline,
    ev.RoundStarted: _round_started, ev.TrialFinished: _trial_finished, ev.RoundDecided: _decided,
    ev.Note: _note, ev.RunFinished: _run_finished,
}  # fmt: skip


def describe(params: dict[str, Any]) -> str:
    """Describe a trial's parameters in a few words; values that speak for themselves have no name."""
    named = {"prune_rate": "rate", "lr": "lr"}
    plain = {"decay", "criterion"}
    words = [f"{named[k]} {setting(v)}" for k, v in params.items() if k in named]
    return ", ".join(words + [str(v) for k, v in params.items() if k in plain])


@dataclass
class _Panel:
    """The present state of a run, gathered from events; `render` is called from the refreshing thread."""

    name: str = ""
    stage: str = "starting"
    detail: str = ""
    round: int = 0
    done: float = 0.0
    total: float = 0.0
    trials: int = 0
    trial: ev.TrialStarted | None = None
    epoch: ev.EpochFinished | None = None
    baseline: ev.BaselineMeasured | None = None
    top1: float | None = None
    cost_share: float = 1.0
    ceiling: float | None = None
    why: str = ""
    budget: ev.BudgetUsed | None = None
    budget_at: float = 0.0
    start: float = field(default_factory=time.monotonic)

    def update(self, event: Event) -> None:
        """Update the state from one event."""
        take = TAKES.get(type(event))
        if take is not None:
            take(self, event)

    def render(self) -> RenderableType:
        """Return the panel of this moment."""
        where = f"round {self.round} · {self.stage}" if self.round else self.stage
        grid = Table.grid(padding=(0, 2, 0, 1), expand=True)
        grid.add_column(width=9, no_wrap=True, style=MUTED)
        grid.add_column(width=9, no_wrap=True)
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        for row in self._rows():
            grid.add_row(*row)
        return Group(Rule(Text(f"{self.name}  {where}"), align="left", style=MUTED), grid)

    def _rows(self) -> Iterator[Sequence[RenderableType]]:
        yield from self._now()
        if self.baseline is not None:
            yield self._accuracy(self.baseline)
            yield from self._cost(self.baseline)
        if self.ceiling is not None and self.stage != "finish":
            yield "ceiling", percent(self.ceiling), Text(self.why, MUTED)
        yield "time", clock(time.monotonic() - self.start), self._time_left()

    def _now(self) -> Iterator[Sequence[RenderableType]]:
        trial, epoch = self.trial, self.epoch  # read once: events arrive on another thread
        if trial is not None and self.stage == "search":
            speed = f"{epoch.images_per_s:,.0f} images/s" if epoch else "pruned; the first epoch is under way"
            yield "trial", str(trial.trial), Text(f"of {self.trials}: {describe(trial.params)}")
            yield "epoch", _epochs(epoch), self._bar(Text(speed, MUTED))
        elif epoch is not None:
            yield "epoch", _epochs(epoch), self._bar(Text(self.detail, MUTED))
        else:
            part = percent(self.done / self.total, 0) if self.total else ""
            yield self.stage, part, self._bar(Text(self.detail, MUTED))

    def _bar(self, text: Text) -> RenderableType:
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_column(no_wrap=True)
        row.add_column(no_wrap=True, overflow="ellipsis")
        row.add_row(ProgressBar(total=self.total or 1, completed=self.done, width=24), text)
        return row

    def _accuracy(self, base: ev.BaselineMeasured) -> Sequence[RenderableType]:
        top1 = self.top1 if self.top1 is not None else base.top1
        room = 100 * (top1 - base.floor)
        text = Text(f"{signed(room, 2)} pp to the floor of {percent(base.floor)}", GOOD if room >= 0 else BAD)
        return "top-1", percent(top1), text

    def _cost(self, base: ev.BaselineMeasured) -> Iterator[Sequence[RenderableType]]:
        bar = ProgressBar(
            total=1 - base.target_share, completed=min(1 - self.cost_share, 1 - base.target_share), width=24
        )
        row = Table.grid(padding=(0, 1, 0, 0))
        row.add_row(bar, Text(f"to the target of {percent(base.target_share)}", MUTED))
        yield METRICS.get(base.metric, base.metric), percent(self.cost_share), row

    def _time_left(self) -> Text:
        used = self.budget
        if used is None:
            return Text("")
        since = time.monotonic() - self.budget_at
        if used.seconds_total is not None:
            left = max(0.0, used.seconds_total - used.seconds - since)
            return Text(f"at most {clock(left)} of the budget left", MUTED)
        if used.epochs_total is not None:
            return Text(f"{used.epochs:.1f} of {used.epochs_total:g} epochs used", MUTED)
        return Text("")


def _epochs(epoch: ev.EpochFinished | None) -> str:
    return f"{epoch.epoch:.3g}/{epoch.epochs:.3g}" if epoch else ""


def _take_stage(panel: _Panel, event: ev.StageStarted) -> None:
    panel.stage, panel.round, panel.detail = event.stage, event.round, event.detail
    panel.done, panel.total, panel.trial, panel.epoch = 0.0, 0.0, None, None


def _take_progress(panel: _Panel, event: ev.StageProgress) -> None:
    panel.done, panel.total = event.done, event.total
    panel.detail = event.detail or panel.detail


def _take_baseline(panel: _Panel, event: ev.BaselineMeasured) -> None:
    panel.baseline, panel.top1 = event, event.top1


def _take_round(panel: _Panel, event: ev.RoundStarted) -> None:
    panel.round, panel.trials, panel.ceiling = event.round, event.trials, event.ceiling
    panel.cost_share = event.cost_share


def _take_trial(panel: _Panel, event: ev.TrialStarted) -> None:
    panel.trial, panel.epoch, panel.done, panel.total = event, None, 0.0, 0.0


def _take_epoch(panel: _Panel, event: ev.EpochFinished) -> None:
    panel.epoch, panel.done, panel.total = event, event.epoch, event.epochs


def _take_decision(panel: _Panel, event: ev.RoundDecided) -> None:
    panel.ceiling, panel.cost_share, panel.top1 = event.ceiling, event.cost_share, event.top1
    panel.why = f"{VERBS[event.action]}: {event.reason}"


def _take_budget(panel: _Panel, event: ev.BudgetUsed) -> None:
    panel.budget, panel.budget_at = event, time.monotonic()


def _take_name(panel: _Panel, event: ev.RunStarted) -> None:
    panel.name = event.name


TAKES: dict[type, Callable[[_Panel, Any], None]] = {
    ev.RunStarted: _take_name, ev.StageStarted: _take_stage, ev.StageProgress: _take_progress,
    ev.BaselineMeasured: _take_baseline, ev.RoundStarted: _take_round, ev.TrialStarted: _take_trial,
    ev.EpochFinished: _take_epoch, ev.RoundDecided: _take_decision, ev.BudgetUsed: _take_budget,
}  # fmt: skip
