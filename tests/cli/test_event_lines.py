from __future__ import annotations

import io
import json
import math
import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

from autoprune import events as ev
from autoprune.cli.event_lines import event_writer
from autoprune.config import Protection, Search
from autoprune.pipeline.run import run
from tests.tiny import tiny_study

ROOT = Path(__file__).resolve().parents[2]


def test_a_whole_run_is_told_line_by_line(tmp_path: Path) -> None:
    stream, seen = io.StringIO(), []
    study = tiny_study(search=Search(trials=1, epochs=0.5), max_drop=60.0)
    run(
        study,
        out=tmp_path / "r",
        protection=Protection(plain=True),
        on_event=event_writer(stream, seen.append),
    )
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert len(lines) == len(seen)
    names = [line["event"] for line in lines]
    assert names[0] == "run_started"
    assert names[-1] == "run_finished"
    assert {"baseline_measured", "round_started", "trial_finished", "epoch_finished", "round_decided"} <= set(
        names
    )
    finished = next(line for line in lines if line["event"] == "trial_finished")
    assert finished["record"]["top1"] > 0
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT.*\+00:00", finished["time"])


def test_a_diverged_loss_is_still_json() -> None:
    stream = io.StringIO()
    event_writer(stream, ev.ignore_event)(
        ev.EpochFinished(round=1, trial=0, epoch=1, epochs=2, lr=0.1, train_loss=math.nan, images_per_s=1.0)
    )
    assert json.loads(stream.getvalue())["train_loss"] is None


def test_the_page_names_every_event_and_every_field() -> None:
    page = (ROOT / "docs/runs.md").read_text(encoding="utf-8")
    for event in get_args(ev.Event):
        name = re.sub(r"(?<!^)(?=[A-Z])", "_", event.__name__).lower()
        row = re.search(rf"^\| `{name}` \|(.*)\|$", page, re.MULTILINE)
        assert row, f"docs/runs.md has no row for {name}"
        for field in fields(event):
            assert f"`{field.name}`" in row[1], f"docs/runs.md says nothing of {name}.{field.name}"
