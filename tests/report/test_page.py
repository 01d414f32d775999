from __future__ import annotations

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from autoprune.record import RunRecord
from autoprune.report.page import to_json, write_report
from tests.example_record import FELL_SHORT, REACHED, UNFINISHED

VOID = {"meta", "br", "img", "use", "path"}


class Balanced(HTMLParser):
    """Counts open tags; collects what a reader would see."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(record: RunRecord, out: Path) -> str:
    page = Balanced()
    page.feed(write_report(record, out).read_text(encoding="utf-8"))
    assert page.open == []
    return re.sub(r"\s+", " ", "".join(page.text))


@pytest.mark.parametrize(
    ("record", "verdict"),
    [(REACHED, "Target reached."), (FELL_SHORT, "Target not reached."), (UNFINISHED, "Not finished.")],
)
def test_the_page_says_how_it_ended(record: RunRecord, verdict: str, tmp_path: Path) -> None:
    assert verdict in read(record, tmp_path)


def test_the_page_shows_what_a_reader_asks_for(tmp_path: Path) -> None:
    (tmp_path / "model.autoprune.age").write_bytes(b"x" * 1234)
    text = read(REACHED, tmp_path)
    for wanted in (
        "50.2 % fewer MACs", "90.39 to 91.96", "n = 5,000", "1.55× faster",  # noqa: RUF001
        "Round 2: ceiling lowered.", "None of 4 trials recovered", "bn_scale", "layer3.2.conv2", "64 → 45",
        "the loss became infinite at step 41", "it makes the model's output", "3f" * 32, "torch",
        "autoprune run studies/resnet20_cifar10.py --target macs=0.5", "autoprune.load(", "1.23 kB",
        "91.19 % before, 91.34 % after 3 epochs", "It is what was delivered.",
        "between 15 trials, by Optuna's fANOVA", "a hint, not a finding",
    ):  # fmt: skip
        assert wanted in text, wanted


def test_the_page_needs_no_network_and_no_script(tmp_path: Path) -> None:
    html = write_report(REACHED, tmp_path).read_text(encoding="utf-8")
    assert "<script" not in html
    assert not re.findall(r'(?:src|href)="(?!#)[^"]*"', html)
    assert set(re.findall(r"https?://[^\"'\s<]+", html)) <= {
        "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink",
    }  # fmt: skip


def test_text_of_the_run_is_escaped(tmp_path: Path) -> None:
    html = write_report(dataclasses.replace(REACHED, command="run <b>x</b>"), tmp_path).read_text(
        encoding="utf-8"
    )
    assert "run &lt;b&gt;x" in html


def test_the_json_has_the_record_and_the_derived_numbers(tmp_path: Path) -> None:
    write_report(REACHED, tmp_path)
    document = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert document["record"] == json.loads(json.dumps(dataclasses.asdict(REACHED)))
    assert document["derived"]["macs_removed"] == pytest.approx(0.502, abs=1e-3)
    assert document["comparison"][0]["label"] == "top-1"


def test_a_diverged_loss_becomes_null() -> None:
    first = REACHED.rounds[0]
    point = dataclasses.replace(first.trials[0].epochs[0], train_loss=math.inf)
    trial = dataclasses.replace(first.trials[0], epochs=(point,))
    record = dataclasses.replace(REACHED, rounds=(dataclasses.replace(first, trials=(trial,)),))
    document = json.loads(to_json(record))
    assert document["record"]["rounds"][0]["trials"][0]["epochs"][0]["train_loss"] is None


def test_a_report_can_be_made_again_over_the_old_one(tmp_path: Path) -> None:
    write_report(UNFINISHED, tmp_path)
    write_report(REACHED, tmp_path)
    assert not list(tmp_path.glob("*.part"))
    assert sorted(p.name for p in (tmp_path / "plots").iterdir()) == [
        "curves.png", "path.png", "sensitivity.png", "tuning.png", "widths.png",
    ]  # fmt: skip
