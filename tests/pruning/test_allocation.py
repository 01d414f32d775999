from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from autoprune.config import Metric
from autoprune.errors import UnreachableError, UsageError
from autoprune.metrics import Evaluation
from autoprune.plan import PruningPlan
from autoprune.pruning.allocation import NUM_WAYPOINTS, STRATEGIES, TOLERANCE, allocate, rising
from autoprune.pruning.criteria import Scores
from autoprune.pruning.sensitivity import SensitivityPoint, SensitivityTable
from autoprune.structure.cost import Axis, Cost, CostModel, Term
from autoprune.structure.graph import ChannelGraph, Group
from autoprune.structure.latency import LatencyModel
from autoprune.structure.tracing import trace
from studies.models import resnet20


def chain(widths: list[int], *, round_to: int = 1, area: int = 64, max_ratio: float = 0.9) -> ChannelGraph:
    """Convolutions 3 x 3 one after the other: group i is what layer i makes."""
    axes = [Axis(fixed=3, per_unit={}), *(Axis(fixed=0, per_unit={i: 1}) for i in range(len(widths)))]
    axes.append(Axis(fixed=10, per_unit={}))
    pairs = [(i, i + 1) for i in range(len(axes) - 1)]
    params = [Term(constant=9, axes=p) for p in pairs]
    model = CostModel(
        axes=axes, macs=[Term(constant=9 * area, axes=p) for p in pairs], params=params,
        size_bytes=[Term(constant=36, axes=p) for p in pairs], num_groups=len(widths),
    )  # fmt: skip
    groups = tuple(
        Group(name=f"g{i}", num_units=w, layers=(), members=(), round_to=round_to if w >= 4 * round_to else 1)
        for i, w in enumerate(widths)
    )
    graph = ChannelGraph(groups=groups, frozen=(), round_to=round_to, cost_model=model)
    return graph.with_bounds(min_keep=1, max_ratio=max_ratio)


def some_scores(graph: ChannelGraph, seed: int = 0) -> Scores:
    rng = np.random.default_rng(seed)
    return {g.name: rng.uniform(0.1, 2, g.num_units) for g in graph.groups}


def table_of(graph: ChannelGraph, fragility: dict[str, float]) -> SensitivityTable:
    points = [
        SensitivityPoint(
            group=g.name, ratio=r, top1=0.9, loss=0.3 + fragility[g.name] * r**2, drop_pp=0, low_pp=0,
            high_pp=0, num_samples=1000, macs_share_removed=0.1, changed=True,
        )
        for g in graph.groups for r in (0.25, 0.5, 0.75)
    ]  # fmt: skip
    return SensitivityTable(points=tuple(points), baseline=Evaluation(top1=0.9, loss=0.3, num_samples=1000))


def even_table(graph: ChannelGraph) -> SensitivityTable:
    return table_of(graph, {g.name: 1.0 for g in graph.groups})


def counts(plan: PruningPlan) -> dict[str, int]:
    return {name: len(kept) for name, kept in plan.keep.items()}


@given(
    widths=st.lists(st.integers(16, 96), min_size=3, max_size=12), share=st.floats(0.25, 0.95),
    strategy=st.sampled_from(STRATEGIES), metric=st.sampled_from(["macs", "params", "size"]),
    seed=st.integers(0, 5),
)  # fmt: skip
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_the_cost_is_met_from_below_and_the_least_important_go(
    widths: list[int], share: float, strategy: str, metric: str, seed: int
) -> None:
    graph = chain(widths)
    scores, table = some_scores(graph, seed), even_table(graph)
    field = {"macs": "macs", "params": "params", "size": "size_bytes"}[metric]
    full = getattr(graph.cost(), field)
    plan = allocate(graph, scores, metric=metric, limit=share * full, strategy=strategy, table=table)  # type: ignore[arg-type]
    cost = getattr(graph.cost(plan), field)
    assert share * full - TOLERANCE * full <= cost <= share * full
    for name, kept in plan.keep.items():
        assert 1 <= len(kept) <= len(scores[name])
        assert len(kept) >= math.ceil(0.1 * len(scores[name]) - 1e-9)
        gone = np.setdiff1d(np.arange(len(scores[name])), kept)
        assert not len(gone) or scores[name][gone].max() <= scores[name][kept].min()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_widths_stay_multiples_where_a_group_is_wide_enough(strategy: str) -> None:
    graph = chain([12, 20, 64, 100, 128, 128, 256], round_to=8)
    plan = allocate(
        graph, some_scores(graph), metric="macs", limit=0.5 * graph.cost().macs, strategy=strategy,
        table=even_table(graph),
    )  # fmt: skip
    for group in graph.groups:
        kept = counts(plan)[group.name]
        assert kept == group.num_units or group.num_units < 32 or kept % 8 == 0
    assert 0.49 * graph.cost().macs <= graph.cost(plan).macs <= 0.5 * graph.cost().macs


def test_uniform_removes_the_same_ratio_everywhere() -> None:
    graph = chain([100] * 8)
    plan = allocate(
        graph, some_scores(graph), metric="params", limit=0.4 * graph.cost().params, strategy="uniform"
    )
    assert max(counts(plan).values()) - min(counts(plan).values()) <= 2


def test_global_puts_one_threshold_on_all_scores() -> None:
    graph = chain([40] * 6)
    scores = some_scores(graph)
    scores["g2"] = scores["g2"] + 5.0
    plan = allocate(graph, scores, metric="macs", limit=0.5 * graph.cost().macs, strategy="global")
    assert counts(plan)["g2"] == 40
    kept = np.concatenate([scores[n][k] for n, k in plan.keep.items()])
    gone = np.concatenate([np.delete(scores[n], k) for n, k in plan.keep.items()])
    assert np.sort(gone)[-8] < np.sort(kept)[7], "up to the few that fill the rest"


def test_robust_groups_give_more() -> None:
    graph = chain([64] * 6)
    table = table_of(graph, {f"g{i}": 10.0 if i == 2 else 0.1 for i in range(6)})
    plan = allocate(
        graph, some_scores(graph), metric="macs", limit=0.5 * graph.cost().macs, strategy="sensitivity",
        table=table,
    )  # fmt: skip
    assert counts(plan)["g2"] > 1.3 * np.mean([c for n, c in counts(plan).items() if n != "g2"])


def test_a_measured_gain_is_no_loss() -> None:
    graph = chain([64] * 6)
    gains = table_of(graph, {f"g{i}": -10.0 if i == 2 else 1.0 for i in range(6)})
    none = table_of(graph, {f"g{i}": 0.0 if i == 2 else 1.0 for i in range(6)})
    limit = 0.6 * graph.cost().macs
    plans = [
        allocate(graph, some_scores(graph), metric="macs", limit=limit, strategy="sensitivity", table=t)
        for t in (gains, none)
    ]
    assert plans[0] == plans[1]
    assert counts(plans[0])["g2"] < 64


def test_equal_scores_do_not_stall() -> None:
    graph = chain([64] * 6)
    scores = {g.name: np.ones(64) for g in graph.groups}
    for share in np.linspace(0.1, 0.95, 18):
        plan = allocate(graph, scores, metric="macs", limit=share * graph.cost().macs, strategy="global")
        assert share - TOLERANCE <= graph.cost(plan).macs / graph.cost().macs <= share


def test_nothing_is_removed_when_nothing_must() -> None:
    graph = chain([16, 16])
    plan = allocate(graph, some_scores(graph), metric="macs", limit=graph.cost().macs, strategy="uniform")
    assert counts(plan) == {"g0": 16, "g1": 16}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_out_of_reach_names_what_is_not(strategy: str) -> None:
    graph = chain([4, 4])
    smallest = graph.cost_of_counts({"g0": 1, "g1": 1}).macs
    with pytest.raises(UnreachableError, match=f"the nearest that can be had is {smallest}") as caught:
        allocate(
            graph, some_scores(graph), metric="macs", limit=smallest - 1, strategy=strategy,
            table=even_table(graph),
        )  # fmt: skip
    assert caught.value.nearest_cost == smallest
    assert caught.value.exit_code == 2


@given(
    widths=st.lists(st.integers(2, 40), min_size=1, max_size=5), share=st.floats(0.02, 0.98),
    strategy=st.sampled_from(STRATEGIES), round_to=st.sampled_from([1, 4, 8]),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_the_nearest_that_is_named_can_be_had(
    widths: list[int], share: float, strategy: str, round_to: int
) -> None:
    graph = chain(widths, round_to=round_to)
    scores, table = some_scores(graph), even_table(graph)
    limit = share * graph.cost().macs
    nearest = None
    try:
        plan = allocate(graph, scores, metric="macs", limit=limit, strategy=strategy, table=table)
    except UnreachableError as error:
        nearest = error.nearest_cost
        plan = allocate(graph, scores, metric="macs", limit=nearest, strategy=strategy, table=table)
    assert graph.cost(plan).macs == nearest or graph.cost(plan).macs <= limit


def test_a_group_keeps_what_it_must() -> None:
    graph = chain([10, 10])
    groups = (replace(graph.groups[0], min_keep=9), graph.groups[1])
    graph = replace(graph, groups=groups)
    with pytest.raises(UnreachableError) as caught:
        allocate(graph, some_scores(graph), metric="macs", limit=1, strategy="uniform")
    assert caught.value.nearest_cost == graph.cost_of_counts({"g0": 9, "g1": 1}).macs


@pytest.mark.parametrize(
    ("bounds", "least"),
    [((1, 0.9), [10, 2, 1]), ((1, 0.5), [50, 10, 1]), ((5, 0.9), [10, 5, 2]), ((1, 0.999), [1, 1, 1])],
)
def test_bounds_hold_for_every_group(bounds: tuple[int, float], least: list[int]) -> None:
    graph = chain([100, 20, 2], max_ratio=0.999).with_bounds(min_keep=bounds[0], max_ratio=bounds[1])
    assert [int(g.allowed_counts[-1]) for g in graph.groups] == least
    with pytest.raises(UnreachableError) as caught:
        allocate(graph, some_scores(graph), metric="macs", limit=1, strategy="uniform")
    counts_left = {g.name: n for g, n in zip(graph.groups, least, strict=True)}
    assert caught.value.nearest_cost == graph.cost_of_counts(counts_left).macs


def test_bounds_and_multiples_are_the_originals_over_rounds() -> None:
    original = chain([100, 64], round_to=8, max_ratio=0.5)
    later = chain([60, 24], round_to=8).with_bounds_of(original)
    assert [g.min_keep for g in later.groups] == [50, 24], "24 were left by other bounds: they stay"
    assert later.groups[1].round_to == 8, "once rounded, always rounded, though 24 alone would be too narrow"
    assert later.groups[0].allowed_counts.tolist() == [60, 56]
    unknown = replace(original, groups=original.groups[:1])
    assert chain([60, 24]).with_bounds_of(unknown).groups[1].min_keep == 3


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("metric", ["macs", "params", "memory"])
def test_limits_are_met_on_a_rounded_resnet(strategy: str, metric: Metric) -> None:
    graph = trace(resnet20(), torch.zeros(1, 3, 32, 32), round_to=8).with_bounds(min_keep=1, max_ratio=0.9)
    assert {g.num_units: g.round_to for g in graph.groups} == {8: 1, 16: 1, 32: 8, 64: 8}
    full = graph.cost().of(metric)
    for share in (0.9, 0.7, 0.5, 0.35):
        plan = allocate(
            graph, some_scores(graph), metric=metric, limit=share * full, strategy=strategy,
            table=even_table(graph),
        )  # fmt: skip
        assert share - TOLERANCE <= graph.cost(plan).of(metric) / full <= share
        wide = [len(plan.keep[g.name]) for g in graph.groups if g.num_units >= 32]
        assert all(n % 8 == 0 for n in wide)


@given(
    widths=st.lists(st.integers(16, 96), min_size=3, max_size=12), share=st.floats(0.3, 0.95),
    strategy=st.sampled_from(STRATEGIES),
)  # fmt: skip
@settings(max_examples=30, deadline=None)
def test_a_latency_is_met_too(widths: list[int], share: float, strategy: str) -> None:
    graph = chain(widths)
    names = [g.name for g in graph.groups]
    rows = np.array([[r, r + 1] for r in range(len(widths) + 1)])  # what each layer reads and makes
    sizes = np.array([3, *widths, 10])[rows]
    knots = np.broadcast_to([0.25, 0.5, 0.75, 1.0], (*rows.shape, 4))
    slow = np.array([0.3, 0.5, 0.9, 1.0])  # not proportional to the width
    seconds = sizes.prod(axis=1)[:, None, None] * slow[:, None] * slow * 1e-9
    model = LatencyModel(rows=rows, fixed=np.zeros_like(rows), span=sizes, knots=knots, seconds=seconds)
    graph = replace(graph, latency=model)
    full = graph.cost().of("latency")
    plan = allocate(
        graph, some_scores(graph), metric="latency", limit=share * full, strategy=strategy,
        table=even_table(graph),
    )  # fmt: skip
    assert list(plan.keep) == names
    assert (share - TOLERANCE) * full <= graph.cost(plan).of("latency") <= share * full


def test_wrong_wishes_are_refused() -> None:
    graph = chain([10])
    scores = some_scores(graph)
    with pytest.raises(UsageError, match="no strategy 'greedy'"):
        allocate(graph, scores, metric="macs", limit=1, strategy="greedy")
    with pytest.raises(UsageError, match="needs a table"):
        allocate(graph, scores, metric="macs", limit=1)
    with pytest.raises(UsageError, match="cannot allocate for 'flops'"):
        allocate(graph, scores, metric="flops", limit=1, strategy="uniform")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="knows no latency"):
        allocate(graph, scores, metric="latency", limit=1, strategy="uniform")


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_sixty_groups_ask_for_few_costs(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cost is what an allocation waits for; there are 13,740 steps down, and 2 ** 60 ways to mix them."""
    graph, asked = chain([256] * 60), 0
    scores, table, limit = some_scores(graph), even_table(graph), 0.5 * graph.cost().macs
    plain = ChannelGraph.cost_of_counts

    def counted(self: ChannelGraph, kept: dict[str, int]) -> Cost:
        nonlocal asked
        asked += 1
        return plain(self, kept)

    monkeypatch.setattr(ChannelGraph, "cost_of_counts", counted)
    allocate(graph, scores, metric="macs", limit=limit, strategy=strategy, table=table)
    once_a_group = 60 + 1  # with the cost of the whole network
    assert 0 < asked <= once_a_group * (NUM_WAYPOINTS if strategy == "sensitivity" else 2)


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=30))
@settings(deadline=None)
def test_rising_keeps_the_mean_and_what_rises_already(values: list[float]) -> None:
    given_values = np.array(values)
    found = rising(given_values, np.ones(len(values)))
    assert (np.diff(found) >= -1e-12).all()
    assert found.mean() == pytest.approx(given_values.mean(), abs=1e-9)
    np.testing.assert_array_equal(rising(np.sort(given_values), np.ones(len(values))), np.sort(given_values))


def test_isomorphic_compares_only_groups_that_are_coupled_alike() -> None:
    """The channels of a residual stage score many times what those inside its blocks do."""
    graph = trace(resnet20(), torch.zeros(1, 3, 32, 32))
    inside = {g.name for g in graph.groups if g.name.endswith("conv1") and g.name != "conv1"}
    rng = np.random.default_rng(0)
    scores = {
        g.name: rng.uniform(0.5, 1.5, g.num_units) * (1 if g.name in inside else 100) for g in graph.groups
    }
    limit = 0.5 * graph.cost().macs
    kept = {}
    for strategy in ("global", "isomorphic"):
        plan = allocate(graph, scores, metric="macs", limit=limit, strategy=strategy)
        outside = [g for g in graph.groups if g.name not in inside]
        kept[strategy] = sum(len(plan.keep[g.name]) for g in outside) / sum(g.num_units for g in outside)
    assert kept["global"] == 1
    assert kept["isomorphic"] == pytest.approx(0.7, abs=0.06), "half of the MACs is 0.7 of both widths"
