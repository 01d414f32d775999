"""A clock that a test drives: what waits for time, or measures it, does so without any passing."""

from __future__ import annotations

import time

import pytest
from torch import nn


class Clock:
    """Stands still until it is told to advance, or advances by `tick` each time that it is read.

    It takes the place of Python's own clocks for this process; sleeping advances it. Dates, and what waits
    on a lock or a socket, go on by the real one.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.tick = 1000.0, 0.0
        for name in ("monotonic", "perf_counter", "process_time"):
            patch.setattr(time, name, self._read)
        patch.setattr(time, "sleep", self.advance)

    def advance(self, seconds: float) -> None:
        self.now += seconds

    def slow_(self, model: nn.Module, seconds: float) -> nn.Module:
        """Have every forward pass of the model take these seconds; its copies too."""
        model.register_forward_pre_hook(lambda *_: self.advance(seconds))
        return model

    def _read(self) -> float:
        self.now += self.tick
        return self.now
