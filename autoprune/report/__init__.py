"""Rooms are described once all of them stand."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from autoprune.report.annotations import annotate_studies as annotate_studies
    from autoprune.report.dashboard import open_dashboard as open_dashboard
    from autoprune.report.narrative import ComparisonRow as ComparisonRow
    from autoprune.report.narrative import answer as answer
    from autoprune.report.narrative import caution as caution
    from autoprune.report.narrative import comparison as comparison
    from autoprune.report.page import to_json as to_json
    from autoprune.report.page import write_report as write_report
    from autoprune.report.plots import write_analysis_plots as write_analysis_plots
    from autoprune.report.sweep_report import TEXT_COLUMNS as TEXT_COLUMNS
    from autoprune.report.sweep_report import Job as Job
    from autoprune.report.sweep_report import JobResult as JobResult
    from autoprune.report.sweep_report import JobState as JobState
    from autoprune.report.sweep_report import row_numbers as row_numbers
    from autoprune.report.sweep_report import sweep_answer as sweep_answer
    from autoprune.report.sweep_report import sweep_ranges as sweep_ranges
    from autoprune.report.sweep_report import sweep_table as sweep_table
    from autoprune.report.sweep_report import write_sweep_report as write_sweep_report

# The terminal needs a sentence, not matplotlib and plotly: names are imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "annotations": ["annotate_studies"],
        "dashboard": ["open_dashboard"],
        "narrative": ["ComparisonRow", "answer", "caution", "comparison"],
        "page": ["to_json", "write_report"],
        "plots": ["write_analysis_plots"],
        "sweep_report": [
            "TEXT_COLUMNS", "Job", "JobResult", "JobState", "row_numbers", "sweep_answer", "sweep_ranges",
            "sweep_table", "write_sweep_report",
        ],
    },
)  # fmt: skip
