"""Time what runs on a device, and keep what was timed.

Calls are timed in turns, so that slow drifts of the machine stay out of the comparison. Timings of single
operators are kept in a table on disk, one for each device, number of threads and version of torch.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

Call = Callable[[], object]
Seconds = NDArray[np.float64]

WARM_UP = 3
MIN_RUNS = 9
SAMPLE_S = 2e-4  # shorter runs are timed several at a time: the clock and the queue cost microseconds
VERSION = 1


@dataclass(kw_only=True)
class Timings:
    """Seconds of operators on one device; kept in a file unless `path` is None.

    A file that cannot be read, or is no such table, is ignored and written anew.
    """

    path: Path | None
    seconds: dict[str, float] = field(default_factory=dict)
    is_changed: bool = False

    @classmethod
    def of(cls, device: torch.device) -> Timings:
        """The user's table for this device."""
        given = os.environ.get("XDG_CACHE_HOME", "")
        folder = Path(given) if given.startswith("/") else Path.home() / ".cache"
        name = f"{device_name(device)} {torch.get_num_threads()} threads torch {torch.__version__}"
        slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
        path = folder / "autoprune" / f"latency-{slug}.json"
        return cls(path=path, seconds=_read(path))

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """The seconds under `key`, measured if they are not known."""
        if key not in self.seconds:
            self.seconds[key] = measure()
            self.is_changed = True
        return self.seconds[key]

    def save(self) -> None:
        """Write the table beside the old one and rename it; another process' timings are kept."""
        if self.path is None or not self.is_changed:
            return
        document = {"version": VERSION, "seconds": _read(self.path) | self.seconds}
        part = self.path.with_name(f"{self.path.name}.{os.getpid()}.part")
        with suppress(OSError):  # without a table, shapes are timed again next time
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(document, indent=0), encoding="utf-8")
            part.replace(self.path)
        self.is_changed = False


def time_interleaved(calls: Sequence[Call], device: torch.device, *, runs: int, seconds: float) -> Seconds:
    """Seconds of each call, (runs, calls): every run makes each of them once, every other in reverse order.

    At least `MIN_RUNS`, at most `runs`, and about `seconds` in all. Calls shorter than the clock is exact are
    repeated within a run.
    """
    times: list[list[float]] = []
    with torch.no_grad():
        for _ in range(WARM_UP):
            first = [_seconds(call, device, 1) for call in calls]
        repeats = [max(1, math.ceil(SAMPLE_S / max(s, 1e-7))) for s in first]
        began = time.perf_counter()
        while len(times) < MIN_RUNS or (len(times) < runs and time.perf_counter() - began < seconds):
            order = range(len(calls))[:: 1 if len(times) % 2 else -1]  # other work comes in a rhythm, too
            took = {i: _seconds(calls[i], device, repeats[i]) for i in order}
            times.append([took[i] for i in range(len(calls))])
    return np.array(times)


def device_name(device: torch.device) -> str:
    """What the machine calls the device: the accelerator's or the processor's model."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _seconds(call: Call, device: torch.device, repeats: int) -> float:
    began = time.perf_counter()
    for _ in range(repeats):
        call()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / repeats


def _read(path: Path) -> dict[str, float]:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["version"] != VERSION:
            return {}
        seconds = {str(k): float(v) for k, v in document["seconds"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return seconds if all(math.isfinite(v) and v > 0 for v in seconds.values()) else {}
