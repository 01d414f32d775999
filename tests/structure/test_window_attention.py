"""torchvision's window attention with heads removed: dense equals masked, shifted and padded or not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

from autoprune.plan import PruningPlan
from autoprune.structure.densify import densify, difference, masked
from autoprune.structure.patches.window_attention import PRUNED
from autoprune.structure.tracing import trace
from tests.structure.test_engine import EXACT, strong


class Swin(nn.Module):
    """One attention block, then a layer that reads it."""

    def __init__(self, kind: type[nn.Module], shift: int) -> None:
        super().__init__()
        self.attn, self.out = kind(16, [4, 4], [shift, shift], 4), nn.Linear(16, 3)

    def forward(self, x_BHWC: Tensor) -> Tensor:
        return self.out(x_BHWC + self.attn(x_BHWC))


class MaxVit(nn.Module):
    """The same for windows that are apart already."""

    def __init__(self) -> None:
        super().__init__()
        self.attn, self.out = RelativePositionalMultiHeadAttention(16, 4, 9), nn.Linear(16, 3)

    def forward(self, x_BGPC: Tensor) -> Tensor:
        return self.out(x_BGPC + self.attn(x_BGPC))


@pytest.mark.parametrize("size", [(8, 8), (7, 10), (4, 4)], ids=["whole", "padded", "one window"])
@pytest.mark.parametrize("shift", [0, 2])
@pytest.mark.parametrize("kind", [ShiftedWindowAttention, ShiftedWindowAttentionV2])
def test_swin_heads(kind: type[nn.Module], shift: int, size: tuple[int, int]) -> None:
    model, inputs = strong(Swin(kind, shift)), (torch.randn(2, *size, 16, dtype=torch.float64),)
    graph = trace(model, inputs)
    assert [g.num_units for g in graph.groups if "attn.proj" in g.layers] == [4]
    plan = PruningPlan.random(graph, 0.5, 0)
    dense = densify(model, graph, plan)
    assert type(dense.attn) is PRUNED[kind]
    assert dense.attn.num_heads == 2
    assert difference(dense, masked(model, graph, plan), inputs) < EXACT


def test_maxvit_heads_and_pruning_twice() -> None:
    model, inputs = strong(MaxVit()), (torch.randn(2, 5, 9, 16, dtype=torch.float64),)
    graph = trace(model, inputs)
    assert graph.group("attn.to_qkv").num_units == 4
    first = PruningPlan.random(graph, 0.3, 0)
    once = densify(model, graph, first)
    assert difference(once, masked(model, graph, first), inputs) < EXACT
    again = trace(once, inputs)
    second = PruningPlan.random(again, 0.4, 1)
    both = densify(model, graph, first.compose(second))
    assert difference(densify(once, again, second), both, inputs) < EXACT
