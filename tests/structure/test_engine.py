"""The engine's promise on every hard pattern: dense equals masked, predicted cost equals measured cost."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from autoprune.errors import TraceError, UsageError
from autoprune.plan import PruningPlan
from autoprune.structure.densify import densify, difference, masked
from autoprune.structure.graph import ChannelGraph
from autoprune.structure.tracing import trace
from tests.patterns import PATTERNS, Pattern

EXACT = 1e-9
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # not counted by torch 2.14


def strong(model: nn.Module) -> nn.Module:
    """Weights for which no part of the network is silent."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.8, 1.2)
    for name, buffer in model.named_buffers():
        if "running_var" in name:
            buffer.uniform_(0.5, 1.5)
    return model.double().eval()


def as_double(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(t.double() if t.is_floating_point() else t for t in inputs)


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def measured_macs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> int:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            torch.no_grad(),
            FlopCounterMode(display=False, custom_mapping={CPU_ATTENTION: _attention}) as counter,
        ):
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return counter.get_total_flops() // 2


@pytest.fixture(params=sorted(PATTERNS))
def case(request: pytest.FixtureRequest) -> tuple[Pattern, nn.Module, tuple[torch.Tensor, ...], ChannelGraph]:
    torch.manual_seed(0)
    pattern = PATTERNS[request.param]
    model, inputs = strong(pattern.build()), as_double(pattern.inputs())
    return pattern, model, inputs, trace(model, inputs)


def test_dense_equals_masked_and_costs_what_was_predicted(case) -> None:
    _, model, inputs, graph = case
    for seed, ratio in enumerate((0.3, 0.6)):
        plan = PruningPlan.random(graph, ratio, seed)
        dense = densify(model, graph, plan)
        assert difference(dense, masked(model, graph, plan), inputs) < EXACT
        cost = graph.cost(plan)
        assert cost.params == sum(p.numel() for p in dense.parameters())
        assert cost.macs == measured_macs(dense, inputs)
        tensors = [*dense.parameters(), *dense.buffers()]
        assert cost.size_bytes == sum(
            t.numel() * t.element_size() for t in {id(t): t for t in tensors}.values()
        )


def test_says_what_is_free_and_what_is_stuck(case) -> None:
    pattern, _, _, graph = case
    makers = {m.name.rpartition(".")[0] for g in graph.groups for m in g.members if m.role != "in"}
    for name in pattern.free:
        assert any(m == name or m.startswith(name + ".") for m in makers), graph.frozen
    reasons = [f.reason for f in graph.frozen if f.name.startswith(pattern.stuck) and f.dim == 0]
    for name in pattern.stuck:
        assert name not in makers
    if pattern.stuck:
        assert any(pattern.reason in r for r in reasons), reasons
    for name, units in pattern.extra.items():
        assert graph.group(name).num_units == units


def test_plans_compose(case) -> None:
    _, model, inputs, graph = case
    first = PruningPlan.random(graph, 0.3, 0)
    once = densify(model, graph, first)
    again = trace(once, inputs)
    second = PruningPlan.random(again, 0.3, 1)
    twice = densify(once, again, second)
    composed = densify(model, graph, first.compose(second))
    assert difference(twice, composed, inputs) < EXACT
    assert [p.shape for p in twice.parameters()] == [p.shape for p in composed.parameters()]


def test_leaves_the_model_as_it_was(case) -> None:
    _, model, inputs, graph = case
    before = copy.deepcopy(model.state_dict())
    model.train()
    model[0].eval() if isinstance(model, nn.Sequential) else None
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    densify(model, trace(model, inputs), PruningPlan.random(graph, 0.5, 0))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_names_the_module_where_the_forward_pass_fails() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(5, 4, 3))
    with pytest.raises(TraceError, match="'1'"):
        trace(model, torch.randn(1, 3, 8, 8))


class Picky(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[1] != 4:
            raise ValueError
        return x


def test_names_the_line_of_an_error_without_words() -> None:
    with pytest.raises(TraceError, match=rf"at {Path(__file__).name}:\d+: raise ValueError"):
        trace(Picky(), torch.randn(1, 3, 8, 8))


def test_patterns_keep_channels_and_must_match() -> None:
    model = PATTERNS["residual"].build()
    x = torch.randn(1, 3, 8, 8)
    assert [g.name for g in trace(model, x, exclude=["stem"]).groups] == ["a"]
    assert [g.name for g in trace(model, x, only=["a"]).groups] == ["a"]
    with pytest.raises(UsageError, match="matches no module"):
        trace(model, x, exclude=["steam"])


def test_a_wider_batch_changes_nothing_but_the_work() -> None:
    model = PATTERNS["multihead_attention"].build().eval()
    for batch in (1, 3):
        graph = trace(model, torch.randn(batch, 5, 16))
        dense = densify(model, graph, PruningPlan.random(graph, 0.5, 0))
        for other in (1, 2, 4):
            assert dense(torch.randn(other, 5, 16)).shape == (other, 5, 3)


def test_a_plan_for_another_network_is_refused() -> None:
    model = PATTERNS["residual"].build()
    graph = trace(model, torch.randn(1, 3, 8, 8))
    plan = PruningPlan(keep={"a": np.array([0, 1])}, num_units={"a": 7})
    with pytest.raises(UsageError, match="7 units"):
        densify(model, graph, plan)


class Trunk(nn.Module):
    """A residual trunk behind layer norms, as in ConvNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.scale, self.last, self.head = nn.Parameter(torch.rand(8)), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x))
        x = x + self.scale * self.down(torch.nn.functional.gelu(self.up(x)))
        return self.head(self.last(x))


def test_widths_behind_a_layer_norm_go_only_when_asked_for() -> None:
    model, inputs = strong(Trunk()), (torch.randn(2, 6, dtype=torch.float64),)
    assert [g.name for g in trace(model, inputs).groups] == ["up"]
    graph = trace(model, inputs, norms="rescale")
    assert [g.name for g in graph.groups] == ["stem", "up"]
    first = PruningPlan.random(graph, 0.4, 0)
    once = densify(model, graph, first)
    assert difference(once, masked(model, graph, first), inputs) < EXACT
    again = trace(once, inputs, norms="rescale")
    second = PruningPlan.random(again, 0.4, 1)
    both = densify(model, graph, first.compose(second))
    assert difference(densify(once, again, second), both, inputs) < EXACT
