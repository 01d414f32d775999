from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from autoprune.config import Analysis, Baseline, Target
from autoprune.errors import UnreachableError
from autoprune.plan import PruningPlan
from autoprune.pruning import screening
from autoprune.pruning.criteria import score
from autoprune.pruning.prunability import one_shot_prospects
from autoprune.pruning.screening import SEARCH, SearchSettings
from autoprune.pruning.sensitivity import SensitivityTable, sensitivity
from autoprune.pruning.variants import VariantSetup, evaluate_fast
from autoprune.structure.densify import densify
from autoprune.structure.graph import ChannelGraph
from autoprune.structure.tracing import trace
from autoprune.training.evaluation import evaluate
from autoprune.training.finetune import train_baseline_
from tests.tiny import TinyNet, tiny_data, tiny_net

DATA = tiny_data()
EXAMPLE = torch.zeros(1, 1, 8, 8)


@pytest.fixture(scope="module")
def net() -> TinyNet:
    model = tiny_net()
    baseline = Baseline(epochs=3, lr=0.1, batch_size=64)
    train_baseline_(model, DATA.train, baseline, seed=0, device=torch.device("cpu"))
    return model.eval()


@pytest.fixture(scope="module")
def graph(net: TinyNet) -> ChannelGraph:
    return trace(net, EXAMPLE)


@pytest.fixture(scope="module")
def setup(net: TinyNet, graph: ChannelGraph) -> VariantSetup:
    made = screening.make_setup(net, graph, DATA.search, calibration=DATA.train)
    return replace(made, batch_size=64)


@pytest.fixture(scope="module")
def table(net: TinyNet, graph: ChannelGraph) -> SensitivityTable:
    return sensitivity(
        net, graph, DATA.search, settings=Analysis(ratios=(0.25, 0.5, 0.75)), calibration=DATA.train
    )


def loss_key(setup: VariantSetup, plan: PruningPlan) -> float:
    return screening.rank_plans(setup, [plan])[0].loss_key


def test_plans_are_tried_and_ordered_and_the_model_is_left_alone(
    setup: VariantSetup, graph: ChannelGraph
) -> None:
    before = {n: t.clone() for n, t in setup.model.state_dict().items()}
    plans = [PruningPlan.random(graph, ratio, 0) for ratio in (0.8, 0.1, 0.5)]
    found = screening.rank_plans(setup, plans)
    losses = [s.evaluation.loss for s in found]
    assert losses == sorted(losses)
    assert losses[0] < losses[-1]
    assert {id(s.plan) for s in found} == {id(p) for p in plans}
    assert all(torch.equal(before[n], t) for n, t in setup.model.state_dict().items())


def test_a_replayed_evaluation_is_the_networks_own(setup: VariantSetup, graph: ChannelGraph) -> None:
    pruned = densify(setup.model, graph, PruningPlan.random(graph, 0.4, 1))
    quick, own = evaluate_fast(setup, pruned), evaluate(pruned, setup.split)
    assert quick.loss == pytest.approx(own.loss, rel=1e-4)
    np.testing.assert_array_equal(quick.correct, own.correct)


def test_looking_further_never_ends_worse_and_keeps_to_the_cost(
    setup: VariantSetup, graph: ChannelGraph, table: SensitivityTable
) -> None:
    rankings = {c: score(setup.model, graph, c, split=DATA.train) for c in ("l1", "random")}
    limit = Target.parse("macs=0.4")
    losses = []
    for tries in (0, 6):
        found = screening.refine(setup, rankings, limit, table=table, settings=SearchSettings(tries=tries))
        assert 0.39 <= graph.cost(found.plan).macs / graph.cost().macs <= 0.4
        losses.append(found.loss_key)
        assert loss_key(setup, found.plan) == pytest.approx(found.loss_key, rel=1e-5)
    assert losses[1] <= losses[0]


def test_the_same_seed_finds_the_same(
    setup: VariantSetup, graph: ChannelGraph, table: SensitivityTable
) -> None:
    rankings = {"l1": score(setup.model, graph, "l1")}
    limit, settings = Target.parse("macs=0.4"), SearchSettings(tries=4, seed=3)
    first, second = (
        screening.refine(setup, rankings, limit, table=table, settings=settings) for _ in range(2)
    )
    assert {n: k.tolist() for n, k in first.plan.keep.items()} == {
        n: k.tolist() for n, k in second.plan.keep.items()
    }


def test_a_descent_in_steps_gives_one_plan_of_the_first_network(
    setup: VariantSetup, graph: ChannelGraph, table: SensitivityTable
) -> None:
    limit = 0.3 * graph.cost().macs
    settings = SearchSettings(criteria=("l1", "jacobian"), tries=4)
    search = screening.IterativeSearch(
        setup, lambda m: trace(m, EXAMPLE).with_bounds_of(graph), table=table, settings=settings
    )
    found = search.at(limit)
    assert len(search.stages) == screening.num_steps(1, 0.3) == 5
    assert 0.28 <= graph.cost(found.plan).macs / graph.cost().macs <= 0.3
    assert found.plan.num_units == {g.name: g.num_units for g in graph.groups}
    direct = screening.refine(
        setup, {c: score(setup.model, graph, c, split=DATA.train) for c in ("l1", "jacobian")},
        Target(metric="macs", value=limit, relative=False), table=table, settings=replace(settings, tries=0),
    )  # fmt: skip
    assert found.loss_key <= direct.loss_key, "plans straight from the first network compete"


def test_what_cannot_be_reached_is_said(
    setup: VariantSetup, graph: ChannelGraph, table: SensitivityTable
) -> None:
    rankings = {"l1": score(setup.model, graph, "l1")}
    with pytest.raises(UnreachableError):
        screening.refine(setup, rankings, Target(metric="macs", value=1.0, relative=False), table=table)


@pytest.mark.parametrize(("share", "steps"), [(0.95, 0), (0.8, 0), (0.7, 1), (0.5, 2), (0.3, 5)])
def test_steps_end_before_the_limit(share: float, steps: int) -> None:
    assert screening.num_steps(1000, 1000 * share) == steps
    assert steps == 0 or share <= SEARCH.nearest * SEARCH.step**steps


def test_prospects_fall_with_the_share_and_a_search_finds_no_worse(
    setup: VariantSetup, graph: ChannelGraph, table: SensitivityTable
) -> None:
    compared = one_shot_prospects(setup, DATA.search, table=table, num_classes=4)
    searched = one_shot_prospects(
        setup, DATA.search, table=table, num_classes=4, tries=2,
        retrace=lambda m: trace(m, EXAMPLE).with_bounds_of(graph),
    )  # fmt: skip
    for prospects in (compared, searched):
        shares = [p.macs_share for p in prospects]
        assert shares == sorted(shares, reverse=True)
        assert all(0 < s <= 0.9 for s in shares)
        assert [p.region for p in prospects].count("hopeless") <= 1
    assert len(searched) >= len(compared) > 1
