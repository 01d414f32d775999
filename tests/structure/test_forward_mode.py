"""Calls of patched modules are found on the user's lines, whichever of our files they pass through."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autoprune.plan import PruningPlan
from autoprune.structure.densify import densify
from autoprune.structure.patches.channel_gather import GatherPatch
from autoprune.structure.patches.forward_mode import PatchMode
from autoprune.structure.patches.norm_patch import NormPatch
from autoprune.structure.patches.reshape_patch import ReshapePatch
from autoprune.structure.recorder import record
from autoprune.structure.tracing import trace
from tests.patterns import PATTERNS
from tests.structure.test_engine import as_double, strong

PATCHED = {"heads_from_width": ReshapePatch, "shuffled_trunk": GatherPatch, "global_response_norm": NormPatch}


@pytest.mark.parametrize("name", PATCHED)
def test_patched_calls_are_on_the_users_lines(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = strong(PATTERNS[name].build()), as_double(PATTERNS[name].inputs())
    graph = trace(model, inputs)
    dense = densify(model, graph, PruningPlan.random(graph, 0.4, 0))
    assert any(isinstance(m, PATCHED[name]) for m in dense.modules())
    files = {op.where.partition(":")[0] for op in record(dense, inputs).ops}
    assert files == {"patterns.py"}


def test_a_network_of_torchs_own_modules_has_no_lines() -> None:
    recording = record(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), (torch.zeros(1, 3),))
    assert {op.where for op in recording.ops} == {"in torch"}


def test_a_mode_in_a_module_without_the_marker_is_refused() -> None:
    with pytest.raises(AssertionError, match="PASSES_CALLS_ON"):
        type("Mode", (PatchMode,), {"__module__": __name__})
