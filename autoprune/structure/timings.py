"""The timing of calls on a device, and a table of measured seconds.

`time_interleaved` is the one timing loop of the package. It runs the calls that are compared in turns, so
that slow drifts of the machine (clock, temperature, other work) meet all of them alike. `Timings` holds the
seconds of single operators in a file, one for each device, number of threads and version of torch.
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

from autoprune.files import atomic_write

Call = Callable[[], object]
Seconds = NDArray[np.float64]

WARM_UP = 3  # calls before the clock counts: libraries load, caches fill, cuDNN chooses its algorithm
MIN_RUNS = 9  # a guess: the fewest runs whose minimum or quartile says something
SAMPLE_S = 2e-4  # shorter calls are timed several at a time: reading the clock costs microseconds
VERSION = 1


@dataclass(kw_only=True)
class Timings:
    """The seconds of operators on one device, kept in a file unless `path` is None.

    A file that cannot be read, or is no such table, is ignored and replaced: the table can always be
    measured again.
    """

    path: Path | None
    seconds: dict[str, float] = field(default_factory=dict)
    is_changed: bool = False

    @classmethod
    def of(cls, device: torch.device) -> Timings:
        """Return the user's table for a device, in `$XDG_CACHE_HOME/autoprune` or `~/.cache/autoprune`."""
        cache = os.environ.get("XDG_CACHE_HOME", "")
        # The XDG base directory specification: a relative path is invalid and ignored.
        folder = Path(cache) if cache.startswith("/") else Path.home() / ".cache"
        name = f"{device_name(device)} {torch.get_num_threads()} threads torch {torch.__version__}"
        slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
        path = folder / "autoprune" / f"latency-{slug}.json"
        return cls(path=path, seconds=_read(path))

    def get(self, key: str, measure: Callable[[], float]) -> float:
        """Return the seconds under `key`; `measure` is called if the table lacks them."""
        if key not in self.seconds:
            self.seconds[key] = measure()
            self.is_changed = True
        return self.seconds[key]

    def save(self) -> None:
        """Merge the table with what another process wrote meanwhile, and replace the file in one step."""
        if self.path is None or not self.is_changed:
            return
        document = {"version": VERSION, "seconds": _read(self.path) | self.seconds}
        with suppress(OSError):  # without a table, shapes are timed again next time
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(self.path) as file:
                file.write(json.dumps(document, indent=0).encode())
        self.is_changed = False


def time_interleaved(
    calls: Sequence[Call], device: torch.device, *, runs: int, seconds: float, min_runs: int = MIN_RUNS
) -> Seconds:
    """Return the measured seconds of each call without gradients, float64 (runs made, calls).

    Every run makes each call once, every other run in reverse order. Calls shorter than `SAMPLE_S` are
    repeated within a run, and their mean counts. Before the first run every call is made `WARM_UP` times.

    Args:
        calls: the calls to time. On a GPU the loop waits for each to finish.
        runs: the most runs that are made.
        seconds: no further run starts after about this time, once `min_runs` are made.
        min_runs: the fewest runs that are made, however long they take.
    """
    times: list[list[float]] = []
    with torch.no_grad():
        for _ in range(WARM_UP):
            warm = [_seconds(call, device, 1) for call in calls]
        repeats = [max(1, math.ceil(SAMPLE_S / max(s, 1e-7))) for s in warm]
        began = time.perf_counter()
        while len(times) < min_runs or (len(times) < runs and time.perf_counter() - began < seconds):
            order = range(len(calls))[:: 1 if len(times) % 2 else -1]  # other work may have a rhythm, too
            by_call = {i: _seconds(calls[i], device, repeats[i]) for i in order}
            times.append([by_call[i] for i in range(len(calls))])
    return np.array(times)


def device_name(device: torch.device) -> str:
    """Return the name that the machine gives the device: the accelerator's or the processor's model."""
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
