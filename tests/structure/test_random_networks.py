"""Random networks from hard blocks: dense equals masked, cost is exact, pruning twice is pruning once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from autoprune.plan import PruningPlan
from autoprune.structure.densify import densify, difference, masked
from autoprune.structure.tracing import trace
from tests.structure.test_engine import EXACT, measured_macs, strong

ACTIVATIONS = (nn.ReLU, nn.Sigmoid, nn.Hardswish, nn.GELU)


class Plain(nn.Sequential):
    def __init__(self, width: int, out: int, pick: int) -> None:
        norm = (nn.BatchNorm2d(out), nn.GroupNorm(2, out), nn.InstanceNorm2d(out, affine=True), nn.Identity())
        super().__init__(nn.Conv2d(width, out, 3, padding=1), norm[pick % 4], ACTIVATIONS[pick // 4 % 4]())


class Separable(nn.Sequential):
    def __init__(self, width: int, out: int, pick: int) -> None:
        times = 1 + pick % 2
        super().__init__(
            nn.Conv2d(width, width * times, 3, padding=1, groups=width),
            nn.Hardswish(),
            nn.Conv2d(width * times, out, 1),
        )


class Grouped(nn.Sequential):
    def __init__(self, width: int, out: int, pick: int) -> None:
        groups = (2, 4)[pick % 2]
        super().__init__(nn.Conv2d(width, out, 3, padding=1, groups=groups), nn.ReLU())


class Residual(nn.Module):
    def __init__(self, width: int, out: int, pick: int) -> None:
        super().__init__()
        self.inner, self.back = Plain(width, out, pick), nn.Conv2d(out, width, 1)
        self.out = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(x + self.back(self.inner(x)))


class Branches(nn.Module):
    def __init__(self, width: int, out: int, pick: int) -> None:
        super().__init__()
        self.a, self.b = Plain(width, 4, pick), nn.Conv2d(width, out - 4, 1)
        self.keeps_input = pick % 2 == 1
        self.merge = nn.Conv2d(out + width if self.keeps_input else out, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.a(x), self.b(x)]
        return self.merge(torch.cat([*parts, x] if self.keeps_input else parts, 1))


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, out: int, pick: int) -> None:
        super().__init__()
        self.fc1, self.fc2, self.out = nn.Linear(width, 6), nn.Linear(6, width), nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3))))))
        return self.out(x * scale[:, :, None, None])


class Gate(nn.Module):
    def __init__(self, width: int, out: int, pick: int) -> None:
        super().__init__()
        self.up, self.uses_glu = nn.Conv2d(width, 2 * out, 1), pick % 2 == 1

    def forward(self, x: Tensor) -> Tensor:
        if self.uses_glu:
            return F.glu(self.up(x), 1)
        a, b = self.up(x).chunk(2, 1)
        return a * torch.tanh(b)


class Shuffle(nn.Module):
    def __init__(self, width: int, out: int, pick: int) -> None:
        super().__init__()
        self.up, self.parts = nn.Conv2d(width, out, 1), 2

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = (x := self.up(x)).shape
        return x.view(b, self.parts, c // self.parts, h, w).transpose(1, 2).reshape(b, c, h, w)


class Attention(nn.Module):
    def __init__(self, width: int, out: int, pick: int) -> None:
        super().__init__()
        self.num_heads = 4
        self.qkv, self.proj = nn.Linear(width, 3 * 16), nn.Linear(16, out)

    def forward(self, x: Tensor) -> Tensor:
        b, _, h, w = x.shape
        qkv = self.qkv(x.flatten(2).transpose(1, 2)).reshape(b, h * w, 3, self.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, h * w, -1)
        return self.proj(mixed).transpose(1, 2).unflatten(2, (h, w))


class Flipped(Plain):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flip(1)


BLOCKS = (Plain, Separable, Grouped, Residual, Branches, SqueezeExcite, Gate, Shuffle, Attention, Flipped)
WIDTHS = (8, 12, 16)
specs = st.lists(
    st.tuples(st.sampled_from(BLOCKS), st.sampled_from(WIDTHS), st.integers(0, 15)), min_size=1, max_size=5
)


class Network(nn.Module):
    def __init__(self, blocks: list[tuple[type[nn.Module], int, int]], flattens: bool) -> None:
        super().__init__()
        self.body, width = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1)), 8
        for block, out, pick in blocks:
            self.body.append(block(width, out, pick))
            width = out
        self.pool, self.head = (
            nn.AdaptiveAvgPool2d(2 if flattens else 1),
            nn.Linear(width * (4 if flattens else 1), 5),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.body(x)).flatten(1))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(blocks=specs, flattens=st.booleans(), ratio=st.floats(0.1, 0.8), seed=st.integers(0, 99))
def test_random_networks(blocks: list, flattens: bool, ratio: float, seed: int) -> None:
    model, inputs = strong(Network(blocks, flattens)), (torch.randn(2, 3, 4, 4, dtype=torch.float64),)
    graph = trace(model, inputs)
    assert graph.groups, graph.frozen
    first = PruningPlan.random(graph, ratio, seed)
    once = densify(model, graph, first)
    assert difference(once, masked(model, graph, first), inputs) < EXACT
    cost = graph.cost(first)
    assert cost.macs == measured_macs(once, inputs)
    assert cost.params == sum(p.numel() for p in once.parameters())
    again = trace(once, inputs)
    second = PruningPlan.random(again, ratio, seed + 1)
    twice = densify(once, again, second)
    assert difference(twice, densify(model, graph, first.compose(second)), inputs) < EXACT
