"""The order of a command's steps, from its first check to its last file: runs, workers, sweeps, status.

This room knows the order of the steps; other rooms know how each is done. `run` is the whole of a run in
one function; the other modules start from the same `Problem` and the same stored studies.

In reading order:

* `run`: `autoprune run`, the four stages in a loop.
* `preflight`: everything that can be wrong is found before anything starts; the forecast of a dry run.
* `baseline`: the original, trained where that is asked for, measured and stored; a run that is resumed.
* `delivery`: the final tuning, the test, the delivered file, the report.
* `measurement`: a model in numbers: accuracy, cost, widths, latency.
* `worker`: another process that runs trials of a run.
* `local_workers`: such processes on this machine, started and ended with a run.
* `status`: how a run stands at this moment.
* `sweep`: several runs, one after the other, in the time that there is.
* `throughput`: how fast this machine works on a study.
"""

from autoprune.pipeline.local_workers import local_workers
from autoprune.pipeline.preflight import (
    RunForecast,
    TracedStudy,
    forecast_run,
    prepare,
    thread_limit,
    trace_for_study,
    trace_study,
)
from autoprune.pipeline.run import run
from autoprune.pipeline.status import RunStatus, read_status
from autoprune.pipeline.sweep import SweepDeadline, make_jobs, read_job, sweep, used_seconds
from autoprune.pipeline.throughput import throughput
from autoprune.pipeline.worker import run_worker

__all__ = [
    "RunForecast",
    "RunStatus",
    "SweepDeadline",
    "TracedStudy",
    "forecast_run",
    "local_workers",
    "make_jobs",
    "prepare",
    "read_job",
    "read_status",
    "run",
    "run_worker",
    "sweep",
    "thread_limit",
    "throughput",
    "trace_for_study",
    "trace_study",
    "used_seconds",
]
