"""Many runs in one night: the queue, its clock, and what a failure does."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoprune.cli.main import main
from autoprune.pipeline.sweep import SweepDeadline, make_jobs, read_job
from autoprune.report import Job
from tests.clock import Clock

ROOT = Path(__file__).resolve().parents[2]
TINY = """
import time
from pathlib import Path

import torch

from autoprune.config import Search
from tests.tiny import tiny_study, trained_net

# Until the file is there a training step lasts, so that there is time to stop the sweep.
GO = Path(__file__).with_name("go")


def loss(output, target):
    time.sleep(1.5 if output.requires_grad and not GO.exists() else 0)
    return torch.nn.functional.cross_entropy(output, target)


study = tiny_study(
    loss=loss, search=Search(trials=2, epochs=2, criteria=("l1",)), model=trained_net, baseline=None,
)
"""
BROKEN = (
    "from tests.tiny import tiny_study\n\n\ndef data():\n    raise OSError('the disk is gone')\n\n\n"
    "study = tiny_study(name='broken', data=data)\n"
)


def studies(folder: Path) -> tuple[str, str]:
    good, bad = folder / "one_tiny.py", folder / "one_broken.py"
    good.write_text(TINY, encoding="utf-8")
    bad.write_text(BROKEN, encoding="utf-8")
    return str(bad), str(good)


def command(*words: object) -> list[str]:
    return [sys.executable, "-m", "autoprune", "sweep", *map(str, words)]


def test_a_queue_is_studies_times_targets_times_seeds() -> None:
    jobs = make_jobs(["a", "b.py"], ["macs=0.5", "params=0.3"], [0, 1])
    assert len(jobs) == len({job.name for job in jobs}) == 8
    assert jobs[0] == Job(study="a", target="macs=0.5", seed=0)
    assert jobs[-1].name == "b-params-0.3-seed-1"
    assert make_jobs(["a"], [], []) == (Job(study="a"),)


def test_time_is_divided_and_handed_on(clock: Clock) -> None:
    until = SweepDeadline(monotonic_s=time.monotonic() + 1000)
    assert until.budget_per_job(4) == pytest.approx(225)
    clock.advance(600)
    assert until.budget_per_job(4) == pytest.approx(90)
    assert until.budget_per_job(1) == pytest.approx(360)
    clock.advance(401)
    assert until.budget_per_job(3) == 0
    assert SweepDeadline().budget_per_job(3) is None


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["digits", "--until", "7", ], "no time of day"),
        (["digits", "--until", "07:00", "--budget", "1h"], "give one of them"),
        (["digits", "--budget", "epochs=3"], "--budget 8h"),
        (["no-such-study"], "no study"),
        (["digits", "digits"], "same folder"),
        (["digits", "--target", "speed=2"], "names 'speed'"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_refused(words: list[str], told: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["sweep", *words]) == 2
    assert told in capfd.readouterr().err


@pytest.mark.slow
def test_a_failure_stops_no_other_and_a_stopped_sweep_goes_on(tmp_path: Path) -> None:
    bad, good = studies(tmp_path)
    out = tmp_path / "out"
    words = [bad, good, "--seed", 0, "--seed", 1, "--out", out, "--plain", "--json"]
    with subprocess.Popen(command(*words), cwd=ROOT, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "one_tiny-seed-0" in line and "round 1 from" in line:
                process.send_signal(signal.SIGTERM)
                break
        process.stderr.read()
        assert process.wait() == 130
    assert (out / "sweep.csv").is_file()
    stopped = read_job(Job(study=good, seed=0), out)
    (tmp_path / "go").touch()
    assert stopped.state == "waiting"
    assert stopped.record is not None
    finished = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, check=False)
    assert finished.returncode == 1, finished.stderr
    rows = json.loads(finished.stdout)
    assert [row["state"] for row in rows] == ["failed", "reached", "failed", "reached"]
    assert "the disk is gone" in rows[0]["reason"]
    assert "resumed" in finished.stderr
    again = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, check=False)
    assert "one_tiny" not in again.stderr, "what is done is not run again"
