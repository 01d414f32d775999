"""The command `autoprune dashboard`, which shows runs in the browser."""

from __future__ import annotations

import sys
import webbrowser
from typing import Annotated

import typer

from autoprune.cli import completion


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        rich_help_panel="Look",
        epilog=completion.examples(
            "dashboard", "dashboard runs/digits --port 9000", "dashboard postgresql://ann@db.site/prune"
        ),
    )(dashboard)


def dashboard(
    runs: Annotated[str, typer.Argument(
        metavar="RUN|FOLDER|STORAGE",
        help="A run's folder, a folder of runs, or a database (postgresql://...).",
        autocompletion=completion.runs)] = "runs",
    port: Annotated[int | None, typer.Option(
        metavar="N", min=0, max=65535, show_default="8080, or the next that is free",
        help="Where to listen, on 127.0.0.1 alone; 0 takes any port that is free.")] = None,
    no_browser: Annotated[bool, typer.Option(
        "--no-browser", metavar="", help="Only print the address.")] = False,
) -> None:  # fmt: skip
    """Show runs in the browser, finished or still going on; Ctrl-C ends it.

    It is optuna-dashboard, for this machine alone and read-only: nothing that is clicked changes a run.
    """
    from autoprune.report import open_dashboard

    server = open_dashboard(runs, port)
    sys.stdout.write(f"{server.address}\n")
    sys.stdout.flush()
    sys.stderr.write(f"shows {', '.join(server.runs)}; Ctrl-C ends it\n")
    if not no_browser:
        webbrowser.open(server.address)
    server.serve()
