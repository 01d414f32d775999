from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from autoprune.cli import completion
from autoprune.cli.study_file import built_in_studies


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_study.py").write_text("", encoding="utf-8")
    for run in ("runs/digits", "runs/sweep/a"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "study.sqlite3").write_bytes(b"")
    return tmp_path


def test_studies_are_ours_and_the_files_here(here: Path) -> None:
    assert completion.studies("di") == ["digits"]
    assert completion.studies("my") == ["my_study.py"]
    assert set(built_in_studies()) < set(completion.studies(""))
    assert completion.studies("studies/") == [], "the shell completes files by itself"


def test_runs_are_folders_with_a_run_in_them(here: Path) -> None:
    assert completion.runs("") == ["runs/digits", "runs/sweep/a"]
    assert completion.runs("runs/s") == ["runs/sweep/a"]


def test_devices_and_data_sets() -> None:
    assert completion.devices("c") == ["cpu", "cuda"]
    assert completion.data_sets("i") == ["imagefolder:"]


def bash(line: str, folder: Path) -> list[str]:
    """What bash offers after this line, through the script that --show-completion gives."""
    program = Path(sys.executable).with_name("autoprune")
    script = (
        f'export PATH="{program.parent}:$PATH"\n'
        'eval "$(_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION=1 autoprune --show-completion bash)"\n'
        f"COMP_WORDS=({line}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))\n"
        '$(complete -p autoprune | sed "s/.*-F \\([^ ]*\\) .*/\\1/") autoprune\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash here")
def test_bash_completes_commands_options_and_names(here: Path) -> None:
    assert bash("autoprune rep", here) == ["report"]
    assert bash("autoprune run --max", here) == ["--max-drop"]
    assert bash("autoprune run dig", here) == ["digits"]
    assert bash("autoprune status runs/d", here) == ["runs/digits"]
