"""Several processes on one run: they share its trials, survive each other, and overwrite nothing."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from autoprune.cli.fleet import _study_of_command
from autoprune.cli.main import main
from autoprune.cli.options import digests
from autoprune.cli.study_file import load_study
from autoprune.errors import UsageError
from autoprune.location import DATABASE, RunLocation
from autoprune.record import TrialRecord
from autoprune.search.controller import replay
from autoprune.search.history import read_baseline, read_round, read_trials, round_outcomes
from autoprune.storage.membership import list_processes
from autoprune.storage.run_header import RunHeader
from autoprune.storage.run_store import RunStore
from autoprune.storage.trial_slots import OWNER
from tests.tiny import tiny_study

ROOT = Path(__file__).resolve().parents[2]
STUDY = """
import time
from pathlib import Path

import torch

from autoprune.config import Search
from tests.tiny import tiny_study, trained_net

GO = Path(__file__).with_name("go")  # until it is there, trials last while other processes start


def loss(output, target):
    time.sleep(1.5 if output.requires_grad and not GO.exists() else 0)
    return torch.nn.functional.cross_entropy(output, target)


study = tiny_study(
    search=Search(trials={trials}, epochs=1, criteria=("l1",)), budget="epochs=80", loss=loss, max_drop=30.0,
    target="macs=0.7", model=trained_net, baseline=None,
)
"""
# As `python -m autoprune`, but heartbeats are so frequent that a test can wait for one to be missed.
QUICK = """
import sys
from autoprune.storage import database
from autoprune.storage import membership
database.HEARTBEAT_S = membership.HEARTBEAT_S = 0.5
database.GRACE_PERIOD_S = membership.GRACE_PERIOD_S = 4
from autoprune.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def process(*words: object, quick: bool = True) -> Iterator[subprocess.Popen[str]]:
    how = ["-c", QUICK] if quick else ["-m", "autoprune"]
    command = [sys.executable, *how, *map(str, words)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as started:
        try:
            yield started
        finally:
            started.kill()


def study_file(folder: Path, trials: int) -> Path:
    file = folder / "many_hands.py"
    file.write_text(STUDY.format(trials=trials), encoding="utf-8")
    return file


def until(check: Callable[[], bool], limit_s: float = 500) -> None:
    limit = time.monotonic() + limit_s
    while not check():
        assert time.monotonic() < limit, "it did not happen"
        time.sleep(0.3)


def first_round(out: Path) -> list[TrialRecord]:
    try:
        with closing(RunStore(out, "tiny")) as store:
            study = store.study(1)
            return [] if study is None else list(read_trials(study))
    except UsageError:
        return []


def owners(out: Path) -> dict[int, set[int]]:
    """Process -> trials of the first round that it runs or ran."""
    found: dict[int, set[int]] = {}
    if (out / DATABASE).is_file():
        with closing(RunStore(out, "tiny")) as store:
            study = store.study(1)
            for trial in study.get_trials(deepcopy=False) if study else ():
                found.setdefault(trial.user_attrs[OWNER], set()).add(trial.number)
    return found


def check_round(out: Path) -> list[TrialRecord]:
    """The promoted sequence is what the records imply, and no round has more trials than planned."""
    with closing(RunStore(out, "tiny")) as store:
        replay(read_baseline(store).goal, tiny_study().control, round_outcomes(store))
        for study in store.rounds():
            finished = [t for t in read_trials(study) if t.top1 is not None]
            assert len(finished) <= read_round(study).trials
        study = store.study(1)
        assert study is not None
        return list(read_trials(study))


@pytest.mark.slow
def test_local_workers_share_the_trials(tmp_path: Path) -> None:
    out, study = tmp_path / "run", study_file(tmp_path, 16)
    words = ("run", study, "--out", out, "--plain", "--workers", "2", "--json")
    with process(*words, quick=False) as run:
        until(lambda: len(owners(out)) == 2)
        (tmp_path / "go").touch()
        told, progress = run.communicate(timeout=900)
    assert run.returncode == 0, progress
    assert json.loads(told)["after"]["macs"] > 0
    trials = check_round(out)
    assert len([t for t in trials if t.top1 is not None]) == 16
    with closing(RunStore(out, "tiny")) as store:
        assert [p.role for p in list_processes(store)] == ["coordinator", "worker"]
        assert all(p.state in ("ended", "gone") for p in list_processes(store))
    assert len([line for line in progress.splitlines() if "round 1 trial" in line]) == 16, "all are told"
    status = subprocess.run(
        [sys.executable, "-m", "autoprune", "status", out, "--json"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    assert len(json.loads(status.stdout)["processes"]) == 2


@pytest.mark.slow
def test_a_killed_and_a_stopped_worker_are_replaced_and_overwrite_nothing(tmp_path: Path) -> None:
    out, study = tmp_path / "run", study_file(tmp_path, 24)
    with process("run", study, "--out", out, "--plain") as run:
        until(lambda: any(t.state == "running" for t in first_round(out)))
        with process("worker", out) as killed, process("worker", out) as stopped:
            until(lambda: len(owners(out)) == 3)
            seen = owners(out)
            killed.send_signal(signal.SIGKILL)
            stopped.send_signal(signal.SIGSTOP)
            until(lambda: sum(t.state == "failed" for t in first_round(out)) >= 2)
            (tmp_path / "go").touch()
            stopped.send_signal(signal.SIGCONT)
            _, progress = run.communicate(timeout=900)
            assert run.returncode == 0, progress
            _, woken = stopped.communicate(timeout=600)
    assert len(seen) == 3
    trials = check_round(out)
    lost = [t for t in trials if t.state == "failed"]
    assert len(lost) >= 2
    assert all(t.failure == "the process that ran it was stopped" for t in lost)
    assert len([t for t in trials if t.top1 is not None]) == 24
    assert "was given to another process" in woken, woken
    assert main(["verify", str(out / "model.autoprune")]) == 0


@pytest.mark.slow
def test_two_ranks_are_one_worker(tmp_path: Path) -> None:
    out, study = tmp_path / "run", study_file(tmp_path, 16)
    ranks = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with process("run", study, "--out", out, "--plain", "--quiet", quick=False) as run:
        until(lambda: any(t.state == "running" for t in first_round(out)))
        with subprocess.Popen(
            [*ranks, "-m", "autoprune", "worker", str(out)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        ) as worker:  # fmt: skip
            until(lambda: len(owners(out)) == 2)
            (tmp_path / "go").touch()
            _, progress = run.communicate(timeout=900)
            assert run.returncode == 0, progress
            _, told = worker.communicate(timeout=600)
    assert worker.returncode == 0, told
    assert "is finished; this worker ran" in told
    trials = check_round(out)
    assert all(t.top1 is not None and not t.failure for t in trials)
    shared = max(owners(out).items())[1]
    assert shared
    alone = [t.top1 for t in trials if t.number not in shared and t.top1 is not None]
    assert all(min(alone) - 0.1 <= (t.top1 or 0) for t in trials if t.number in shared)


def test_a_second_coordinator_and_a_worker_with_another_study_are_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, study = tmp_path / "run", study_file(tmp_path, 2)
    assert main(["worker", str(out)]) == 2
    assert "no run in" in capfd.readouterr().err
    with process("run", study, "--out", out, "--plain", "--quiet") as run:
        until(lambda: bool(first_round(out)))
        assert main(["run", str(study), "--out", str(out), "--plain", "--resume", "--quiet"]) == 2
        refused = capfd.readouterr().err
        assert f"is held by {platform.node()} (process {run.pid}), since " in refused
        assert "autoprune worker joins it" in refused
        run.send_signal(signal.SIGTERM)
        _, told = run.communicate(timeout=100)
        assert run.returncode == 130
        assert "--resume" in told
    study.write_text(study.read_text() + "\n# changed\n", encoding="utf-8")
    assert main(["worker", str(out)]) == 2
    assert "not the file" in capfd.readouterr().err


def test_a_worker_takes_every_option_of_the_runs_command() -> None:
    words = "digits --exclude conv1 --only 'layer*' --norms rescale --round-to 4 --target macs=0.4 "
    words += "--max-drop 2 --budget 5m --seed 3 --device cpu"
    told = RunHeader(
        location=RunLocation(folder=Path("runs/digits")), name="digits", command=f"autoprune run {words}",
        sources=digests("digits", None),
    )  # fmt: skip
    wanted = replace(
        load_study("digits"), exclude=("conv1",), only=("layer*",), norms="rescale", round_to=4,
        target="macs=0.4", max_drop=2.0, budget="5m", seed=3, device="cpu",
    )  # fmt: skip
    study = _study_of_command(told, None).study
    changes = {n: getattr(study, n) for n in vars(wanted) if n not in ("model", "data")}
    assert changes == {n: getattr(wanted, n) for n in changes}
