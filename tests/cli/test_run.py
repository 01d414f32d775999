"""A whole run through the command line: started, watched, stopped, resumed, reported."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from autoprune.cli.main import main
from autoprune.pruning.sensitivity import SensitivityTable

STUDY = "from tests.tiny import tiny_study\n\nstudy = tiny_study()\n"
ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "autoprune"]


def autoprune(*words: object, pass_fds: Sequence[int] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, words)], cwd=ROOT, capture_output=True, text=True, check=False, pass_fds=pass_fds
    )


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A run that was made through `main`, and what it printed."""

    study: Path
    out: Path
    code: int
    told: dict[str, Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("cli")
    study, out = folder / "a_tiny_study.py", folder / "run"
    study.write_text(STUDY, encoding="utf-8")
    done = autoprune("run", study, "--out", out, "--plain", "--json")
    return Finished(study=study, out=out, code=done.returncode, told=json.loads(done.stdout))


def test_the_result_is_told_to_machines_and_by_the_exit_code(finished: Finished) -> None:
    assert finished.code == (0 if finished.told["reached"] else 3)
    assert finished.told["after"]["macs"] < finished.told["before"]["macs"]
    assert Path(finished.told["model_file"]).is_file()
    assert "record" not in finished.told


def test_a_run_is_never_overwritten(finished: Finished, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(finished.study), "--out", str(finished.out)]) == 2
    assert "--resume" in capfd.readouterr().err


def test_status_and_report_read_it_back(finished: Finished, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(finished.out)]) == 0
    assert "fewer MACs" in capfd.readouterr().out
    assert main(["status", str(finished.out), "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["record"]["name"] == "tiny"
    (finished.out / "report.html").unlink()
    assert main(["report", str(finished.out)]) == 0
    assert (finished.out / "report.html").is_file()
    assert capfd.readouterr().out.strip() == str(finished.out / "report.html")


def test_resuming_a_finished_run_shows_its_result_again(
    finished: Finished, capfd: pytest.CaptureFixture[str]
) -> None:
    code = main(["run", str(finished.study), "--out", str(finished.out), "--plain", "--resume"])
    told = capfd.readouterr()
    assert code == finished.code
    assert "before" in told.out
    assert str(finished.out / "report.html") in told.out
    assert "resumed" in told.err


def test_the_command_in_the_report_has_no_resume(finished: Finished) -> None:
    record = json.loads((finished.out / "report.json").read_text(encoding="utf-8"))["record"]
    assert record["command"].startswith("autoprune run ")
    assert "--resume" not in record["command"]


def test_a_dry_run_tells_people_the_plan(finished: Finished, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(finished.study), "--out", str(finished.out) + "2", "--dry-run"]) == 0
    assert "Everything is in order" in capfd.readouterr().out


def test_analyze_trains_and_measures(finished: Finished, capfd: pytest.CaptureFixture[str]) -> None:
    folder = finished.study.parent / "looked"
    assert main(["analyze", str(finished.study), "--out", str(folder), "--quiet", "--device", "cpu"]) == 0
    told = capfd.readouterr().out
    assert "In one step this network is" in told or "Even a little pruning" in told
    assert "points measured in" in told
    document = json.loads((folder / "analysis.json").read_text())
    assert document["points"]
    assert document["prospects"]
    assert SensitivityTable.from_json(json.dumps(document)).points
    for name in ("sensitivity.png", "prunability.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    assert main(["analyze", str(finished.study), "--share", "0.3", "--quiet"]) == 2
    assert "half" in capfd.readouterr().err


def test_a_passphrase_locks_the_result(tmp_path: Path, finished: Finished) -> None:
    (tmp_path / "words").write_text("correct horse\n", encoding="utf-8")
    with (tmp_path / "words").open("rb") as words:
        done = autoprune(
            "run", finished.study, "--out", finished.out, "--resume", "--quiet",
            "--passphrase-fd", words.fileno(), pass_fds=[words.fileno()],
        )  # fmt: skip
    assert done.returncode == finished.code
    assert done.stderr == ""
    assert b"-> scrypt" in (finished.out / "model.autoprune.age").read_bytes()[:200]
    assert "correct horse" not in done.stdout


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(tmp_path: Path, finished: Finished) -> None:
    words = ["run", str(finished.study), "--out", str(tmp_path / "run"), "--plain"]
    with subprocess.Popen(
        [*COMMAND, *words], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background ignores it
    ) as run:  # fmt: skip
        assert run.stderr is not None
        for line in run.stderr:
            if "round 1 trial 0" in line:
                run.send_signal(signal.SIGINT)
                break
        told = run.stderr.read()
        assert run.wait() == 130
    assert "error: interrupted; everything finished so far is kept" in told
    assert "Traceback" not in told
    hint = told.partition("go on with: ")[2].split()
    assert hint == ["autoprune", *words, "--resume"]
    again = autoprune(*hint[1:], "--dry-run")  # tests/pipeline/test_run.py resumes in earnest
    assert again.returncode == 0, again.stderr
