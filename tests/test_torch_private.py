"""Private names of torch stand in one module, and torch is bounded from above because of them."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HOME = ROOT / "autoprune" / "torch_private.py"
ATTRIBUTES = {"_schema", "_overloadname", "_qkv_same_embed_dim"}


def private_names(source: str) -> list[str]:
    """Private modules and names of torch that are imported or reached by an attribute, and `ATTRIBUTES`."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            paths = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names if alias.name.split(".")[0] == "torch"]
        elif isinstance(node, ast.Attribute):
            path = ast.unparse(node)
            is_operator = path.startswith(("torch.ops.", "aten."))
            is_torch = re.fullmatch(r"(torch|nn)(\.\w+)+", path) and not is_operator
            paths = [path] if is_torch or node.attr in ATTRIBUTES else []
        else:
            continue
        names += [p for p in paths if any(part.startswith("_") and part[1:2] != "_" for part in p.split("."))]
    return names


@pytest.mark.parametrize(
    "line",
    ["from torch.utils._pytree import tree_leaves", "from torch.nn.modules.conv import _ConvNd",
     "import torch._dynamo", "torch._C._get_tracing_state()", "isinstance(m, nn.modules.conv._ConvNd)",
     "schema = func._schema"],
)  # fmt: skip
def test_private_names_are_seen(line: str) -> None:
    assert private_names(line)


def test_private_names_of_torch_stand_in_one_module() -> None:
    assert private_names(HOME.read_text(encoding="utf-8"))
    for path in sorted((ROOT / "autoprune").rglob("*.py")):
        if path != HOME:
            assert private_names(path.read_text(encoding="utf-8")) == [], path.name


def test_torch_is_bounded_from_above() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    torch = next(d for d in project["dependencies"] if d.startswith("torch>"))
    assert "<" in torch
