"""Several runs, one after the other, each with its part of the time that is left.

A job is one study with one target and one seed. Its run lives in a folder of its own, which holds all the
state of the job. A job whose run has an outcome is done, any other is started or continued. Each job runs
in a process of its own, so that a job that fails, or is killed, does not stop the others. The time that a
job leaves over goes to those after it.
"""

from __future__ import annotations

import math
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import IO

from autoprune.errors import AutopruneError
from autoprune.report import Job, JobResult, JobState
from autoprune.search import read_run
from autoprune.storage import RunStore, run_name_at

OVERHEAD_SHARE = 0.1  # of a job's time: export and report come on top of its budget; a guess
MAX_OVERRUN = 1.5  # times its part of the time: a job that takes longer hangs, and is ended; a guess
END_TIMEOUT_S = 120  # what a job may take to end cleanly
INTERRUPT_EVERY_S = 20  # longer than a job takes to end; a guess


@dataclass(frozen=True, kw_only=True)
class SweepDeadline:
    """The end of a sweep in seconds of `time.monotonic`; infinite where time is not limited."""

    monotonic_s: float = math.inf

    def budget_per_job(self, waiting: int) -> float | None:
        """Return the seconds that each waiting job gets as its budget, None where time is not limited."""
        seconds = self.monotonic_s - time.monotonic()
        return None if math.isinf(seconds) else max(0.0, (1 - OVERHEAD_SHARE) * seconds / max(1, waiting))


def make_jobs(studies: Iterable[str], targets: Sequence[str], seeds: Sequence[int]) -> tuple[Job, ...]:
    """Return a job for every study with every target and every seed."""
    return tuple(
        Job(study=study, target=target, seed=seed)
        for seed in (seeds or (None,))
        for study in studies
        for target in (targets or (None,))
    )


def read_job(job: Job, out: Path) -> JobResult:
    """Read how far a job is, from its folder alone."""
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


def used_seconds(results: Iterable[JobResult]) -> float:
    """Return the seconds that the jobs took so far, over all earlier processes."""
    return sum(result.record.seconds for result in results if result.record is not None)


def sweep(
    jobs: Sequence[Job],
    out: Path,
    deadline: SweepDeadline,
    command: Callable[[JobResult, datetime | None], list[str]],
    on_line: Callable[[Job, str], None],
) -> tuple[JobResult, ...]:
    """Run all jobs that are not done, and return the result of each.

    Args:
        jobs: the jobs, in the order in which they run.
        out: the folder that holds the jobs' folders.
        deadline: the end of the sweep.
        command: returns the command line of a job for a given end of its budget.
        on_line: called with every line that a job writes to stderr.

    Raises:
        KeyboardInterrupt: after the running job has ended cleanly; the same call continues.
    """
    results = {job: read_job(job, out) for job in jobs}
    waiting = [job for job in jobs if not results[job].is_done]
    for number, job in enumerate(waiting):
        part = deadline.budget_per_job(len(waiting) - number)
        if part is not None and part <= 0:
            break
        end = None if part is None else datetime.now() + timedelta(seconds=part)
        reason = _run_job(job, command(results[job], end), part, on_line)
        results[job] = _with_reason(read_job(job, out), reason)
    return tuple(results[job] for job in jobs)


def _with_reason(result: JobResult, reason: str) -> JobResult:
    if result.is_done:
        return result
    state: JobState = "stopped" if reason.startswith("stopped") else "failed"
    return replace(result, state=state, reason=reason)


def _run_job(job: Job, words: list[str], part: float | None, on_line: Callable[[Job, str], None]) -> str:
    """Run one job in a session of its own, and return its last error, or how it ended."""
    with subprocess.Popen(  # noqa: S603 - our own command line, made of checked words
        words, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        lines: list[str] = []
        reader = threading.Thread(target=_read_lines, args=(process.stderr, job, lines, on_line), daemon=True)
        reader.start()
        try:
            process.wait(None if part is None else MAX_OVERRUN * part + END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            _end(process)
            return "stopped: it took far more than its time"
        except KeyboardInterrupt:
            _end(process)
            raise
        reader.join()
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or [f"it ended with exit code {process.returncode}"])[-1]


def _read_lines(stream: IO[str], job: Job, lines: list[str], on_line: Callable[[Job, str], None]) -> None:
    for line in stream:
        lines.append(line.rstrip("\n"))
        del lines[:-200]
        on_line(job, lines[-1])


def _end(process: subprocess.Popen[str]) -> None:
    """End a job as Ctrl-C would, by force where that does not help.

    Once is not enough: Python swallows an interrupt that meets a destructor or a weak reference's callback.
    """
    for _ in range(END_TIMEOUT_S // INTERRUPT_EVERY_S):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(INTERRUPT_EVERY_S)
            return
    process.kill()
    process.wait()
