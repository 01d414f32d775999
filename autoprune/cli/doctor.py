"""The command `autoprune doctor`: the parts that a run needs of this machine, present and missing ones."""

from __future__ import annotations

import io
import os
import platform
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from autoprune.cli import completion
from autoprune.cli.options import WHERE, AsJson, Name, choose_study
from autoprune.cli.tables import BAD, GOOD, MUTED
from autoprune.errors import AutopruneError
from autoprune.formatting import plural
from autoprune.serialization import json_text

if TYPE_CHECKING:
    from autoprune.config import Study
    from autoprune.location import RunLocation

PROBE = "autoprune-doctor"
PACKAGES = (
    "autoprune", "torch", "torchvision", "optuna", "onnx", "onnxruntime", "safetensors", "pyrage",
)  # fmt: skip


def register(app: typer.Typer) -> None:
    """Add the command of this module."""
    app.command(
        rich_help_panel="Look",
        epilog=completion.examples(
            "doctor", "doctor my_study.py", "doctor --storage postgresql://ann@db.site/prune"
        ),
    )(doctor)


def doctor(
    study: Name = None,
    out: Annotated[Path, typer.Option(
        metavar="DIR", rich_help_panel=WHERE, help="Where runs would be written.")] = Path("runs"),
    storage: Annotated[str | None, typer.Option(
        metavar="URL", rich_help_panel=WHERE, show_default=False,
        help="A database for runs: postgresql://user@host/database.")] = None,
    artifacts: Annotated[str | None, typer.Option(
        metavar="PLACE", rich_help_panel=WHERE, show_default=False,
        help="A place for checkpoints: s3://bucket/prefix, or a folder.")] = None,
    as_json: AsJson = False,
) -> int:  # fmt: skip
    """Say what a run would find on this machine, and what is missing; exits 1 if something is.

    With a study, half a minute of its own training and evaluation is measured, too.
    """
    from autoprune.location import RunLocation, parse_artifact_url, parse_database_url

    database = None if storage is None else parse_database_url(storage)
    location = RunLocation(folder=out, database=database, artifacts=parse_artifact_url(artifacts))
    named = None if study is None else (lambda: choose_study(study, None, None, None))
    findings = examine(location, named)
    if as_json:
        sys.stdout.write(json_text(findings, indent=1) + "\n")
    else:
        Console(highlight=False).print(_findings_text(findings))
    return 0 if all(f.ok for f in findings) else 1


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A check and its result; `advice` says what to do where the result is not `ok`."""

    name: str
    detail: str
    ok: bool = True
    advice: str = ""


def examine(location: RunLocation, study: Callable[[], Study] | None = None) -> list[Finding]:
    """Check the machine, the packages and the places that a run would use; return a finding for each.

    Args:
        location: the place that runs would be written to.
        study: returns a study whose speed is measured, too, for half a minute.
    """
    checks: list[Callable[[], Finding]] = [
        _python, _packages, _processor, _memory, _accelerator, lambda: _storage(location),
        lambda: _artifacts(location), _key,
    ]  # fmt: skip
    if study is not None:
        checks.append(lambda: _speed(study))
    return [check() for check in checks]


def _python() -> Finding:
    return Finding(name="python", detail=f"{platform.python_version()} on {platform.platform(terse=True)}")


def _packages() -> Finding:
    versions, missing = [], []
    for name in PACKAGES:
        try:
            versions.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    advice = f"pip install {' '.join(missing)}" if missing else ""
    return Finding(name="packages", detail=", ".join(versions), ok=not missing, advice=advice)


def _processor() -> Finding:
    import torch

    from autoprune.training import uses_bf16

    cores, threads = _cores(), torch.get_num_threads()
    trains = "trains in bf16" if uses_bf16(torch.device("cpu")) else "trains in fp32"
    advice = f"export OMP_NUM_THREADS={cores}: more threads than cores slow each other down"
    return Finding(
        name="processor",
        detail=f"{plural(cores, 'core')}, {plural(threads, 'thread')}, {trains}",
        ok=threads <= cores,
        advice=advice,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> Finding:
    file = Path("/proc/meminfo")
    lines = file.read_text(encoding="ascii").splitlines() if file.is_file() else []
    available = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    if not available:
        return Finding(name="memory", detail="this system does not say")
    free_gb = available[0] * 1024 / 1e9  # the file counts in kibibytes
    free = f"{free_gb:.1f} GB free"
    return Finding(name="memory", detail=free, ok=free_gb > 1, advice="end other programs")


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding(name="accelerator", detail=f"cuda: {', '.join(names)}")
    if torch.backends.mps.is_available():
        return Finding(name="accelerator", detail="mps")
    return Finding(name="accelerator", detail="none: training runs on the processor")


def _storage(location: RunLocation) -> Finding:
    if not location.is_local:
        return _database(location)
    parent = _parent(location.folder)
    try:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            _write_and_read(Path(folder))
    except (OSError, ValueError) as error:
        return Finding(
            name="storage", detail=f"{parent}: {error}", ok=False, advice="name a folder with --out"
        )
    return Finding(name="storage", detail=f"a run's database can be made in {parent.absolute()}")


def _database(location: RunLocation) -> Finding:
    from autoprune.storage import open_storage, quiet_optuna

    try:
        with quiet_optuna():
            storage = open_storage(location)
            number = len(storage.get_all_studies())
            storage.engine.dispose()
    except AutopruneError as error:
        return Finding(name="storage", detail=error.message, ok=False, advice=error.hint)
    return Finding(name="storage", detail=f"{location} is reached; it holds {number} Optuna studies")


def _artifacts(location: RunLocation) -> Finding:
    """Write a file where checkpoints would go, read it, and remove it."""
    from autoprune.storage import open_blobs

    try:
        with tempfile.TemporaryDirectory(dir=_parent(location.folder)) as folder:
            store = open_blobs(location.artifacts or folder)
            store.write(PROBE, io.BytesIO(b"written by autoprune doctor"))
            with store.open_reader(PROBE) as stream:
                stream.read()
            store.remove(PROBE)
    except (AutopruneError, OSError) as error:
        hint = error.hint if isinstance(error, AutopruneError) else "choose another place for checkpoints"
        message = error.message if isinstance(error, AutopruneError) else f"{location.checkpoints}: {error}"
        return Finding(name="checkpoints", detail=message, ok=False, advice=hint)
    where = location.artifacts or _parent(location.folder).absolute()
    return Finding(name="checkpoints", detail=f"can be written, read and removed in {where}")


def _speed(study: Callable[[], Study]) -> Finding:
    """Measure a study's own throughput, and the epochs that its budget buys."""
    from autoprune.config import Budget
    from autoprune.formatting import duration
    from autoprune.pipeline import throughput

    try:
        chosen = study()
        speed = throughput(chosen)
    except AutopruneError as error:
        return Finding(name="study", detail=error.message, ok=False, advice=error.hint)
    text = (
        f"{chosen.name}: trains {speed.train_images_per_s:,.0f} and evaluates "
        f"{speed.evaluate_images_per_s:,.0f} images/s on {speed.device}; an epoch takes "
        f"{duration(speed.epoch_s)}, the search split {duration(speed.evaluation_s)}"
    )
    seconds = Budget.parse(chosen.budget).counted().seconds
    budget = f"; a budget of {chosen.budget} is about {seconds / speed.epoch_s:.3g} epochs" if seconds else ""
    return Finding(name="study", detail=text + budget)


def _parent(folder: Path) -> Path:
    return next(p for p in (folder, *folder.absolute().parents) if p.exists())


def _write_and_read(folder: Path) -> None:
    from contextlib import closing

    from autoprune.storage import RunStore, quiet_optuna

    with quiet_optuna(), closing(RunStore(folder, "doctor", create=True)) as store:
        store.create_study(0, {})


def _key() -> Finding:
    from autoprune.crypto import default_identity_path

    path = default_identity_path()
    text = str(path) if path.exists() else f"none yet; {path} is made on first use"
    return Finding(name="your key", detail=text)


def _findings_text(findings: Sequence[Finding]) -> RenderableType:
    """Return the output of `autoprune doctor`: the verdict first, advice where it is needed."""
    wrong = [f.name for f in findings if not f.ok]
    verdict = Text("A run would find everything that it needs.", GOOD)
    if wrong:
        verdict = Text(f"To be mended first: {', '.join(wrong)}.", BAD)
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    for finding in findings:
        grid.add_row(Text(finding.name, MUTED), Text(finding.detail))
        if not finding.ok:
            grid.add_row("", Text(finding.advice, BAD))
    return Group(verdict, Text(), grid)
