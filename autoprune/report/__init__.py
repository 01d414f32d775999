"""The account of a run for people: sentences, pictures, a page, a summary of several runs, the browser.

Everything here is a function of a `RunRecord`, which is read from storage; nothing here changes what a run
does. Three concepts: the *narrative* says a run in sentences; a *series* is the numbers of a picture, drawn
twice (matplotlib for the report, Plotly for the browser); an *annotation* is what optuna-dashboard shows of
one Optuna study.

Modules in reading order:

- `narrative`: the answer, the caution, the ending, the comparison table, the status of a trial.
- `trial_table`: all trials as one table (pandas, CSV), and which hyperparameters mattered.
- `series`: the numbers behind the pictures.
- `plots`: the pictures with matplotlib, as PNG and as SVG in the page's colours.
- `page`: `report.html`, `report.json`, `trials.csv`, from the templates beside it.
- `sweep_report`: the summary of a sweep, with a Pareto front for each study.
- `figures`: the pictures with Plotly.
- `annotations`: notes, figures and summaries, written into a run's Optuna studies.
- `dashboard`: optuna-dashboard over any number of runs, read-only, on this machine alone.

Exports: sentences and the comparison for the terminal, `write_report` and `to_json` for a run,
`annotate_studies` for its storage, the sweep's summary, `write_analysis_plots`, `open_dashboard`.
"""

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
