"""The package keeps the order that docs/architecture.md shows: that table is what is tested here."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "autoprune"
MODULES = sorted(p.stem for p in PACKAGE.glob("*.py"))
MAX_LINES = 450
VAGUE_NAMES = {"utils", "helpers", "helper", "common", "misc", "manager", "handler", "base", "core", "tools"}


def table() -> list[tuple[str, list[str], set[str]]]:
    """Layer, its modules in order, and the third-party packages it may import."""
    rows = re.findall(
        r"^\| (\w+) \| (.*?) \| (.*?) \|$", (ROOT / "docs/architecture.md").read_text("utf-8"), re.M
    )
    found = [
        (layer, re.findall(r"`(\w+)`", mods), set(re.findall(r"`([\w-]+)`", third)))
        for layer, mods, third in rows
    ]
    return [row for row in found if row[1]]


ORDER = [module for _, modules, _ in table() for module in modules]
ALLOWED = {module: third for _, modules, third in table() for module in modules}


def imports(module: str) -> Iterator[str]:
    """Every module that this one imports when it runs, those inside functions included, as dotted names."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    typing_only = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports relatively"
            if node.module == "autoprune":
                yield from (f"autoprune.{alias.name}" for alias in node.names)
            else:
                yield str(node.module)


def test_the_table_names_every_module_once() -> None:
    assert sorted(ORDER) == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_before_it(module: str) -> None:
    before = set(ORDER[: ORDER.index(module)])
    own = {name.split(".")[1] for name in imports(module) if name.startswith("autoprune.")}
    assert own <= before, f"{module} imports {own - before}, which stand after it"


@pytest.mark.parametrize("module", MODULES)
def test_third_party_imports_stay_in_their_layer(module: str) -> None:
    roots = {name.split(".")[0] for name in imports(module)} - {"autoprune"} - set(sys.stdlib_module_names)
    assert roots <= ALLOWED[module], f"{module} imports {roots - ALLOWED[module]}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_short(module: str) -> None:
    lines = (PACKAGE / f"{module}.py").read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES, f"{module}.py has {lines} lines"


def test_half_of_the_modules_have_fewer_than_200_lines() -> None:
    lengths = sorted((PACKAGE / f"{m}.py").read_text(encoding="utf-8").count("\n") for m in MODULES)
    assert lengths[len(lengths) // 2] < 200


def test_no_module_has_a_name_that_says_nothing() -> None:
    assert not {m for m in MODULES if m in VAGUE_NAMES}


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
