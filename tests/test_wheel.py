"""The wheel works where there is no checkout: it is built, installed alone, and used from another folder."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STUDIES = sorted(p.name for p in (ROOT / "studies").glob("*.py"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pip wheel`, by the build backend that the tests' environment has: nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    pip(sys.executable, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def bin_folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands of a new environment with the wheel in it.

    The environment finds the packages that autoprune needs through a `.pth` file that names this one's
    folder. Python reads no `.pth` file of a folder that is added in this way, so the editable installation
    of the checkout, which is such a file, stays out of it.
    """
    home = tmp_path_factory.mktemp("empty")
    venv.create(home, symlinks=True)
    python = home / "bin/python"
    pip(sys.executable, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel))
    packages = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    Path(packages, "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    return home / "bin"


def pip(python: str, *words: str) -> None:
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "--quiet", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def call(words: list[str | Path], folder: Path) -> str:
    """Run a command in `folder`, where neither the path nor the environment leads to the checkout."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_the_package_its_templates_and_studies_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    package = {
        p.relative_to(ROOT).as_posix()
        for p in (ROOT / "autoprune").rglob("*")
        if p.is_file() and "__pycache__" not in p.parts
    }
    assert {"autoprune/py.typed", "autoprune/report/report.html.j2", "autoprune/report/page.css"} <= package
    assert len(STUDIES) >= 6
    expected = package | {f"autoprune/studies/{name}" for name in STUDIES}
    information = {n for n in names if ".dist-info/" in n}
    assert names - information == expected
    assert any(n.endswith("/licenses/LICENSE") for n in information)


def test_the_installed_command_line_says_its_version_and_lies_in_the_new_environment(
    bin_folder: Path, tmp_path: Path
) -> None:
    code = "import autoprune, importlib.metadata as m; print(autoprune.__file__, m.version('autoprune'))"
    path, version = call([bin_folder / "python", "-c", code], tmp_path).split()
    assert Path(path).is_relative_to(bin_folder.parent)
    assert call([bin_folder / "autoprune", "--version"], tmp_path) == f"autoprune {version}\n"


def test_a_built_in_study_is_completed_and_checked_outside_the_checkout(
    bin_folder: Path, tmp_path: Path
) -> None:
    code = (
        "from autoprune.cli.completion import studies\n"
        "from autoprune.cli.study_file import find_study\n"
        "print(studies('dig'), find_study('digits'))\n"
    )
    completed, path = call([bin_folder / "python", "-c", code], tmp_path).rsplit(maxsplit=1)
    assert completed == "['digits']"
    assert Path(path).is_relative_to(bin_folder.parent)
    checked = call([bin_folder / "autoprune", "run", "digits", "--dry-run"], tmp_path)
    assert "digits" in checked
    assert list(tmp_path.iterdir()) == [], "a dry run writes nothing"
