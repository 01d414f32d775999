"""The command line: `autoprune COMMAND`, with Typer for the options and rich for the output.

Results go to stdout, progress and errors to stderr. A command checks its arguments, calls one function of
another room, and shows the result. Help and completion have to come at once, so torch, optuna and
matplotlib are imported inside the functions that need them.

Modules in reading order:

- `main`: the entry point; how an error becomes a message, a hint and an exit code.
- `options`: options that several commands share, and the study that they name.
- `completion`: names that the shell completes, and the examples below each help page.
- `study_file`: the study in a Python file, or a built-in one.
- `study_flags`: the study of `--model`, `--weights` and `--data`.
- `run`: `run`, `report`, `status`; asking for passphrases.
- `live_view`: the progress of a run for people.
- `event_lines`: the progress of a run for programs (`--events`).
- `fleet`: `worker` and `sweep`.
- `analyze`: `groups` and `analyze`.
- `tables`: tables and trees on stdout.
- `doctor`: `doctor`.
- `dashboard`: `dashboard`.
- `artifact`: `keygen`, `inspect`, `verify`, `export`, `encrypt`, `decrypt`, `rewrap`.

Exports `main`.
"""

from autoprune.cli.main import main

__all__ = [
    "main",
]
