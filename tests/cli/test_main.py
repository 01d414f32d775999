"""The command line through its real entry point: a process, its output, its exit code."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from torch import nn

from autoprune import __version__
from autoprune.cli.main import main


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
    heavy = {
        "torch",
        "optuna",
        "pandas",
        "matplotlib",
        "plotly",
        "sklearn",
        "onnx",
        "onnxruntime",
        "sqlalchemy",
    }
    code = (
        "import sys; from autoprune.cli.main import main\n"
        f"code = main(['--help']); print(sorted({heavy} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Prune a trained network" in done.stdout
    assert done.stderr == "[]\n", "something heavy is imported at the start"


def test_version_and_no_arguments() -> None:
    assert re.fullmatch(r"autoprune \d+\.\d+\.\d+\n", autoprune("--version").stdout)
    bare = autoprune()
    assert bare.returncode == 0
    assert "Usage" in bare.stdout


@pytest.mark.parametrize(
    ("args", "error", "hint"),
    [
        (["rum", "digits"], "no such command 'rum'", "did you mean run?"),
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


def test_what_is_misspelt_is_told_with_the_nearest_that_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Command, option, study, study file, run, network, source, weights, data set, data option, module."""
    monkeypatch.chdir(tmp_path)
    for name in ("my_study.py", "net.py", "cnn.pth"):
        (tmp_path / name).write_text("", encoding="utf-8")
    (tmp_path / "runs/mine").mkdir(parents=True)
    (tmp_path / "runs/mine/study.sqlite3").write_bytes(b"")
    network = ["run", "--weights", "cnn.pth", "--data", "digits", "--model"]
    data = ["run", "--weights", "cnn.pth", "--model", "torchvision:resnet18", "--data"]
    for words, nearest in (
        (["sweeep"], "sweep"),
        (["run", "digits", "--max-dop", "1"], "--max-drop"),
        (["run", "digts"], "digits"),
        (["run", "my_studdy.py"], "my_study.py"),
        (["status", "runs/min"], "runs/mine"),
        (["report", "runs/mime"], "runs/mine"),
        (["dashboard", "runs/mines"], "runs/mine"),
        ([*network, "torchvision:resnt18"], "resnet18"),
        ([*network, "torchvison:resnet18"], "torchvision"),
        ([*network, "nett.py:Net"], "net.py"),
        (["run", "--model", "torchvision:resnet18", "--weights", "cn.pth", "--data", "digits"], "cnn.pth"),
        ([*data, "cifar:x"], "cifar10"),
        ([*data, "cifar10:x,normalise=half"], "normalize"),
        (["groups", "digits", "--exclude", "layer1.0.con1"], "layer1.0.conv1"),
    ):  # fmt: skip
        assert main(words) == 2, words
        hint = capfd.readouterr().err.partition("hint: ")[2]
        assert re.search(rf"did you mean '?{re.escape(nearest)}", hint), f"{words}: {hint}"


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
    assert "images/s on cpu" in found["study"]["detail"]
    assert "a budget of 10m is about" in found["study"]["detail"]


def test_the_version_is_the_installed_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"autoprune {version('autoprune')}\n"
    assert __version__ == version("autoprune")
