"""The origin of a results page: the hardware, versions, commit and load of the machine that measured it.

torch is imported only where threads or a GPU are named: the coverage benchmark's own process does without
it.
"""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent


def headline(*packages: str, device: str = "cpu") -> str:
    """Date, hardware, load, versions and commit, in two lines: the first ones of a page."""
    return (
        f"{date.today().isoformat()}, {_hardware(device)}; load {os.getloadavg()[0]:.1f} at the end\n"
        f"({versions(*packages)}, commit {commit()})."
    )


def dated_page(folder: Path, subject: str) -> Path:
    """The path of a page that is named after its subject, the kind of processor and the date."""
    return folder / f"{subject}_{platform.machine()}_{date.today().isoformat()}.md"


def versions(*packages: str) -> str:
    """Python's version and those of distributions, which need not be what a module calls its own."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{p} {_version(p)}" for p in packages)])


def commit() -> str:
    """The working tree's commit, shortened; with `-dirty` where files differ from it."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def processor() -> str:
    """The processor's name, as Linux gives it; elsewhere what Python knows."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def memory_gb() -> float:
    """The machine's memory in units of 10^9 bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _hardware(device: str) -> str:
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return f"{processor()}, {torch.get_num_threads()} of {os.cpu_count()} cores"
