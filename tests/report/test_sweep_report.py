"""The summary of a sweep, from results that are made up."""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path

from autoprune.report.sweep_report import (
    Job,
    JobResult,
    Point,
    pareto,
    pareto_front,
    row_cells,
    sweep_ranges,
    sweep_table,
    write_sweep_report,
)
from tests.example_record import REACHED, model


def test_the_front_is_what_no_other_beats() -> None:
    plane = {"a": (0.5, -0.2), "b": (0.3, -1.0), "c": (0.4, -1.5), "d": (0.6, -0.2), "e": (0.3, -2.0)}
    points = [
        Point(study="s", name=name, macs_share=macs, delta_pp=delta) for name, (macs, delta) in plane.items()
    ]
    assert [p.name for p in pareto_front(points)] == ["b", "a"]


def test_a_summary_says_what_came_of_every_job(tmp_path: Path) -> None:
    done = JobResult(job=Job(study="a.py"), state="reached", folder=tmp_path / "a", record=REACHED)
    failed = JobResult(job=Job(study="b", seed=3), state="failed", folder=tmp_path / "b", record=None,
                 reason="<no disk>")  # fmt: skip
    names = {path.name for path in write_sweep_report([done, failed], tmp_path)}
    assert names == {"sweep.csv", "sweep.json", "sweep.html", "pareto.png"}
    with (tmp_path / "sweep.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [r["state"] for r in rows] == ["reached", "failed"]
    assert float(rows[0]["change_low_pp"]) < float(rows[0]["change_pp"]) < float(rows[0]["change_high_pp"])
    assert float(rows[0]["macs_after"]) < float(rows[0]["macs_before"])
    page = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert "1 of 2 runs reached the target, 1 failed." in page
    assert "a: 49.8 % of the MACs at" in page.replace("\u00a0", " ")
    assert "&lt;no disk&gt;" in page
    assert 'href="a/report.html"' in page
    assert page.count("<svg") == 1
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "https://" not in page
    assert len(row_cells(done)) == len(row_cells(failed))


def test_every_study_has_a_front_of_its_own(tmp_path: Path) -> None:
    smaller = dataclasses.replace(REACHED, after=model(0.915, 0.3, None))
    rows = [
        JobResult(job=Job(study=study, target=target), state="reached", folder=tmp_path, record=record)
        for study in ("a.py", "b.py") for target, record in (("macs=0.5", REACHED), ("macs=0.3", smaller))
    ]  # fmt: skip
    figure = pareto(rows)
    assert figure is not None
    legend = figure.axes[0].get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b"]
    assert len(sweep_ranges(rows)) == 2
    assert "latency left" in sweep_table(rows).heads
    assert "latency left" not in sweep_table(rows[1::2]).heads, "a column in which nothing stands"


def test_a_terminal_gets_fewer_columns_under_shorter_names(tmp_path: Path) -> None:
    results = [JobResult(job=Job(study="a.py"), state="reached", folder=tmp_path, record=REACHED)]
    full, short = sweep_table(results), sweep_table(results, short=True)
    assert {"top-1 before", "parameters left", "latency left"} <= set(full.heads)
    assert short.heads == ("study", "target", "seed", "state", "top-1", "pp", "MACs", "time")
    for name, brief in (("top-1 after", "top-1"), ("change, pp", "pp"), ("MACs left", "MACs")):
        assert full.rows[0][full.heads.index(name)] == short.rows[0][short.heads.index(brief)]
