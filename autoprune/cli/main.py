"""The entry point: the options of all commands, and how an error becomes a message and an exit code.

Results go to stdout, progress and errors to stderr. Exit codes: 0 done, 1 failed, 2 wrong usage or study,
3 target not reached (the deepest model inside the floor is delivered), 130 interrupted. Each module of
commands has a `register`; none imports torch, optuna or matplotlib before a command needs it.
"""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Sequence
from typing import Annotated, Any

import typer

import autoprune
from autoprune.cli import analyze, artifact, completion, dashboard, doctor, fleet, run
from autoprune.errors import AutopruneError

app = typer.Typer(
    name="autoprune",
    help="Prune a trained network to a target inside an accuracy floor, unattended, and deliver the smaller "
    "network as one verified, encrypted file.",
    epilog=completion.examples("run digits", "run my_study.py --dry-run", "dashboard runs", "doctor"),
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", metavar="", help="Print the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", metavar="", help="Show tracebacks; may stand anywhere on the line.")
    ] = False,
) -> None:
    if show_version:
        typer.echo(f"autoprune {autoprune.__version__}")
        raise typer.Exit


run.register(app)
fleet.register(app)
analyze.register(app)
dashboard.register(app)
doctor.register(app)
artifact.register(app)


def main(args: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code."""
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given
    try:
        code = app(
            [a for a in given if a != "--debug"], prog_name="autoprune", standalone_mode=False, obj=given
        )
    except Exception as error:  # the outermost border: everything ends as a message and an exit code
        if debug:
            traceback.print_exc()
        return _report(error)
    except KeyboardInterrupt:
        return 130
    return code if isinstance(code, int) else 0


def _report(error: Exception) -> int:
    if isinstance(error, AutopruneError):
        print_error(error.message, error.hint)
        return error.exit_code
    if isinstance(error, typer.Abort):
        print_error("aborted", "")
        return 130
    if isinstance(error, typer.TyperException):
        return _report_usage(error)
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()  # the reader of the output is gone: a message would reach nobody
        return 1
    print_error(
        f"{type(error).__name__}: {error}",
        "this is a defect of autoprune; the same command with --debug shows where",
    )
    return 1


def _report_usage(error: typer.TyperException) -> int:
    context: Any = getattr(error, "ctx", None)
    if type(error).__name__ == "NoArgsIsHelpError":
        sys.stdout.write(error.format_message().rstrip() + "\n")
        return 0
    options = [o for p in context.command.params for o in p.opts] if context else []
    close = difflib.get_close_matches(getattr(error, "option_name", ""), options, n=1)
    path = context.command_path if context else "autoprune"
    message, _, _ = error.format_message().partition(" (Possible options")
    message, _, command = message.partition(". Did you mean ")
    near = close[0] if close else command.rstrip("?").replace("'", "")
    print_error(
        _lowered(message.rstrip(".")),
        f"did you mean {near}?" if near else f"{path} --help says what is possible",
    )
    return 2


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]


def print_error(message: str, hint: str) -> None:
    """Write an error and its hint to stderr."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(Text.assemble(("error: ", "bold red"), message))
    if hint:
        console.print(Text.assemble(("hint: ", "bold"), hint))
