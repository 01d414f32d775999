"""Rooms are described once all of them stand."""

from autoprune.report.dashboard import open_dashboard
from autoprune.report.page import packaged, to_json, unbroken, write_report

__all__ = [
    "open_dashboard",
    "packaged",
    "to_json",
    "unbroken",
    "write_report",
]
