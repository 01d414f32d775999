"""The options that several commands share, grouped as the help shows them, and the study that they name."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from autoprune.cli import completion
from autoprune.config import Norms
from autoprune.errors import UsageError

if TYPE_CHECKING:
    from autoprune.config import Study

WHERE = "Where runs live, who works on them"
DATA, AIM, KEYS, SHOW = "What to prune", "What to reach", "Who may open the result", "Output"
Name = Annotated[
    str | None,
    typer.Argument(
        metavar="STUDY", help="A built-in study, or a .py file that defines one.",
        autocompletion=completion.studies,
    ),
]  # fmt: skip
Model = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE:NAME", rich_help_panel=DATA,
        help="Instead of a study: torchvision:NAME, or FILE.py:NAME for your own class or function.",
    ),
]  # fmt: skip
Weights = Annotated[
    str | None,
    typer.Option(metavar="FILE", rich_help_panel=DATA, help="Its weights: .safetensors, .pt or .pth."),
]
DataSpec = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="NAME:DIR", rich_help_panel=DATA, autocompletion=completion.data_sets,
        help="Its data: cifar10:DIR, fashionmnist:DIR, imagefolder:DIR or digits; then, as the weights were "
        "trained: ,size=N ,channels=1 ,normalize=HOW.",
    ),
]  # fmt: skip
Exclude = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE", rich_help_panel=DATA, show_default=False,
        help="A module, or a glob of modules, whose channels stay; repeatable.",
    ),
]  # fmt: skip
Only = Annotated[
    list[str] | None,
    typer.Option(
        metavar="MODULE", rich_help_panel=DATA, show_default=False,
        help="A module, or a glob, whose channels alone may go; repeatable.",
    ),
]  # fmt: skip
KeepNorms = Annotated[
    Norms | None,
    typer.Option(
        "--norms", rich_help_panel=DATA, show_default="the study's, or keep",
        help="rescale: channels behind layer norms may go, too.",
    ),
]  # fmt: skip
RoundTo = Annotated[
    int | None,
    typer.Option(
        metavar="N", min=1, rich_help_panel=DATA, show_default="the study's, or 8",
        help="Widths become multiples of this, where they are four times as wide.",
    ),
]  # fmt: skip
Device = Annotated[
    str | None,
    typer.Option(
        metavar="DEVICE", rich_help_panel=DATA, show_default=False, autocompletion=completion.devices,
        help="auto, cpu, cuda, cuda:1 or mps.",
    ),
]  # fmt: skip
AsJson = Annotated[
    bool, typer.Option("--json", metavar="", rich_help_panel=SHOW, help="The result as JSON on stdout.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", metavar="", rich_help_panel=SHOW, help="No progress.")]
RunArgument = Annotated[
    str,
    typer.Argument(
        metavar="RUN", help="The run's folder, or postgresql://user@host/database#name.",
        autocompletion=completion.runs,
    ),
]  # fmt: skip
Storage = Annotated[
    str | None,
    typer.Option(
        metavar="URL", rich_help_panel=WHERE, show_default=False,
        help="Keep the run in PostgreSQL: postgresql://user@host/database (PGPASSWORD or ~/.pgpass).",
    ),
]  # fmt: skip
Artifacts = Annotated[
    str | None,
    typer.Option(
        metavar="PLACE", rich_help_panel=WHERE, show_default=False,
        help="Keep checkpoints in s3://bucket/prefix (AWS_* or ~/.aws), or in a folder that all share.",
    ),
]  # fmt: skip


def changed(study: Study, exclude: list[str] | None, only: list[str] | None, **given: Any) -> Study:
    """Return the study with further module patterns beside its own, and with other settings replaced."""
    settings: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    settings |= {"exclude": (*study.exclude, *(exclude or ())), "only": (*study.only, *(only or ()))}
    return replace(study, **settings)


def choose_study(name: str | None, model: str | None, weights: str | None, data: str | None) -> Study:
    """Return the study that the command line names.

    Raises:
        UsageError: neither or both of a study and --model are given, or the options are not complete.
    """
    flags = {"--model": model, "--weights": weights, "--data": data}
    used = [flag for flag, value in flags.items() if value is not None]
    if name is not None:
        if used:
            raise UsageError(
                f"both the study {name!r} and {used[0]} are given", "a study brings its own network and data"
            )
        from autoprune.cli.study_file import load_study

        return load_study(name)
    if model is None or weights is None or data is None:
        missing = [flag for flag, value in flags.items() if value is None]
        raise UsageError(
            "no study is given" if not used else f"{used[0]} is given without {' and '.join(missing)}",
            "autoprune run digits, or --model SOURCE:NAME --weights FILE --data NAME:DIR",
        )
    from autoprune.cli.study_flags import study_of_flags

    return study_of_flags(model, weights, data)


def digests(study: str | None, model: str | None) -> dict[str, str]:
    """Return the SHA-256 of the file that defines a study or a network, by the name that was given."""
    from autoprune.cli.study_file import find_study

    files = {study: find_study(study)} if study else {}
    source = (model or "").rpartition(":")[0]
    if source.endswith(".py"):
        files[source] = Path(source).expanduser()
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in files.items()}
