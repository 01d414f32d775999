from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from xml.etree import ElementTree

import matplotlib as mpl
import pytest

from autoprune.record import RunRecord
from autoprune.report import plots
from tests.example_record import REACHED, UNFINISHED


@pytest.mark.parametrize("name", list(plots.PLOTS))
def test_a_plot_becomes_an_svg_in_the_colours_of_the_page(name: str) -> None:
    svg = plots.to_svg(plots.draw_all(REACHED)[name], name)
    ElementTree.fromstring(svg.replace("xlink:href", "href"))  # noqa: S314 our own text
    assert not set(re.findall(r"#[0-9a-f]{6}\b", svg)) - {"#000000", "#ffffff"}, (
        "a colour that ignores dark mode"
    )
    assert "DejaVu" not in svg
    assert "http" not in svg.replace("http://www.w3.org/", "")


def test_ids_of_two_plots_do_not_meet() -> None:
    figures = plots.draw_all(REACHED)
    ids = [set(re.findall(r'\bid="([^"]+)"', plots.to_svg(f, n))) for n, f in figures.items()]
    assert len(set.union(*ids)) == sum(map(len, ids))


def test_a_png_is_written(tmp_path: Path) -> None:
    plots.save_png(plots.draw_all(REACHED)["path"], tmp_path / "path.png")
    assert (tmp_path / "path.png").read_bytes().startswith(b"\x89PNG")


def test_an_unfinished_run_has_no_widths_yet() -> None:
    assert set(plots.draw_all(UNFINISHED)) == {"path", "sensitivity", "curves"}


def test_a_run_without_rounds_has_no_plots_at_all() -> None:
    assert plots.draw_all(dataclasses.replace(UNFINISHED, rounds=())) == {}


def test_far_outliers_do_not_flatten_the_path() -> None:
    first = REACHED.rounds[0]
    lost = dataclasses.replace(first.trials[0], top1=0.1, recovered=False)
    record: RunRecord = dataclasses.replace(
        REACHED, rounds=(dataclasses.replace(first, trials=(lost, *first.trials[1:])), *REACHED.rounds[1:])
    )
    figure = plots.draw_all(record)["path"]
    assert figure.axes[0].get_ylim()[0] > 85


def test_matplotlib_is_left_as_it_was() -> None:
    before = dict(mpl.rcParams)
    plots.to_svg(plots.draw_all(REACHED)["path"], "path")
    assert dict(mpl.rcParams) == before
