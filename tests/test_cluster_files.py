"""The scripts and manifests that docs/cluster.md shows: they parse, and their commands exist."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from autoprune.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]  # the app is a group
SCRIPTS = [ROOT / "scripts/overnight.sh", ROOT / "scripts/cluster/slurm.sh"]
DIRECTIVES = {"job-name", "array", "cpus-per-task", "time", "requeue", "open-mode", "output", "signal"}


def check_words(words: list[str]) -> None:
    """A command line of ours has a known command and known options."""
    known = {option for p in COMMANDS[words[1]].params for option in p.opts}
    given = {word for word in words if word.startswith("--")}
    assert words[0] == "autoprune"
    assert given <= known, f"{words[1]} has no {given - known}"


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.name)
def test_a_script_parses_and_may_be_run(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text


def test_the_commands_of_the_slurm_script_exist() -> None:
    text = (ROOT / "scripts/cluster/slurm.sh").read_text(encoding="utf-8")
    lines = re.findall(r"^\s*(?:exec |if )?(autoprune [a-z]+ .*)$", text, re.MULTILINE)
    assert [line.split()[1] for line in lines] == ["run", "status", "worker"]
    for line in lines:
        check_words(re.sub(r"[\"';]", "", line).split())


def test_slurm_directives_are_ones_that_sbatch_knows() -> None:
    text = (ROOT / "scripts/cluster/slurm.sh").read_text(encoding="utf-8")
    found = dict(re.findall(r"^#SBATCH --([a-z-]+)(?:=(.*))?$", text, re.MULTILINE))
    assert set(found) == DIRECTIVES
    assert found["array"].startswith("0-")
    assert text.index("#SBATCH") < text.index("set -euo")


def test_kubernetes_jobs_run_our_commands_and_hold_no_secret() -> None:
    text = (ROOT / "scripts/cluster/kubernetes.yaml").read_text(encoding="utf-8")
    config, run, workers = yaml.safe_load_all(text)
    assert [d["kind"] for d in (config, run, workers)] == ["ConfigMap", "Job", "Job"]
    names = set()
    for job in (run, workers):
        spec = job["spec"]["template"]["spec"]
        assert spec["restartPolicy"] == "OnFailure"
        (container,) = spec["containers"]
        check_words(container["command"])
        names.add(container["command"][1])
        for variable in re.findall(r"\$\((\w+)\)", " ".join(container["command"])):
            assert variable in config["data"], "Kubernetes expands only variables of the container"
        assert {"secretRef": {"name": "autoprune"}} in container["envFrom"]
    assert names == {"run", "worker"}
    assert workers["spec"]["parallelism"] == workers["spec"]["completions"]
    assert not re.search(r"PASSWORD:|SECRET", "\n".join(map(str, config["data"])))


@pytest.mark.skipif(shutil.which("nohup") is None, reason="needs nohup")
def test_overnight_starts_a_sweep_and_comes_back(tmp_path: Path) -> None:
    program = tmp_path / "autoprune"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n', encoding="utf-8")
    program.chmod(0o755)
    out = tmp_path / "out"
    environment = os.environ | {"AUTOPRUNE": str(program), "OUT": str(out), "UNTIL": "06:30", "WORKERS": "2"}
    told = subprocess.run(
        [SCRIPTS[0], "nohup", "digits", "b c.py"], env=environment, capture_output=True, text=True, check=True
    )
    assert "works until 06:30" in told.stdout
    waited = f"until grep -q workers '{out}/log'; do sleep 0.1; done"
    subprocess.run(["sh", "-c", waited], timeout=120, check=True)
    words = (out / "log").read_text(encoding="utf-8").split("\n")
    assert words[:3] == ["sweep", "digits", "b c.py"]
    check_words(["autoprune", *words])
    wrong = subprocess.run([SCRIPTS[0], "nohup"], capture_output=True, text=True, check=False)
    assert wrong.returncode == 2
    assert "STUDY" in wrong.stderr
