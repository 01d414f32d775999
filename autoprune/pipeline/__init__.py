"""Rooms are described once all of them stand."""

from autoprune.pipeline.local_workers import local_workers
from autoprune.pipeline.preflight import DEFAULT_ROUND_TO, RunPlan, make_plan, prepare, understand
from autoprune.pipeline.run import run
from autoprune.pipeline.status import Standing, standing
from autoprune.pipeline.sweep import Clock, Job, Row, jobs_of, look, sweep, used_seconds
from autoprune.pipeline.sweep_report import SHORT, TEXT, answer, numbers_of, ranges, table_of, write_summary
from autoprune.pipeline.throughput import throughput
from autoprune.pipeline.worker import work_on

__all__ = [
    "DEFAULT_ROUND_TO",
    "SHORT",
    "TEXT",
    "Clock",
    "Job",
    "Row",
    "RunPlan",
    "Standing",
    "answer",
    "jobs_of",
    "local_workers",
    "look",
    "make_plan",
    "numbers_of",
    "prepare",
    "ranges",
    "run",
    "standing",
    "sweep",
    "table_of",
    "throughput",
    "understand",
    "used_seconds",
    "work_on",
    "write_summary",
]
