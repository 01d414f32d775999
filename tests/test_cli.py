"""The command line through its real entry point: a process, its output, its exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from autoprune.cli import main


def autoprune(*args: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"NO_COLOR": "1", "COLUMNS": "100", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "autoprune", *args],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=env,
        check=False,
    )


def test_help_comes_at_once() -> None:
    began = time.perf_counter()
    done = autoprune("--help")
    took = time.perf_counter() - began
    assert done.returncode == 0
    assert "Prune a trained network" in done.stdout
    assert took < 2.0, "measured 0.4 s on an idle machine: something heavy is imported at the start"


def test_version_and_no_arguments() -> None:
    assert re.fullmatch(r"autoprune \d+\.\d+\.\d+\n", autoprune("--version").stdout)
    bare = autoprune()
    assert bare.returncode == 0
    assert "Usage" in bare.stdout


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        (["rum", "digits"], "no such command 'rum'", "'run'"),
        (["run", "digits", "--targt", "macs=0.5"], "no such option: --targt", "--target"),
        (["run", "digit"], "there is no study 'digit'", "did you mean 'digits'"),
        (["run"], "no study is given", "autoprune run digits"),
        (["run", "--model", "torchvision:resnet18"], "--model is given without --weights", "--data"),
        (["run", "digits", "--model", "torchvision:resnet18"], "both the study", "own network"),
        (["run", "digits", "--plain", "--passphrase"], "--passphrase and --plain", "one way"),
        (["run", "digits", "--seed", "x"], "--seed", "--help"),
        (["report", "nowhere"], "no run in nowhere", "runs/NAME"),
        (["status", "nowhere"], "no run in nowhere", "runs/NAME"),
    ],
)
def test_wrong_usage_exits_2_with_error_and_hint(
    args: list[str], error: str, hint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 2
    told = capfd.readouterr()
    assert told.out == ""
    first, _, rest = told.err.partition("hint: ")
    assert first.startswith("error: ")
    assert error in first
    assert hint in rest + first


def test_bad_settings_are_told_together_before_anything_is_written(tmp_path: Path) -> None:
    done = autoprune(
        "run", "digits", "--target", "flops=0.5", "--budget", "soon", "--max-drop", "-1", cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stdout == ""
    for wrong in ("flops", "soon", "max_drop=-1"):
        assert wrong in done.stderr
    assert not list(tmp_path.iterdir())


def test_a_dry_run_prints_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    done = autoprune("run", "digits", "--dry-run", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    plan = json.loads(done.stdout)
    assert plan["name"] == "digits"
    assert plan["rounds"]
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_are_refused_before_training(tmp_path: Path) -> None:
    torch.save(nn.Linear(3, 2).state_dict(), tmp_path / "w.pt")
    done = autoprune(
        "run", "--model", "torchvision:resnet18", "--weights", "w.pt", "--data", "digits", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "missing, first conv1.weight" in done.stderr
    assert "2 unexpected, first weight" in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["w.pt"]


def test_a_traceback_is_shown_only_when_it_is_asked_for(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "digit"]) == 2
    assert "Traceback" not in capfd.readouterr().err
    assert main(["run", "--debug", "digit"]) == 2
    assert "Traceback" in capfd.readouterr().err


def test_groups_shows_what_may_shrink(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["groups", "digits", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert len(told["groups"]) > 3
    assert told["frozen"]
    assert main(["groups", "digits"]) == 0
    assert "MACs" in capfd.readouterr().out


def test_doctor_tells_what_it_found(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = main(["doctor", "--json", "--out", str(tmp_path)])
    found = json.loads(capfd.readouterr().out)
    assert code == (0 if all(one["ok"] for one in found) else 1)
    names = [one["name"] for one in found]
    assert names == [
        "python", "packages", "processor", "memory", "accelerator", "storage", "checkpoints", "your key",
    ]  # fmt: skip
    assert not list(tmp_path.iterdir())
    assert main(["doctor", "--out", str(tmp_path)]) == code
    assert str(tmp_path)[:20] in capfd.readouterr().out


def test_doctor_finds_what_cannot_be_written(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    code = main(["doctor", "--json", "--artifacts", str(tmp_path / "file" / "x"), "--out", str(tmp_path)])
    found = {one["name"]: one for one in json.loads(capfd.readouterr().out)}
    assert code == 1
    assert not found["checkpoints"]["ok"]
    assert found["checkpoints"]["advice"]
    assert main(["doctor", "--storage", "mysql://x/y"]) == 2
    assert "postgresql" in capfd.readouterr().err


def test_doctor_measures_a_study(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    study = tmp_path / "quick_study.py"
    study.write_text("from tests.tiny import tiny_study\n\nstudy = tiny_study(baseline=None, budget='10m')\n")
    main(["doctor", str(study), "--json", "--out", str(tmp_path)])
    found = {one["name"]: one for one in json.loads(capfd.readouterr().out)}
    assert found["study"]["ok"]
    assert "images/s on cpu" in found["study"]["found"]
    assert "a budget of 10m is about" in found["study"]["found"]
