"""The commands `autoprune worker` and `sweep`: many processes on one run, many runs in one night."""

from __future__ import annotations

import math
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from autoprune.cli import completion
from autoprune.cli.live_view import event_display
from autoprune.cli.options import (
    AIM,
    DATA,
    KEYS,
    SHOW,
    Artifacts,
    AsJson,
    Device,
    Quiet,
    RunArgument,
    changed,
    choose_study,
    digests,
)
from autoprune.cli.run import StoppedError, sigterm_interrupts
from autoprune.config import Budget, Protection, Study, Target, next_time
from autoprune.errors import UsageError
from autoprune.serialization import json_text

if TYPE_CHECKING:
    from autoprune.report import JobResult
    from autoprune.storage import RunHeader

PARTLY = 1


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(
        rich_help_panel="Prune",
        epilog=completion.examples(
            "worker runs/mine --device cuda:1",
            "worker postgresql://ann@db.site/prune#mine --study my_study.py",
        ),
    )(worker)
    app.command(
        rich_help_panel="Prune",
        epilog=completion.examples(
            "sweep digits my_study.py --until 07:00",
            "sweep my_study.py --target macs=0.5 --target macs=0.3 --seed 0 --seed 1 --budget 8h",
        ),
    )(sweep)


def worker(
    run: RunArgument,
    artifacts: Artifacts = None,
    study: Annotated[str | None, typer.Option(
        metavar="STUDY", rich_help_panel=DATA, show_default=False, autocompletion=completion.studies,
        help="The study, where the run's own command does not lead to it here.")] = None,
    device: Device = None,
    run_identity: Annotated[list[str] | None, typer.Option(
        metavar="FILE", rich_help_panel=KEYS, show_default=False,
        help="The secret key that opens the run's checkpoints, where they are encrypted.")] = None,
    quiet: Quiet = False,
) -> int:  # fmt: skip
    """Join a run from any process or machine, and run trials of it until it is finished.

    Network, data and settings have to be those that the run was started with, which is checked.
    """
    from autoprune.location import parse_run
    from autoprune.pipeline import run_worker
    from autoprune.storage import read_run_header

    header = read_run_header(parse_run(run, artifacts))
    with sigterm_interrupts(), event_display(quiet=quiet) as on_event:
        command_study = _study_of_command(header, study)
        chosen = command_study.study if device is None else replace(command_study.study, device=device)
        protection = command_study.protection
        if run_identity:
            protection = replace(protection, run_identities=tuple(run_identity))
        try:
            number = run_worker(chosen, header.location, protection=protection, on_event=on_event)
        except KeyboardInterrupt:
            raise StoppedError(
                "interrupted; the run goes on without this worker", "the same command joins again"
            ) from None
    if not quiet:
        sys.stderr.write(f"{header.name} is finished; this worker ran {number} trials\n")
    return 0


@dataclass(frozen=True, kw_only=True)
class _WorkerStudy:
    study: Study
    protection: Protection


def _study_of_command(header: RunHeader, study: str | None) -> _WorkerStudy:
    """Return the study that the run's own command describes.

    Raises:
        UsageError: the command cannot be followed here, or its files have changed.
    """
    if not header.command and study is None:
        raise UsageError(
            "the run was started from Python, so its study has no name", "name it: --study FILE.py"
        )
    words = [w for w in shlex.split(header.command)[2:] if w != "--debug"]
    command: Any = typer.main.get_command(_app()).commands["run"]  # type: ignore[attr-defined]
    params = command.make_context("run", list(words)).params
    if study is not None:
        params |= {"study": study, "model": None, "weights": None, "data": None}
    files = digests(params["study"], params["model"])
    if sorted(files.values()) != sorted(header.sources.values()):
        raise UsageError(
            f"{', '.join(files)} is not the file that the run was started with",
            "give the worker the same file, by the same name or with --study",
        )
    names = ("exclude", "only", "target", "max_drop", "budget", "seed", "device", "norms", "round_to")
    chosen = choose_study(params["study"], params["model"], params["weights"], params["data"])
    protection = Protection(
        run_recipients=tuple(params["encrypt_run"] or ()), run_identities=tuple(params["run_identity"] or ())
    )
    return _WorkerStudy(
        study=changed(chosen, **{name: params[name] for name in names}), protection=protection
    )


def _app() -> typer.Typer:
    from autoprune.cli import run

    app = typer.Typer()
    run.register(app)
    return app


def sweep(
    studies: Annotated[list[str], typer.Argument(
        metavar="STUDY...", help="Built-in studies, or .py files that define one each.",
        autocompletion=completion.studies)],
    target: Annotated[list[str] | None, typer.Option(
        metavar="METRIC=VALUE", rich_help_panel=AIM, show_default=False,
        help="What the models may cost; repeatable: every study runs with each.")] = None,
    max_drop: Annotated[float | None, typer.Option(
        metavar="PP", rich_help_panel=AIM, help="Allowed loss of top-1, in percentage points.")] = None,
    seed: Annotated[list[int] | None, typer.Option(
        rich_help_panel=AIM, show_default=False,
        help="Of everything random; repeatable: every study runs with each.")] = None,
    until: Annotated[str | None, typer.Option(
        metavar="HH:MM", rich_help_panel=AIM, help="When to end, on this machine's clock.")] = None,
    budget: Annotated[str | None, typer.Option(
        metavar="TIME", rich_help_panel=AIM, help="Time for all runs together: 8h.")] = None,
    workers: Annotated[int, typer.Option(
        metavar="N", min=1, rich_help_panel=DATA, help="Processes that work on each run.")] = 1,
    device: Device = None,
    out: Annotated[Path, typer.Option(
        metavar="DIR", rich_help_panel=SHOW, help="The folder of the runs' folders.")] = Path("runs/sweep"),
    recipient: Annotated[list[str] | None, typer.Option(
        "--recipient", "-r", metavar="KEY|FILE", rich_help_panel=KEYS, show_default=False,
        help="An age public key, or a file of them; repeatable (default: your own, made on first use).",
    )] = None,
    plain: Annotated[bool, typer.Option(
        "--plain", metavar="", rich_help_panel=KEYS, help="Do not encrypt.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> int:  # fmt: skip
    """Prune several networks, or one to several targets or with several seeds, one after the other.

    The time is divided among the runs that are left. A run that fails does not stop the others. The same
    command goes on where a sweep was stopped. Exit code 1: some runs are not done.
    """
    from autoprune.cli.study_file import find_study
    from autoprune.pipeline import SweepDeadline, make_jobs, read_job, used_seconds
    from autoprune.pipeline import sweep as run_all
    from autoprune.report import Job, write_sweep_report

    for study in studies:
        find_study(study)
    for text in target or ():
        Target.parse(text)
    jobs = make_jobs(studies, target or (), seed or ())
    if len({job.name for job in jobs}) < len(jobs):
        raise UsageError("two of the runs would have the same folder", "give each of them once")
    shared = _shared_options(max_drop, workers, device, tuple(recipient or ()), plain=plain)
    before = tuple(read_job(job, out) for job in jobs)
    deadline = SweepDeadline(monotonic_s=_deadline(until, budget, used_seconds(before)))

    def command(row: JobResult, end: datetime | None) -> list[str]:
        budget = None if end is None else f"until={end.isoformat(timespec='seconds')}"
        options = {"--target": row.job.target, "--seed": row.job.seed, "--budget": budget}
        own_words = [
            w for option, value in options.items() if value is not None for w in (option, str(value))
        ]
        words = ["run", row.job.study, "--out", str(row.folder), "--resume", *own_words, *shared]
        return [sys.executable, "-m", "autoprune", *words]

    def on_line(job: Job, line: str) -> None:
        if not quiet:
            sys.stderr.write(f"{job.name}  {line}\n")

    out.mkdir(parents=True, exist_ok=True)
    try:
        with sigterm_interrupts():
            rows = run_all(jobs, out, deadline, command, on_line)
    except KeyboardInterrupt:
        write_sweep_report(tuple(read_job(job, out) for job in jobs), out)
        raise StoppedError(
            f"interrupted; everything finished so far is kept in {out}", "the same command goes on"
        ) from None
    files = write_sweep_report(rows, out)
    _show(rows, files, as_json=as_json)
    return 0 if all(row.is_done for row in rows) else PARTLY


def _shared_options(
    max_drop: float | None, workers: int, device: str | None, recipients: tuple[str, ...], *, plain: bool
) -> list[str]:
    words = ["--workers", str(workers)] if workers > 1 else []
    words += [] if max_drop is None else ["--max-drop", str(max_drop)]
    words += [] if device is None else ["--device", device]
    words += [w for key in recipients for w in ("--recipient", key)]
    return [*words, *(["--plain"] if plain else [])]


def _deadline(until: str | None, budget: str | None, used: float) -> float:
    """Return the end of a sweep in seconds of `time.monotonic`, infinite without a limit.

    The time that earlier processes used of the budget counts.

    Raises:
        UsageError: both `until` and `budget` are given, or one of them cannot be read.
    """
    if until is not None and budget is not None:
        raise UsageError("--until and --budget are given", "give one of them")
    if until is not None:
        try:
            parsed = Budget(until=next_time(until, datetime.now()))
        except ValueError:
            hint = "write for example --until 07:00"
            raise UsageError(f"--until {until} is no time of day", hint) from None
    elif budget is not None:
        parsed = Budget.parse(budget)
    else:
        return math.inf
    seconds = parsed.counted(used).seconds
    if seconds is None:
        raise UsageError("the budget of a sweep is a time", "write for example --budget 8h")
    return time.monotonic() + seconds - used


def _show(rows: Sequence[JobResult], files: tuple[Path, ...], *, as_json: bool) -> None:
    from autoprune.report import TEXT_COLUMNS, row_numbers, sweep_answer, sweep_ranges, sweep_table

    if as_json:
        sys.stdout.write(json_text([row_numbers(row) for row in rows], indent=1) + "\n")
        return
    console = Console(highlight=False)
    if not console.is_terminal:  # whoever reads it has lines of any length
        console.soft_wrap, console.width = True, 200
    console.print("\n".join([sweep_answer(rows), *sweep_ranges(rows)]), "", sep="\n")
    texts = sweep_table(rows, short=True)
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for head in texts.heads:
        table.add_column(head, justify="left" if head in TEXT_COLUMNS else "right", no_wrap=True)
    for cells in texts.rows:
        table.add_row(*cells)
    console.print(table)
    for row in rows:
        if row.reason and row.state != "reached":
            console.print(f"{row.job.name}: {row.reason}", style="yellow")
    console.print(f"\nsummary  {', '.join(str(f) for f in files)}")
