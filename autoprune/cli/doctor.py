"""`autoprune doctor`: what a run would find on this machine, and what is missing."""

from __future__ import annotations

import io
import os
import platform
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.errors import AutopruneError
from autoprune.formatting import plural
from autoprune.location import RunLocation

if TYPE_CHECKING:
    from autoprune.config import Study

PROBE = "autoprune-doctor"
PACKAGES = (
    "autoprune", "torch", "torchvision", "optuna", "onnx", "onnxruntime", "safetensors", "pyrage",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at; `advice` says what to do where it is not as it should be."""

    name: str
    found: str
    ok: bool = True
    advice: str = ""


def examine(location: RunLocation, study: Callable[[], Study] | None = None) -> list[Finding]:
    """Look at everything.

    Args:
        location: where runs would be written to.
        study: measured for half a minute, too.
    """
    checks: list[Callable[[], Finding]] = [
        _python, _packages, _processor, _memory, _accelerator, lambda: _storage(location),
        lambda: _artifacts(location), _key,
    ]  # fmt: skip
    if study is not None:
        checks.append(lambda: _speed(study))
    return [check() for check in checks]


def _python() -> Finding:
    return Finding(name="python", found=f"{platform.python_version()} on {platform.platform(terse=True)}")


def _packages() -> Finding:
    found, missing = [], []
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            missing.append(name)
    advice = f"pip install {' '.join(missing)}" if missing else ""
    return Finding(name="packages", found=", ".join(found), ok=not missing, advice=advice)


def _processor() -> Finding:
    import torch

    from autoprune.training import uses_bf16

    cores, threads = _cores(), torch.get_num_threads()
    trains = "trains in bf16" if uses_bf16(torch.device("cpu")) else "trains in fp32"
    advice = f"export OMP_NUM_THREADS={cores}: more threads than cores slow each other down"
    return Finding(
        name="processor",
        found=f"{plural(cores, 'core')}, {plural(threads, 'thread')}, {trains}",
        ok=threads <= cores,
        advice=advice,
    )


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory() -> Finding:
    known = Path("/proc/meminfo")
    lines = known.read_text(encoding="ascii").splitlines() if known.is_file() else []
    available = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    if not available:
        return Finding(name="memory", found="this system does not say")
    free_gb = available[0] * 1024 / 1e9  # the file counts in kibibytes
    return Finding(name="memory", found=f"{free_gb:.1f} GB free", ok=free_gb > 1, advice="end other programs")


def _accelerator() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding(name="accelerator", found=f"cuda: {', '.join(names)}")
    if torch.backends.mps.is_available():
        return Finding(name="accelerator", found="mps")
    return Finding(name="accelerator", found="none: training runs on the processor")


def _storage(location: RunLocation) -> Finding:
    if not location.is_local:
        return _database(location)
    parent = _parent(location.folder)
    try:
        with tempfile.TemporaryDirectory(dir=parent) as folder:
            _write_and_read(Path(folder))
    except (OSError, ValueError) as error:
        return Finding(
            name="storage", found=f"{parent}: {error}", ok=False, advice="name a folder with --out"
        )
    return Finding(name="storage", found=f"a run's database can be made in {parent.absolute()}")


def _database(location: RunLocation) -> Finding:
    from autoprune.storage import open_storage, quiet_optuna

    try:
        with quiet_optuna():
            storage = open_storage(location)
            number = len(storage.get_all_studies())
            storage.engine.dispose()
    except AutopruneError as error:
        return Finding(name="storage", found=error.message, ok=False, advice=error.hint)
    return Finding(name="storage", found=f"{location} is reached; it holds {number} Optuna studies")


def _artifacts(location: RunLocation) -> Finding:
    """Write a file where checkpoints would go, read it back, and take it away."""
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
        told = error.message if isinstance(error, AutopruneError) else f"{location.checkpoints}: {error}"
        return Finding(name="checkpoints", found=told, ok=False, advice=hint)
    where = location.artifacts or _parent(location.folder).absolute()
    return Finding(name="checkpoints", found=f"can be written, read and removed in {where}")


def _speed(study: Callable[[], Study]) -> Finding:
    """A study's own throughput, and what its budget buys."""
    from autoprune.config import Budget
    from autoprune.formatting import duration
    from autoprune.pipeline import throughput

    try:
        chosen = study()
        found = throughput(chosen)
    except AutopruneError as error:
        return Finding(name="study", found=error.message, ok=False, advice=error.hint)
    told = (
        f"{chosen.name}: trains {found.train_images_per_s:,.0f} and evaluates "
        f"{found.evaluate_images_per_s:,.0f} images/s on {found.device}; an epoch takes "
        f"{duration(found.epoch_s)}, the search split {duration(found.evaluation_s)}"
    )
    seconds = Budget.parse(chosen.budget).counted().seconds
    bought = f"; a budget of {chosen.budget} is about {seconds / found.epoch_s:.3g} epochs" if seconds else ""
    return Finding(name="study", found=told + bought)


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
    found = str(path) if path.exists() else f"none yet; {path} is made on first use"
    return Finding(name="your key", found=found)
