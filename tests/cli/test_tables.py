"""The tree of groups says who makes, scales and reads them, and why the rest stays."""

from __future__ import annotations

import json

import torch
from rich.console import Console
from torch import nn

from autoprune.cli.tables import graph_document, groups_tree
from autoprune.structure.labels import BEHIND_LAYER_NORM
from autoprune.structure.tracing import trace
from tests.patterns import PATTERNS


def shown(name: str) -> str:
    pattern = PATTERNS[name]
    console = Console(width=100)
    with console.capture() as capture:
        console.print(groups_tree(trace(pattern.build(), pattern.inputs())))
    return capture.get()


def test_the_tree_names_layers_by_what_they_do() -> None:
    text = shown("residual")
    assert "stem  8 units" in text
    assert "made by stem, b" in text
    assert "scaled by bn" in text
    assert "read by a, head" in text
    assert "the model's output" in text


def test_units_of_several_channels_and_padding_are_said() -> None:
    assert "4 units of 12 channels" in shown("fused_attention")
    assert "padded by short" in shown("option_a_shortcut")


def test_all_that_a_layer_norm_keeps_is_one_branch_with_a_hint() -> None:
    norm = nn.LayerNorm(8)
    model = nn.Sequential(nn.Linear(6, 8), norm, nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 3))
    graph = trace(model, torch.randn(2, 6))
    kept = {(f.name, f.dim) for f in graph.frozen if f.reason.startswith(BEHIND_LAYER_NORM)}
    affine = {("0.weight", 0), ("0.bias", 0), ("1.weight", 0), ("1.bias", 0)}
    assert kept == affine | {("2.weight", 1)}, "what reads the normalised channels stays for their reason"
    console = Console(width=100)
    with console.capture() as capture:
        console.print(groups_tree(graph))
    assert capture.get().count(BEHIND_LAYER_NORM) == 1
    assert "--norms rescale" in capture.get()
    assert "--norms rescale" not in shown("residual")


def test_the_document_is_plain_json_with_every_member() -> None:
    graph = trace(PATTERNS["residual"].build(), torch.randn(1, 3, 8, 8))
    document = json.loads(json.dumps(graph_document(graph)))
    assert [g["name"] for g in document["groups"]] == [g.name for g in graph.groups]
    assert {"name": "b.weight", "dim": 1, "role": "in", "positions_per_unit": 1} in document["groups"][1][
        "members"
    ]
    assert document["reach"] == graph.reach
