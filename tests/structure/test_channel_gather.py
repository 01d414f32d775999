"""Shuffled trunks: what their dense networks must do besides being exact, which `test_structure` checks."""

from __future__ import annotations

import copy

import pytest
import torch

from autoprune.artifact.export import export_model, run_onnx
from autoprune.artifact.program import load_program
from autoprune.plan import PruningPlan
from autoprune.structure.densify import densify, difference, masked
from autoprune.structure.patches.channel_gather import GatherPatch
from autoprune.structure.tracing import trace
from tests.patterns import PATTERNS
from tests.structure.test_engine import EXACT, strong

TRUNKS = ("shuffled_trunk", "shuffled_trunk_by_module")


@pytest.mark.parametrize("name", TRUNKS)
def test_takes_other_batches_and_sizes(name: str) -> None:
    torch.manual_seed(0)
    model = strong(PATTERNS[name].build())
    graph = trace(model, torch.randn(2, 3, 8, 8, dtype=torch.float64))
    plan = PruningPlan.random(graph, 0.4, 0)
    dense, reference = densify(model, graph, plan), masked(model, graph, plan)
    for shape in ((1, 3, 8, 8), (5, 3, 6, 10)):
        x = torch.randn(shape, dtype=torch.float64)
        assert difference(dense, reference, (x,)) < EXACT
        assert difference(copy.deepcopy(dense), reference, (x,)) < EXACT


@pytest.mark.parametrize("name", TRUNKS)
def test_exports_to_programs_that_gather(name: str) -> None:
    torch.manual_seed(0)
    model = PATTERNS[name].build().eval()
    graph = trace(model, torch.randn(1, 3, 8, 8))
    dense = densify(model, graph, PruningPlan.random(graph, 0.4, 0))
    exported = export_model(dense, torch.randn(1, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    want = dense(x).detach()
    torch.testing.assert_close(load_program(exported.pt2)(x), want)
    torch.testing.assert_close(torch.from_numpy(run_onnx(exported.onnx, (x,))[0]), want)


def test_a_shuffle_that_ties_little_is_left_alone() -> None:
    model = PATTERNS["channel_shuffle"].build()
    graph = trace(model, torch.randn(1, 3, 8, 8))
    dense = densify(model, graph, PruningPlan.random(graph, 0.4, 0))
    assert not any(isinstance(m, GatherPatch) for m in dense.modules())
