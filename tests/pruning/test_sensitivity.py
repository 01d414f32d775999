from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from autoprune.config import Analysis, Baseline
from autoprune.errors import ArtifactError, UsageError
from autoprune.metrics import Evaluation
from autoprune.plan import PruningPlan
from autoprune.pruning.criteria import score
from autoprune.pruning.sensitivity import (
    BISECTION,
    SensitivityPoint,
    SensitivityTable,
    next_counts,
    ratio_counts,
    sensitivity,
)
from autoprune.structure.cost import CostModel, Term
from autoprune.structure.densify import masked
from autoprune.structure.graph import ChannelGraph
from autoprune.structure.tracing import trace
from autoprune.tasks import Task
from autoprune.training.evaluation import evaluate
from autoprune.training.finetune import train_baseline_
from tests.tiny import TinyNet, tiny_net, tiny_split

POINT = SensitivityPoint(
    group="g", ratio=0.5, top1=0.8, loss=0.5, drop_pp=10.0, low_pp=8.0, high_pp=12.0, num_samples=100,
    macs_share_removed=0.2, changed=True,
)  # fmt: skip
BASELINE = Evaluation(top1=0.9, loss=0.3, num_samples=100)


@pytest.fixture(scope="module")
def net() -> TinyNet:
    net = tiny_net()
    train_baseline_(net, tiny_split(320, 1), Baseline(epochs=4, batch_size=64), seed=0)
    return net.eval()


@pytest.fixture(scope="module")
def graph(net: TinyNet) -> ChannelGraph:
    return trace(net, torch.zeros(1, 1, 8, 8))


@pytest.fixture(scope="module")
def table(net: TinyNet, graph: ChannelGraph) -> SensitivityTable:
    return sensitivity(net, graph, tiny_split(200, 2), settings=Analysis(ratios=(0.25, 0.5, 0.9)))


def test_every_group_is_measured_alone_on_all_samples(graph: ChannelGraph, table: SensitivityTable) -> None:
    assert {p.group for p in table.points} == {g.name for g in graph.groups}
    assert len(table.points) == 3 * len(graph.groups)
    for point in table.points:
        width = graph.group(point.group).num_units
        removed = round(point.ratio * width)
        assert point.ratio == removed / width
        assert point.num_samples == 200
        assert point.changed
        assert point.low_pp <= point.drop_pp <= point.high_pp
        assert point.drop_pp == pytest.approx(100 * (table.baseline.top1 - point.top1))
        left = graph.cost_of_counts({point.group: width - removed}).macs
        assert point.macs_share_removed == pytest.approx(1 - left / graph.cost().macs)


def test_the_model_is_left_as_it_was(net: TinyNet, graph: ChannelGraph) -> None:
    before, state = {n: t.clone() for n, t in net.state_dict().items()}, torch.get_rng_state()
    sensitivity(
        net, graph, tiny_split(40, 2), settings=Analysis(ratios=(0.5,)), calibration=tiny_split(128, 1)
    )
    assert all(torch.equal(before[n], t) for n, t in net.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_calibration_brings_probes_back(net: TinyNet, graph: ChannelGraph, table: SensitivityTable) -> None:
    seen: list[SensitivityPoint] = []
    again = sensitivity(
        net, graph, tiny_split(200, 2), settings=Analysis(ratios=(0.25, 0.5, 0.9)),
        calibration=tiny_split(320, 1), on_point=seen.append,
    )  # fmt: skip
    assert tuple(seen) == again.points
    assert np.mean([p.loss for p in again.points]) < np.mean([p.loss for p in table.points])


def test_a_probe_that_changes_nothing_says_so(net: TinyNet, graph: ChannelGraph) -> None:
    dead = tiny_net().eval()
    with torch.no_grad():
        dead.conv3.weight.zero_()
    points = sensitivity(dead, graph, tiny_split(40, 2), settings=Analysis(ratios=(0.5,))).points
    assert {p.group: p.changed for p in points} == {"conv1": True, "conv2": False}


def test_a_probe_that_costs_something_else_says_so(net: TinyNet, graph: ChannelGraph) -> None:
    split = tiny_split(40, 2)
    assert sensitivity(net, graph, split, settings=Analysis(ratios=(0.5,))).miscounted == ()
    rigid = CostModel(  # right about the whole network, and blind to what is removed
        axes=graph.cost_model.axes, macs=[Term(constant=graph.cost().macs, axes=())], params=[],
        size_bytes=[], num_groups=len(graph.groups),
    )  # fmt: skip
    table = sensitivity(net, replace(graph, cost_model=rigid), split, settings=Analysis(ratios=(0.5,)))
    assert set(table.miscounted) == {g.name for g in graph.groups}
    assert SensitivityTable.from_json(table.to_json()).miscounted == table.miscounted


def test_less_than_half_of_the_data_is_refused(net: TinyNet, graph: ChannelGraph) -> None:
    split = tiny_split(40, 2)
    with pytest.raises(UsageError, match=r"a share of 0\.4 of the search split"):
        sensitivity(net, graph, split, settings=Analysis(share=0.4))
    for ratios in ((), (0.0,), (1.0,)):
        with pytest.raises(UsageError, match="ratios"):
            sensitivity(net, graph, split, settings=Analysis(ratios=ratios))
    half = sensitivity(net, graph, split, settings=Analysis(share=0.5, ratios=(0.5,)))
    assert half.baseline.num_samples == 20


def test_an_own_score_is_measured(net: TinyNet, graph: ChannelGraph) -> None:
    task = Task(score=lambda m, s, d: 0.1 if m is net else 0.0625)
    table = sensitivity(net, graph, tiny_split(40, 2), settings=Analysis(ratios=(0.5,)), task=task)
    assert all(p.drop_pp == pytest.approx(3.75) for p in table.points)
    assert table.loss_at("conv2", 0.5) == pytest.approx(0.0375), "no loss, so the score's own drop"
    assert SensitivityTable.from_json(table.to_json()).loss_at("conv2", 0.5) == pytest.approx(0.0375)


def test_ratios_become_whole_units_each_once(graph: ChannelGraph) -> None:
    counts = ratio_counts(graph, (0.5, 0.5001, 0.25))
    assert list(counts) == [g.name for g in graph.groups]
    assert all(len(c) == len(set(c)) == 2 for c in counts.values())
    extremes = ratio_counts(graph, (0.01, 0.999))
    assert all(0 < n < graph.group(name).num_units for name, c in extremes.items() for n in c)


def test_predicted_loss_rises_from_zero_through_the_points() -> None:
    points = [replace(POINT, ratio=r, loss=0.3 + rise) for r, rise in ((0.25, 0.1), (0.5, 0.4), (0.75, 0.9))]
    table = SensitivityTable(points=tuple(points), baseline=BASELINE)
    assert [table.loss_at("g", r) for r in (0.0, 0.25, 0.5, 0.75)] == pytest.approx([0, 0.1, 0.4, 0.9])
    curve = table.loss_at("g", np.linspace(0, 1, 101))
    assert (np.diff(curve) >= 0).all()
    assert curve[-1] > 0.9 + (0.9 - 0.4), "steeper beyond the last point than before it"
    with pytest.raises(UsageError, match="no group 'h'"):
        table.loss_at("h", 0.5)


def test_a_gain_is_no_loss_and_a_dip_is_no_way_down() -> None:
    points = [replace(POINT, ratio=r, loss=0.3 + rise) for r, rise in ((0.25, -0.1), (0.5, 0.4), (0.75, 0.2))]
    table = SensitivityTable(points=tuple(points), baseline=BASELINE)
    assert table.loss_at("g", 0.25) == 0
    assert table.loss_at("g", 0.75) == pytest.approx(0.4)


def test_a_probe_that_broke_the_network_is_worse_than_any_other() -> None:
    points = [replace(POINT, ratio=0.25, loss=0.4), replace(POINT, ratio=0.5, loss=math.nan)]
    points.append(replace(POINT, ratio=0.75, loss=math.inf))
    table = SensitivityTable(points=tuple(points), baseline=BASELINE)
    assert 1 < table.loss_at("g", 0.5) <= table.loss_at("g", 0.75) < math.inf


def test_a_table_survives_as_text_and_as_a_frame(table: SensitivityTable) -> None:
    again = SensitivityTable.from_json(table.to_json())
    assert again.points == table.points
    assert again.baseline.top1 == table.baseline.top1
    assert list(table.to_frame()["group"]) == [p.group for p in table.points]
    for text in (
        "",
        "[]",
        "{}",
        '{"autoprune_sensitivity": 2}',
        '{"autoprune_sensitivity": 1, "points": [1]}',
    ):
        with pytest.raises(ArtifactError, match="not a sensitivity table"):
            SensitivityTable.from_json(text)


def measured_counts(curve: Callable[[int], float]) -> list[int]:
    counts, drops = list(range(1, 10)), dict[int, float]()
    while following := next_counts(counts, drops, BISECTION):
        drops |= {n: curve(n) for n in following}
    return sorted(drops)


def test_bisection_measures_where_a_curve_says_least() -> None:
    assert measured_counts(lambda n: 0.1 * n) == [4, 7], "flat: as far as two points reach"
    assert measured_counts(lambda n: 20.0 * n) == [1, 2, 4], "collapsed: not beyond, but before"
    assert measured_counts(lambda n: 0.0 if n < 6 else 90.0) == [4, 5, 7], "a cliff: close to it"
    assert measured_counts(lambda n: math.nan) == [1, 2, 4], "no number is as bad as any"
    assert next_counts([*range(9)], {}, None) == [*range(9)], "exact measures all"
    assert next_counts([1, 2, 3], {2: 0.0}, BISECTION) == [1, 3], "few are all measured"


def test_exact_is_masking_and_evaluating_the_whole_network(net: TinyNet, graph: ChannelGraph) -> None:
    split, ratios = tiny_split(200, 2), (0.2, 0.4, 0.6, 0.8)
    exact = sensitivity(net, graph, split, settings=Analysis(ratios=ratios, exact=True))
    assert exact.method == "partial"
    assert len(exact.points) == 4 * len(graph.groups)
    scores = score(net, graph, "l2")
    for point in exact.points:
        width = graph.group(point.group).num_units
        kept = np.sort(np.argsort(scores[point.group], kind="stable")[round(point.ratio * width) :])
        plan = PruningPlan(keep={point.group: kept}, num_units={point.group: width})
        whole = evaluate(masked(net, graph, plan), split)
        assert (point.top1, point.loss) == (whole.top1, pytest.approx(whole.loss, abs=1e-7))
    fast = sensitivity(net, graph, split, settings=Analysis(ratios=ratios))
    measured = {(p.group, p.ratio): p for p in exact.points}
    assert 0 < len(fast.points) < len(exact.points)
    for point in fast.points:
        assert point.top1 == measured[point.group, point.ratio].top1


def test_known_points_are_not_measured_again(net: TinyNet, graph: ChannelGraph) -> None:
    split, seen = tiny_split(200, 2), list[SensitivityPoint]()
    whole = sensitivity(net, graph, split)
    part = replace(whole, points=tuple(p for p in whole.points if p.group == "conv1"))
    again = sensitivity(net, graph, split, known=part, on_point=seen.append)
    assert again.points == whole.points
    assert {p.group for p in seen} == {"conv2"}
    assert sensitivity(net, graph, split, known=whole).points == whole.points


def test_when_time_is_short_each_group_has_a_point_and_no_more(net: TinyNet, graph: ChannelGraph) -> None:
    split = tiny_split(200, 2)
    whole, short = sensitivity(net, graph, split), sensitivity(net, graph, split, seconds=0.0)
    assert sorted(p.group for p in short.points) == sorted({p.group for p in whole.points})
    assert len(short.points) < len(whole.points)
    assert set(short.points) <= set(whole.points)
    assert short.loss_at("conv1", 0.9) > 0
    assert sensitivity(net, graph, split, known=short).points == whole.points, "the rest can follow"


class Moody(TinyNet):
    """A forward that looks at its values."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x if float(x.mean()) < 1e9 else -x)


def test_a_network_that_cannot_be_replayed_is_measured_whole(
    net: TinyNet, graph: ChannelGraph, table: SensitivityTable
) -> None:
    moody = Moody()
    moody.load_state_dict(net.state_dict())
    found = sensitivity(
        moody,
        trace(moody, torch.zeros(1, 1, 8, 8)),
        tiny_split(200, 2),
        settings=Analysis(ratios=(0.25, 0.5, 0.9)),
    )
    assert (found.method, table.method) == ("whole", "partial")
    assert "depends on the values" in found.reason
    assert [p.top1 for p in found.points] == [p.top1 for p in table.points]
    assert SensitivityTable.from_json(found.to_json()).reason == found.reason
