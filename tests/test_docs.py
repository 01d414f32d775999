"""What is written is true: commands and options are documented, links resolve, named targets exist."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from autoprune.cli.main import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
COMMANDS: dict[str, Any] = get_command(app).commands  # type: ignore[attr-defined]  # the app is a group


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_documented(name: str) -> None:
    assert re.search(rf"autoprune {name}\b|`{name}`", TEXT), f"no page says what `autoprune {name}` does"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_option_is_documented_and_has_a_help_text(name: str) -> None:
    for option in COMMANDS[name].params:
        if option.param_type_name == "option" and option.name != "help":
            longest = max(option.opts, key=len)
            assert re.search(rf"`[^`]*{longest}\b", TEXT), f"no page mentions {longest} of `autoprune {name}`"
            assert option.help, f"{longest} of `autoprune {name}` has no help text"


def test_every_documented_command_exists() -> None:
    named = set(re.findall(r"`autoprune ([a-z]+)[ `]", TEXT)) - {
        "manifest"
    }  # a signature's prefix, in format.md
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL):
        named |= set(re.findall(r"^autoprune ([a-z]+)\b", block, re.MULTILINE))
    assert {"run", "worker", "verify"} <= named, "the commands of the pages are found"
    assert named <= set(COMMANDS), f"documented, but no command: {named - set(COMMANDS)}"


def documented_lines() -> list[str]:
    """Every command line of the pages, continued lines joined."""
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)).replace("\\\n", " ")
    return [line.strip() for line in blocks.splitlines() if re.match(r"\s*autoprune [a-z]", line)]


def test_the_pages_have_command_lines() -> None:
    assert len(documented_lines()) > 10, "they are what is checked below"


@pytest.mark.parametrize("line", documented_lines())
def test_every_documented_command_line_has_options_that_exist(line: str) -> None:
    _, name, *words = shlex.split(line, comments=True)
    known = {o for p in COMMANDS[name].params for o in p.opts} | {"--help"}
    given = {w.split("=")[0] for w in words if re.match(r"--?[a-z]", w)}
    assert given <= known, f"{line}: {given - known}"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_help_page_ends_in_examples_with_options_that_exist(name: str) -> None:
    lines = re.findall(r"- `autoprune (.*)`", COMMANDS[name].epilog or "")
    assert lines, f"autoprune {name} --help has no example"
    known = {o for p in COMMANDS[name].params for o in p.opts}
    for words in map(shlex.split, lines):
        assert words[0] == name
        assert {w for w in words if re.match(r"--?[a-z]", w)} <= known


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_many_options_stand_in_groups(name: str) -> None:
    ungrouped = [
        p.name for p in COMMANDS[name].params
        if p.param_type_name == "option" and getattr(p, "rich_help_panel", None) is None
    ]  # fmt: skip
    assert len(ungrouped) <= 4, f"autoprune {name} --help has {ungrouped} in one heap"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_relative_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_documented_make_target_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)\b(?= +#|`)", TEXT)) <= targets
    assert {"setup", "demo", "test", "test-all", "bench"} <= targets


def test_the_way_through_the_code_names_every_room_and_every_package() -> None:
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = [path.parent.name for path in (ROOT / "autoprune").glob("*/__init__.py")]
    assert [r for r in rooms if f"| [{r}](../autoprune/{r}/__init__.py) |" not in page] == []
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    packages = {re.match(r"[\w-]+", line)[0] for line in (*project["dependencies"], *extras)}  # type: ignore[index]
    assert [
        p
        for p in sorted(packages - {"autoprune"})
        if not re.search(rf"^\| .*\b{p}\b.* \|", page, re.MULTILINE)
    ] == []


def test_the_continuous_check_runs_what_the_readme_promises() -> None:
    script = (ROOT / ".ci/run").read_text(encoding="utf-8")
    assert "set -euo pipefail" in script
    assert "make test-all" in script
    assert "make demo" in script


def test_python_in_the_docs_compiles_and_names_real_things() -> None:
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "autoprune":
                public = importlib.import_module(str(node.module)).__all__
                missing = {alias.name for alias in node.names} - set(public)
                assert not missing, f"{node.module} does not export {missing}"
