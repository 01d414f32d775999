"""What a results page says about where it was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def headline(*packages: str, device: str = "cpu") -> str:
    """Date, hardware, versions, commit and load, in two lines."""
    versions = ", ".join(f"{p} {version(p)}" for p in packages)
    return (
        f"{date.today().isoformat()}, {_hardware(device)}; load {os.getloadavg()[0]:.1f} at the end\n"
        f"(Python {platform.python_version()}, {versions}, commit {commit()})."
    )


def commit() -> str:
    """Of the working tree, in short."""
    command = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def processor() -> str:
    """As Linux names it."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))


def _hardware(device: str) -> str:
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor()}, {threads} of {os.cpu_count()} cores"
