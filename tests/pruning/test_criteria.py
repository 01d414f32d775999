from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoprune.errors import UsageError
from autoprune.pruning.criteria import CRITERIA, NEEDS_SPLIT, fallback_groups, score
from autoprune.structure.graph import ChannelGraph
from autoprune.structure.tracing import trace
from autoprune.training.evaluation import evaluate
from tests.tiny import TinyNet, tiny_net, tiny_split

EXAMPLE = torch.zeros(1, 1, 8, 8)


@pytest.fixture
def net() -> TinyNet:
    return tiny_net().eval()


@pytest.fixture
def graph(net: TinyNet) -> ChannelGraph:
    return trace(net, EXAMPLE)


def weaken_(net: TinyNet, unit: int) -> None:
    """Make one channel of conv2 nearly nothing, everywhere it is seen."""
    with torch.no_grad():
        net.conv2.weight[unit] *= 1e-3
        net.bn2.weight[unit] *= 1e-3
        net.bn2.bias[unit] *= 1e-3
        net.conv3.weight[:, unit] *= 1e-3


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_are_one_a_unit_of_mean_one_and_leave_the_model_alone(
    net: TinyNet, graph: ChannelGraph, criterion: str
) -> None:
    net.conv1.weight.requires_grad_(False)
    before, state = {n: t.clone() for n, t in net.state_dict().items()}, torch.get_rng_state()
    scores = score(net, graph, criterion, split=tiny_split(128, 1))
    assert {n: len(v) for n, v in scores.items()} == {g.name: g.num_units for g in graph.groups}
    for values in scores.values():
        assert values.dtype == np.float64
        assert values.mean() == pytest.approx(1)
        assert (values >= 0).all()
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert [p.requires_grad for p in net.parameters()].count(False) == 1
    assert torch.equal(torch.get_rng_state(), state)
    assert not net.training


@pytest.mark.parametrize("criterion", [c for c in CRITERIA if c not in ("fpgm", "random")])
def test_the_unit_that_does_nothing_is_last(net: TinyNet, graph: ChannelGraph, criterion: str) -> None:
    weaken_(net, 5)
    scores = score(net, graph, criterion, split=tiny_split(128, 1))["conv2"]
    assert scores.argmin() == 5
    assert scores[5] < 0.01


def test_fpgm_finds_the_unit_that_others_can_replace(net: TinyNet, graph: ChannelGraph) -> None:
    with torch.no_grad():
        net.conv2.weight[7] = net.conv2.weight.mean(0)
    assert score(net, graph, "fpgm")["conv2"].argmin() == 7


def test_magnitudes_are_sums_over_the_whole_group(net: TinyNet, graph: ChannelGraph) -> None:
    weights = net.conv2.weight.double(), net.bn2.weight.double(), net.conv3.weight.double()
    made, scaled, read = weights
    by_hand = (made**2).sum((1, 2, 3)) + scaled**2 + (read**2).sum((0, 2, 3))
    expected = by_hand.sqrt() / by_hand.sqrt().mean()
    np.testing.assert_allclose(score(net, graph, "l2")["conv2"], expected.detach().numpy(), rtol=1e-10)
    by_hand = made.abs().sum((1, 2, 3)) + scaled.abs() + read.abs().sum((0, 2, 3))
    expected = by_hand / by_hand.mean()
    np.testing.assert_allclose(score(net, graph, "l1")["conv2"], expected.detach().numpy(), rtol=1e-10)


def by_batch_statistics(net: TinyNet) -> TinyNet:
    for norm in (net.bn1, net.bn2, net.bn3):
        norm.track_running_stats, norm.running_mean, norm.running_var = False, None, None
    return net


def test_the_jacobian_counts_all_that_is_coupled(net: TinyNet, graph: ChannelGraph) -> None:
    split = tiny_split(64, 1)
    found = score(net, graph, "jacobian", split=split)["conv2"]
    images, labels = next(split.batches(64, seed=0))
    nn.functional.cross_entropy(by_batch_statistics(net)(images), labels).backward()
    products = [
        p.detach() * p.grad
        for p in (net.conv2.weight, net.bn2.weight, net.conv3.weight)
        if p.grad is not None
    ]
    made, scaled, read = (p.double() for p in products)
    by_hand = (made.sum((1, 2, 3)) + scaled + read.sum((0, 2, 3))) ** 2
    np.testing.assert_allclose(found, (by_hand / by_hand.mean()).numpy(), rtol=1e-3)


def test_gradients_know_that_statistics_will_be_estimated_anew(net: TinyNet, graph: ChannelGraph) -> None:
    with torch.no_grad():
        net.bn2.weight[3], net.bn2.bias[3] = 0.0, 100.0
    scores = score(net, graph, "taylor", split=tiny_split(128, 1))["conv2"]
    assert scores[3] < 1, "a channel that is the same everywhere but beside the picture's padded edge"


def test_taylor_is_the_derivative_by_a_factor_on_the_channel(net: TinyNet, graph: ChannelGraph) -> None:
    split, gate = tiny_split(64, 1), torch.ones(16, requires_grad=True)
    handle = net.conv3.register_forward_pre_hook(lambda _, args: (args[0] * gate[:, None, None],))
    images, labels = next(split.batches(64, seed=0))
    nn.functional.cross_entropy(by_batch_statistics(net)(images), labels).backward()
    handle.remove()
    assert gate.grad is not None
    expected = gate.grad.abs() / gate.grad.abs().mean()
    found = score(net, graph, "taylor", split=split)["conv2"]
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3)
    net.zero_grad()


def test_random_is_the_same_for_a_seed(net: TinyNet, graph: ChannelGraph) -> None:
    first, second = (score(net, graph, "random", seed=0)["conv2"] for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert not np.array_equal(first, score(net, graph, "random", seed=1)["conv2"])


def test_groups_without_batch_norm_are_named_and_ranked_by_l2() -> None:
    class HalfNormed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1, self.bn1 = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
            self.conv2, self.conv3 = nn.Conv2d(6, 8, 3), nn.Conv2d(8, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv3(self.conv2(torch.relu(self.bn1(self.conv1(x))))).mean((2, 3))

    net = HalfNormed()
    with torch.no_grad():
        net.bn1.weight.copy_(torch.arange(1.0, 7.0))
    graph = trace(net, EXAMPLE)
    assert fallback_groups(net, graph, "bn_scale") == ("conv2",)
    assert fallback_groups(net, graph, "l2") == ()
    scores = score(net, graph, "bn_scale")
    np.testing.assert_allclose(scores["conv1"], np.arange(1, 7) / 3.5)
    np.testing.assert_allclose(scores["conv2"], score(net, graph, "l2")["conv2"])


def test_what_cannot_be_computed_is_said(net: TinyNet, graph: ChannelGraph) -> None:
    with pytest.raises(UsageError, match="no criterion 'tailor'") as caught:
        score(net, graph, "tailor")
    assert "did you mean taylor" in caught.value.hint
    for criterion in NEEDS_SPLIT:
        with pytest.raises(UsageError, match="needs data"):
            score(net, graph, criterion)


def test_a_frozen_model_can_be_scored_and_still_evaluated(net: TinyNet, graph: ChannelGraph) -> None:
    net.requires_grad_(False)
    score(net, graph, "taylor", split=tiny_split(64, 1))
    assert not any(p.requires_grad for p in net.parameters())
    assert evaluate(net, tiny_split(64, 2)).num_samples == 64
