"""What `autoprune status` tells at every moment of a run, asked from inside it."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from autoprune import events as ev
from autoprune.cli.main import main
from autoprune.config import Protection, Search
from autoprune.errors import UsageError
from autoprune.location import parse_run
from autoprune.pipeline.run import run
from autoprune.pipeline.status import RunStatus, read_status
from autoprune.storage.membership import join_run
from autoprune.storage.run_store import RunStore, quiet_optuna
from tests.tiny import tiny_study

PLAIN = Protection(plain=True)


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunStatus]:
    """How the run stands when each stage begins, and when a trial does."""
    out, seen = tmp_path_factory.mktemp("read_status") / "run", {}

    def look(event: ev.Event) -> None:
        if isinstance(event, ev.StageStarted):
            seen.setdefault(f"{event.stage} {event.round}", read_status(parse_run(str(out))))
        if isinstance(event, ev.EpochFinished) and event.trial == 1:
            seen.setdefault("trial", read_status(parse_run(str(out))))

    study = tiny_study(search=Search(trials=2, epochs=1), max_drop=60.0, budget="epochs=20")
    run(study, out=out, protection=PLAIN, on_event=look, command="autoprune run tiny")
    return seen | {"end": read_status(parse_run(str(out)))}


def test_before_the_original_is_measured(told: dict[str, RunStatus]) -> None:
    begun = told["baseline 0"]
    assert begun.record is None
    assert "original is being trained or measured" in begun.now
    assert [p.role for p in begun.processes] == ["coordinator"]


def test_an_analysis_is_no_trial(told: dict[str, RunStatus]) -> None:
    assert told["analysis 1"].now == "round 1, analysis: no point measured yet"


def test_a_running_trial_is_told_with_its_time(told: dict[str, RunStatus]) -> None:
    assert told["trial"].now.startswith("round 1, search: 1 of 2 trials finished, trial 1 has run for ")


def test_the_end_is_told_too(told: dict[str, RunStatus]) -> None:
    assert told["finish 0"].now == "the end: final tuning, verification, export"
    assert told["end"].now == ""
    assert told["end"].record is not None
    assert told["end"].record.outcome is not None


def test_a_run_that_nobody_works_on_says_how_to_go_on(tmp_path: Path) -> None:
    def stop(event: ev.Event) -> None:
        if isinstance(event, ev.TrialFinished):
            raise KeyboardInterrupt

    study = tiny_study(search=Search(trials=2, epochs=1), max_drop=60.0)
    with pytest.raises(KeyboardInterrupt):
        run(study, out=tmp_path / "run", protection=PLAIN, on_event=stop, command="autoprune run tiny")
    left = read_status(parse_run(str(tmp_path / "run")))
    assert left.now.startswith("nobody works on it; it was left at round 1, search: 1 of 2 trials finished")
    assert left.now.endswith("go on with: autoprune run tiny --resume")


def test_status_of_a_run_that_has_just_begun(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with (
        quiet_optuna(),
        closing(RunStore(tmp_path, "a", create=True)) as store,
        join_run(store, "coordinator"),
    ):
        assert main(["status", str(tmp_path)]) == 0
        text = capfd.readouterr().out
        assert "a: its original is being trained or measured" in text
        assert "coordinator on" in text
        assert main(["status", str(tmp_path), "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["record"] is None
    assert "stopped before its original" in read_status(parse_run(str(tmp_path))).now
    with pytest.raises(UsageError, match="no run in"):
        read_status(parse_run(str(tmp_path / "nowhere")))
    assert not (tmp_path / "nowhere").exists()
