"""The house keeps its order: contracts hold, every room has its page, nothing heavy is imported early."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import autoprune

ROOT = Path(__file__).resolve().parents[1]
ROOMS = sorted(m.name for m in pkgutil.iter_modules(autoprune.__path__) if m.ispkg)
VAGUE_NAMES = {"utils", "helpers", "helper", "common", "misc", "manager", "handler", "base", "core", "tools"}


def test_rooms_import_only_what_the_contracts_allow() -> None:
    linter = Path(sys.executable).with_name("lint-imports")
    told = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_its_page_and_exports_no_module(room: str) -> None:
    package = importlib.import_module(f"autoprune.{room}")
    modules = [m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")]
    page = package.__doc__ or ""
    assert [m for m in modules if f"`{m}`" not in page] == [], "the page names every module of the room"
    exported = getattr(package, "__all__", [])
    assert [n for n in exported if isinstance(getattr(package, n), types.ModuleType)] == []


def test_no_module_has_a_name_that_says_nothing() -> None:
    names = {p.stem for p in (ROOT / "autoprune").rglob("*.py")}
    assert not names & VAGUE_NAMES


def test_public_names_resolve_and_keep_their_meaning() -> None:
    code = (
        "import types, autoprune, autoprune.pipeline, autoprune.cli\n"
        "for name in autoprune.__all__:\n"
        "    assert not isinstance(getattr(autoprune, name), types.ModuleType), name\n"
        "from autoprune import densify, sensitivity, finetune\n"
        "assert callable(densify) and callable(sensitivity) and callable(finetune)\n"
        "assert not hasattr(autoprune, 'no_such_name')\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_and_its_command_line_leaves_torch_alone() -> None:
    code = "import sys, autoprune, autoprune.cli; sys.exit('torch' in sys.modules or 'optuna' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
