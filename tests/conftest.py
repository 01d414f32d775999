"""One thread per process: tests are small, and threads that wait for each other are slower than one."""

from __future__ import annotations

import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes tests start

import torch

from tests.clock import Clock


@pytest.fixture(autouse=True)
def _torch_seed(request: pytest.FixtureRequest) -> None:
    """torch's random state follows pytest-randomly's seed, as Python's and NumPy's do."""
    torch.manual_seed(int(getattr(request.config.option, "randomly_seed", 0)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """A clock that stands still, in the place of this process's own."""
    return Clock(monkeypatch)
