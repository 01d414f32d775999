"""Rooms are described once all of them stand."""

from autoprune.pipeline.local_workers import local_workers
from autoprune.pipeline.preflight import DEFAULT_ROUND_TO, RunPlan, make_plan, prepare, traced, understand
from autoprune.pipeline.run import run
from autoprune.pipeline.status import RunStatus, read_status
from autoprune.pipeline.sweep import Clock, jobs_of, look, sweep, used_seconds
from autoprune.pipeline.throughput import throughput
from autoprune.pipeline.worker import work_on

__all__ = [
    "DEFAULT_ROUND_TO",
    "Clock",
    "RunPlan",
    "RunStatus",
    "jobs_of",
    "local_workers",
    "look",
    "make_plan",
    "prepare",
    "read_status",
    "run",
    "sweep",
    "throughput",
    "traced",
    "understand",
    "used_seconds",
    "work_on",
]
