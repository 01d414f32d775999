"""The commands `autoprune run`, `report` and `status`: start a run, look at one."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import threading
import webbrowser
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from autoprune.cli import completion
from autoprune.cli.event_lines import event_writer, write_line
from autoprune.cli.live_view import event_display
from autoprune.cli.options import (
    AIM,
    KEYS,
    SHOW,
    WHERE,
    Artifacts,
    AsJson,
    DataSpec,
    Device,
    Exclude,
    KeepNorms,
    Model,
    Name,
    Only,
    Quiet,
    RoundTo,
    RunArgument,
    Storage,
    Weights,
    changed,
    choose_study,
    digests,
)
from autoprune.cli.tables import comparison_table, plan_text, status_text
from autoprune.config import Protection
from autoprune.errors import AutopruneError, UsageError
from autoprune.events import StageStarted
from autoprune.report import answer, caution, comparison
from autoprune.serialization import json_text, to_plain

if TYPE_CHECKING:
    from autoprune.config import Study
    from autoprune.location import RunLocation
    from autoprune.record import RunResult

NOT_REACHED = 3  # the exit code of a run whose target was out of reach


class StoppedError(AutopruneError):
    """The error of a command that Ctrl-C stopped."""

    exit_code = 130


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """End a command on SIGTERM, which Slurm, Kubernetes and systemd send, as on Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel="Prune", epilog=completion.RUN_EXAMPLES)(run)
    app.command(
        rich_help_panel="Look",
        epilog=completion.examples(
            "report runs/digits --open", "report postgresql://ann@db.site/prune#mine --json"
        ),
    )(report)
    app.command(
        rich_help_panel="Look",
        epilog=completion.examples("status runs/digits", "status postgresql://ann@db.site/prune#mine --json"),
    )(status)


def run(
    context: typer.Context,
    study: Name = None,
    model: Model = None,
    weights: Weights = None,
    data: DataSpec = None,
    exclude: Exclude = None,
    only: Only = None,
    norms: KeepNorms = None,
    round_to: RoundTo = None,
    target: Annotated[str | None, typer.Option(
        metavar="METRIC=VALUE", rich_help_panel=AIM,
        help="What the model may cost: macs=0.5, params=300k or size=2MB.")] = None,
    max_drop: Annotated[float | None, typer.Option(
        metavar="PP", rich_help_panel=AIM, help="Allowed loss of top-1, in percentage points.")] = None,
    budget: Annotated[str | None, typer.Option(
        metavar="TIME", rich_help_panel=AIM,
        help="90s, 30m, 8h, until=07:00, or epochs=40 of fine-tuning.")] = None,
    seed: Annotated[int | None, typer.Option(rich_help_panel=AIM, help="Of everything random.")] = None,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(
        metavar="DIR", rich_help_panel=SHOW, help="The run's folder (default: runs/NAME).",
        show_default=False)] = None,
    storage: Storage = None,
    artifacts: Artifacts = None,
    workers: Annotated[int, typer.Option(
        metavar="N", min=1, rich_help_panel=WHERE, help="Processes on this machine that run trials.")] = 1,
    resume: Annotated[bool, typer.Option(
        "--resume", metavar="", help="Go on with the run, or start it where there is none.")] = False,
    dry_run: Annotated[bool, typer.Option(
        "--dry-run", metavar="", help="Check everything and print the plan.")] = False,
    recipient: Annotated[list[str] | None, typer.Option(
        "--recipient", "-r", metavar="KEY|FILE", rich_help_panel=KEYS, show_default=False,
        help="An age public key, or a file of them; repeatable (default: your own, made on first use).",
    )] = None,
    passphrase: Annotated[bool, typer.Option(
        "--passphrase", metavar="", rich_help_panel=KEYS, help="Ask for a passphrase instead.")] = False,
    passphrase_fd: Annotated[int | None, typer.Option(
        metavar="N", rich_help_panel=KEYS, help="Read the passphrase from file descriptor N.")] = None,
    plain: Annotated[bool, typer.Option(
        "--plain", metavar="", rich_help_panel=KEYS, help="Do not encrypt.")] = False,
    sign: Annotated[Path | None, typer.Option(
        metavar="FILE", rich_help_panel=KEYS,
        help="Sign the result with this Ed25519 secret key (OpenSSH or PEM).")] = None,
    encrypt_run: Annotated[list[str] | None, typer.Option(
        metavar="KEY|FILE", rich_help_panel=KEYS, show_default=False,
        help="Keep the run's checkpoints encrypted to this age public key, too; repeatable.")] = None,
    run_identity: Annotated[list[str] | None, typer.Option(
        metavar="FILE", rich_help_panel=KEYS, show_default=False,
        help="The secret key that opens them for the run (default: your own); repeatable.")] = None,
    as_json: AsJson = False,
    events: Annotated[bool, typer.Option(
        "--events", metavar="", rich_help_panel=SHOW,
        help="Everything that happens as JSON lines on stdout; the last one is the result.")] = False,
    quiet: Quiet = False,
) -> int:  # fmt: skip
    """Prune a trained network to a target, unattended.

    Analysis, pruning, fine-tuning and transformation in rounds, until the target is reached or the
    accuracy floor or the budget says stop. Exit code 3: the target was out of reach, and the deepest
    model inside the floor is delivered.
    """
    refuse_secrets([*(recipient or ()), *(encrypt_run or ()), *(run_identity or ())])
    protection = replace(
        _protection(tuple(recipient or ()), passphrase, passphrase_fd, plain=plain),
        signing_key=None if sign is None else str(sign),
        run_recipients=tuple(encrypt_run or ()), run_identities=tuple(run_identity or ()),
    )  # fmt: skip
    if events and as_json:
        raise UsageError("--events and --json are given", "the last line of --events is what --json prints")
    overrides = {
        "target": target, "max_drop": max_drop, "budget": budget, "seed": seed, "device": device,
        "norms": norms, "round_to": round_to,
    }  # fmt: skip
    words = list(context.obj or ())
    with sigterm_interrupts(), event_display(quiet=quiet or dry_run) as on_event:
        on_event = event_writer(sys.stdout, on_event) if events else on_event
        chosen = changed(choose_study(study, model, weights, data), exclude, only, **overrides)
        location = _run_location(out or Path("runs") / chosen.name, storage, artifacts)
        if dry_run:
            return _show_plan(chosen, location, protection, resume=resume, as_json=as_json)
        on_event(
            StageStarted(stage="check", round=0, detail="data, network, keys, and that it can be delivered")
        )
        from autoprune.pipeline import local_workers
        from autoprune.pipeline import run as run_study

        try:
            with local_workers(location, chosen.name, workers, on_event) as on_run_event:
                result = run_study(
                    chosen, out=location, resume=resume, protection=protection, on_event=on_run_event,
                    command=_command(words), sources=digests(study, model),
                )  # fmt: skip
        except KeyboardInterrupt:
            raise _interrupted(location, chosen.name, words) from None
    return _show_result(result, as_json=as_json, events=events)


def _command(words: list[str]) -> str:
    return shlex.join(["autoprune", *(w for w in words if w != "--resume")])


def _run_location(folder: Path, storage: str | None, artifacts: str | None) -> RunLocation:
    from autoprune.location import RunLocation, parse_artifact_url, parse_database_url

    database = None if storage is None else parse_database_url(storage)
    return RunLocation(folder=folder, database=database, artifacts=parse_artifact_url(artifacts))


def _interrupted(location: RunLocation, name: str, words: list[str]) -> StoppedError:
    from autoprune.storage import run_names_at

    if name not in run_names_at(location):
        return StoppedError("interrupted; nothing was measured yet", f"start again: {_command(words)}")
    return StoppedError(
        f"interrupted; everything finished so far is kept in {location}",
        f"go on with: {_command(words)} --resume",
    )


def _protection(recipients: tuple[str, ...], ask: bool, descriptor: int | None, *, plain: bool) -> Protection:
    """Return the protection of the result: who may open it.

    Raises:
        UsageError: two ways of protection are given at once, or the passphrase is empty.
    """
    options = {
        "--recipient": recipients, "--passphrase": ask, "--passphrase-fd": descriptor is not None,
        "--plain": plain,
    }  # fmt: skip
    used = [option for option, value in options.items() if value]
    if len(used) > 1:
        raise UsageError(f"{used[0]} and {used[1]} are given", "choose one way to protect the result")
    secret = None
    if descriptor is not None:
        secret = read_secret(descriptor)
    elif ask:
        secret = ask_secret("Passphrase", twice=True)
    return Protection(recipients=recipients, passphrase=secret, plain=plain)


def refuse_secrets(texts: Iterable[str]) -> None:
    """Refuse secret keys on the command line, which the shell's history and everyone's process list show.

    Raises:
        UsageError: one of the texts is a secret key.
    """
    from autoprune.crypto import SECRET

    if any(text.strip().upper().startswith(SECRET) for text in texts):
        raise UsageError(
            "a secret key stands on the command line", "put it into a file, and name that; then change it"
        )


def ask_secret(text: str, *, twice: bool = False) -> str:
    """Ask for a passphrase on the terminal, without showing it.

    Raises:
        UsageError: there is no terminal.
    """
    try:
        os.close(os.open("/dev/tty", os.O_RDWR))
    except OSError:
        if not sys.stdin.isatty():
            raise UsageError(
                "there is no terminal to ask for the passphrase on",
                "let it be read from a file descriptor, for example: --passphrase-fd 3 3< FILE",
            ) from None
    return str(typer.prompt(text, hide_input=True, confirmation_prompt=twice, err=True))


def read_secret(descriptor: int) -> str:
    """Read a passphrase from a file descriptor, without the line's end.

    Raises:
        UsageError: the file descriptor gives no passphrase.
    """
    try:
        with os.fdopen(descriptor, encoding="utf-8") as stream:
            secret = stream.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"no passphrase can be read from file descriptor {descriptor}: {error}",
            "for example: --passphrase-fd 3 3< FILE",
        ) from None
    if not secret:
        raise UsageError(f"the passphrase from file descriptor {descriptor} is empty", "write it on one line")
    return secret


def _show_plan(
    study: Study, location: RunLocation, protection: Protection, *, resume: bool, as_json: bool
) -> int:
    from autoprune.pipeline import forecast_run, prepare
    from autoprune.storage import run_cipher

    run_cipher(protection)
    plan = forecast_run(prepare(study, out=location, resume=resume, protection=protection))
    if as_json:
        sys.stdout.write(json_text(plan, indent=1) + "\n")
    else:
        Console(highlight=False).print(plan_text(plan))
    return 0


def _show_result(result: RunResult, *, as_json: bool, events: bool) -> int:
    document = to_plain(result)
    del document["record"]
    if events:
        write_line(sys.stdout, "result", document)
    elif as_json:
        sys.stdout.write(json_text(document, indent=1) + "\n")
    else:
        console = Console(highlight=False)
        console.soft_wrap = not console.is_terminal  # a path that is piped on stays in one piece
        console.print(f"\n{answer(result.record)}\n")
        console.print(comparison_table(comparison(result.before, result.after, result.record.difference)))
        if warning := caution(result.record):
            console.print(f"\n{warning}", style="yellow")
        console.print(
            f"\nreport  {result.report}\nplots   {result.out / 'plots'}\nmodel   {result.model_file}"
        )
    return 0 if result.reached else NOT_REACHED


def report(
    run: RunArgument,
    open_: Annotated[bool, typer.Option("--open", metavar="", help="Show it in the browser.")] = False,
    artifacts: Artifacts = None,
    as_json: AsJson = False,
) -> None:
    """Make a run's report again from its storage, also while it goes on."""
    from autoprune.location import parse_run
    from autoprune.report import to_json, write_report
    from autoprune.search import read_run
    from autoprune.storage import RunStore, read_run_header

    header = read_run_header(parse_run(run, artifacts))
    with closing(RunStore(header.location, header.name)) as store:
        record = read_run(store)
    header.location.folder.mkdir(parents=True, exist_ok=True)
    page = write_report(record, header.location.folder)
    sys.stdout.write(to_json(record) if as_json else f"{page}\n")
    if open_:
        webbrowser.open(page.resolve().as_uri())


def status(run: RunArgument, artifacts: Artifacts = None, as_json: AsJson = False) -> None:
    """Show a run's status: what goes on, rounds, trials, decisions, who works on it, time left."""
    from autoprune.location import parse_run
    from autoprune.pipeline import read_status
    from autoprune.report import to_json

    run_status = read_status(parse_run(run, artifacts))
    if as_json:
        document = json.loads(to_json(run_status.record)) if run_status.record else {"record": None}
        document |= {
            "processes": run_status.processes,
            "seconds_left": run_status.seconds_left,
            "now": run_status.now,
        }
        sys.stdout.write(json_text(document, indent=1) + "\n")
    else:
        Console(highlight=False).print(status_text(run_status))
