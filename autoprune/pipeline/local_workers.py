"""Workers on this machine: started once the original is measured, ended with the run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from autoprune import events as ev
from autoprune.location import RunLocation

END_TIMEOUT_S = 30  # what a worker may take to end; a guess


@contextmanager
def local_workers(location: RunLocation, name: str, count: int, on_event: ev.OnEvent) -> Iterator[ev.OnEvent]:
    """Have `count` processes run trials, this one included; yield the listener that the run has to call.

    The workers start when the original is measured, and share the processor's cores evenly.
    """
    if count <= 1:
        yield on_event
        return
    import torch

    before = torch.get_num_threads()
    each = max(1, before // count)
    workers: list[subprocess.Popen[bytes]] = []

    def listener(event: ev.Event) -> None:
        if isinstance(event, ev.BaselineMeasured):
            workers.extend(_start(location, name, each) for _ in range(count - 1))
        on_event(event)

    torch.set_num_threads(each)
    try:
        yield listener
    finally:
        torch.set_num_threads(before)
        _end(workers)


def _start(location: RunLocation, name: str, threads: int) -> subprocess.Popen[bytes]:
    run = str(location.folder) if location.is_local else f"{location.database}#{name}"
    words = [sys.executable, "-m", "autoprune", "worker", run, "--quiet"]
    words += ["--artifacts", location.artifacts] if location.artifacts else []
    shared = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return subprocess.Popen(  # noqa: S603 - our own command line
        words, env=os.environ | shared, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        start_new_session=True,
    )  # fmt: skip


def _end(workers: list[subprocess.Popen[bytes]]) -> None:
    for worker in workers:
        worker.terminate()
    for worker in workers:
        with suppress(subprocess.TimeoutExpired):
            worker.wait(END_TIMEOUT_S)
            continue
        worker.kill()
        worker.wait()
