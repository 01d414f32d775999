"""Several runs one after the other, each planned into its part of the time that is left.

A job is one study with one target and one seed; its run lives in a folder of its own, which is all that is
known about it: a job whose run has an outcome is done, any other is started, or continued. Each runs in a
process of its own, so that one that fails, or is killed, does not stop the others. What a job leaves of its
time goes to those after it.
"""

from __future__ import annotations

import math
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO

from autoprune.errors import AutopruneError
from autoprune.report import Job, JobResult, JobState
from autoprune.search import read_run
from autoprune.storage import RunStore, run_name_at

OVERHEAD = 0.1  # of a job's time: export and report come on top of a budget; a guess
LATE = 1.5  # times its part of the time: then a job hangs, and is ended
PATIENCE_S = 120  # what a job may take to end cleanly


@dataclass(frozen=True, kw_only=True)
class Clock:
    """When a sweep has to end, in seconds of `time.monotonic`; infinite where nobody said."""

    deadline: float = math.inf

    def part(self, waiting: int) -> float | None:
        """What each of the jobs still waiting gets as its budget; None where time is not limited."""
        left = self.deadline - time.monotonic()
        return None if math.isinf(left) else max(0.0, (1 - OVERHEAD) * left / max(1, waiting))


def jobs_of(studies: Iterable[str], targets: Sequence[str], seeds: Sequence[int]) -> tuple[Job, ...]:
    """Every study with every target and every seed."""
    return tuple(
        Job(study=study, target=target, seed=seed)
        for seed in (seeds or (None,))
        for study in studies
        for target in (targets or (None,))
    )


def look(job: Job, out: Path) -> JobResult:
    """What is known about a job, from its folder alone."""
    folder = out / job.name
    try:
        with closing(RunStore(folder, run_name_at(folder))) as store:
            record = read_run(store)
    except AutopruneError:
        return JobResult(job=job, state="waiting", folder=folder, record=None)
    delivered = any(folder.glob("model.autoprune*"))
    if record.outcome is None or not delivered:
        return JobResult(job=job, state="waiting", folder=folder, record=record)
    state: JobState = "reached" if record.outcome.reached else "not reached"
    return JobResult(job=job, state=state, folder=folder, record=record, reason=record.outcome.message)


def used_seconds(rows: Iterable[JobResult]) -> float:
    """What the jobs took so far, over all earlier processes."""
    return sum(row.record.seconds for row in rows if row.record is not None)


def sweep(
    jobs: Sequence[Job], out: Path, clock: Clock, command: Callable[[JobResult, datetime | None], list[str]],
    on_line: Callable[[Job, str], None],
) -> tuple[JobResult, ...]:  # fmt: skip
    """Run all jobs that are not done; gives what came of each, also after Ctrl-C.

    Args:
        jobs: what to do, in this order.
        out: the folder of the jobs' folders.
        clock: when to end.
        command: what to start for a job, given when its budget ends.
        on_line: told of every line that a job says.

    Raises:
        KeyboardInterrupt: after the running job has ended cleanly; the same call continues.
    """
    rows = {job: look(job, out) for job in jobs}
    todo = [job for job in jobs if not rows[job].is_done]
    for number, job in enumerate(todo):
        part = clock.part(len(todo) - number)
        if part is not None and part <= 0:
            break
        end = None if part is None else datetime.now() + timedelta(seconds=part)
        reason = _run(job, command(rows[job], end), part, on_line)
        rows[job] = _judged(look(job, out), reason)
    return tuple(rows[job] for job in jobs)


def _judged(row: JobResult, reason: str) -> JobResult:
    if row.is_done:
        return row
    state: JobState = "stopped" if reason.startswith("stopped") else "failed"
    return JobResult(job=row.job, state=state, folder=row.folder, record=row.record, reason=reason)


def _run(job: Job, words: list[str], part: float | None, on_line: Callable[[Job, str], None]) -> str:
    """Run one job in a session of its own; why it did not end well, or nothing."""
    with subprocess.Popen(  # noqa: S603 - our own command line, made of checked words
        words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        told: list[str] = []
        reader = threading.Thread(target=_read, args=(process.stderr, job, told, on_line), daemon=True)
        reader.start()
        try:
            process.wait(None if part is None else LATE * part + PATIENCE_S)
        except subprocess.TimeoutExpired:
            _end(process)
            return "stopped: it took far more than its time"
        except KeyboardInterrupt:
            _end(process)
            raise
        reader.join()
    errors = [line.removeprefix("error: ") for line in told if line.startswith("error: ")]
    return (errors or [f"it ended with exit code {process.returncode}"])[-1]


def _read(stream: IO[str], job: Job, told: list[str], on_line: Callable[[Job, str], None]) -> None:
    for line in stream:
        told.append(line.rstrip("\n"))
        del told[:-200]
        on_line(job, told[-1])


def _end(process: subprocess.Popen[str]) -> None:
    """As Ctrl-C would; by force where that does not help."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(PATIENCE_S)
        return
    process.kill()
    process.wait()
