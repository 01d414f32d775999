from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from autoprune.config import Analysis, Baseline
from autoprune.errors import TrialError
from autoprune.plan import PruningPlan
from autoprune.pruning.screening import make_setup, rank_plans
from autoprune.pruning.sensitivity import sensitivity
from autoprune.search.trial import TRIAL_EVALUATIONS, Climb, Ground, TrialParams, probe_speed, run_trial
from autoprune.structure.densify import densify
from autoprune.structure.tracing import trace
from autoprune.training.evaluation import evaluate
from autoprune.training.finetune import EpochRecord, train_baseline_
from tests.clock import Clock
from tests.tiny import tiny_data, tiny_net, tiny_study

PARAMS = TrialParams(prune_rate=0.3, lr=0.05, decay="cosine", criterion="l2", strategy="sensitivity")


@pytest.fixture(scope="module")
def ground() -> Ground:
    model, data, study = tiny_net(), tiny_data(), tiny_study()
    train_baseline_(model, data.train, Baseline(epochs=6, batch_size=64), seed=0)
    graph = trace(model, torch.zeros(1, 1, 8, 8))
    return Ground(
        study=study, data=data, device=torch.device("cpu"), metric="macs", original=model,
        original_cost=graph.cost().macs, target_cost=graph.cost().macs // 2, model=model, graph=graph,
        plan=PruningPlan.full(graph), seed=1,
        table=sensitivity(
            model, graph, data.search, settings=Analysis(ratios=(0.5,)), calibration=data.train
        ),
    )  # fmt: skip


def test_a_trial_says_what_it_left_and_how_well_that_does(ground: Ground) -> None:
    epochs: list[EpochRecord] = []
    result = run_trial(ground, PARAMS, epochs=(1.0,), seed=3, on_epoch=epochs.append)
    record, model, plan = result.record, result.model, result.plan
    assert model is not None
    assert plan is not None
    assert record.prune_rate == pytest.approx(0.3, abs=0.05)
    assert record.cost_share == pytest.approx(1 - (record.prune_rate or 0))
    assert record.macs == ground.graph.cost(plan).macs
    assert record.top1 == evaluate(model, ground.data.search).top1
    assert record.low is not None
    assert record.low <= record.top1
    assert len(record.epochs) == len(epochs) == 1
    assert record.tuning_seconds <= record.seconds


def test_a_trial_leaves_its_ground_alone_and_repeats_for_a_seed(ground: Ground) -> None:
    before = {k: v.clone() for k, v in ground.model.state_dict().items()}
    first, second = (run_trial(ground, PARAMS, epochs=(0.5,), seed=3) for _ in range(2))
    assert first.model is not None
    assert second.model is not None
    states = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    assert all(torch.equal(v, before[k]) for k, v in ground.model.state_dict().items())


@pytest.mark.parametrize("criterion", ["l2", "taylor", "bn_scale", "fpgm", "random"])
@pytest.mark.parametrize("strategy", ["sensitivity", "uniform", "global"])
def test_every_choice_meets_the_rate(ground: Ground, criterion: str, strategy: str) -> None:
    plan = ground.choose(replace(PARAMS, criterion=criterion, strategy=strategy))
    cost, present = ground.graph.cost(plan).macs, ground.graph.cost().macs
    assert 0.64 * present <= cost <= 0.7 * present


def test_the_ranking_that_does_best_untuned_is_found_by_trying(ground: Ground) -> None:
    ways = [(c, s) for c in ("random", "l1", "taylor") for s in ("uniform", "sensitivity")]
    best = ground.screened(0.4, ways)
    assert ground.screened(0.4, [best]) == best

    def loss(way: tuple[str, str]) -> float:
        params = replace(PARAMS, prune_rate=0.4, criterion=way[0], strategy=way[1])
        setup = make_setup(ground.model, ground.graph, ground.data.search, calibration=ground.data.train)
        return rank_plans(setup, [ground.choose(params)])[0].loss_key

    assert loss(best) == min(loss(way) for way in ways) < max(loss(way) for way in ways)


def test_a_loss_that_raises_is_left_to_the_trials(ground: Ground) -> None:
    def loss(output: object, target: object) -> torch.Tensor:
        raise OSError("no such image")

    study = replace(ground.study, loss=loss)
    broken = replace(ground, study=study, cached_scores={})
    assert broken.screened(0.4, [("taylor", "uniform"), ("l1", "uniform")]) == ("taylor", "uniform")


def test_no_trial_overshoots_the_target(ground: Ground) -> None:
    assert ground.limit(0.9) == ground.target_cost


def test_a_rate_beyond_reach_takes_the_nearest(ground: Ground) -> None:
    plan = replace(ground, target_cost=1).choose(replace(PARAMS, prune_rate=0.999))
    dense = densify(ground.model, ground.graph, plan)
    assert sum(p.numel() for p in dense.parameters()) == ground.graph.cost(plan).params


def test_the_plan_is_told_for_the_original(ground: Ground) -> None:
    first = PruningPlan(keep={"conv2": np.arange(1, 13)}, num_units={"conv2": 16})
    model = densify(ground.model, ground.graph, first)
    graph = trace(model, torch.zeros(1, 1, 8, 8))
    table = sensitivity(model, graph, ground.data.search, settings=Analysis(ratios=(0.5,)))
    later = replace(ground, model=model, graph=graph, plan=first, table=table, cached_scores={})
    result = run_trial(later, replace(PARAMS, prune_rate=0.2), epochs=(0.1,), seed=0)
    assert result.plan is not None
    assert result.model is not None
    assert result.plan.num_units["conv2"] == 16
    rebuilt = densify(ground.model, ground.graph, result.plan)
    shapes = {k: v.shape for k, v in rebuilt.state_dict().items()}
    assert shapes == {k: v.shape for k, v in result.model.state_dict().items()}


def test_a_trial_climbs_complete_schedules_until_it_is_told_to_stop(ground: Ground) -> None:
    asked: list[Climb] = []

    def goes_on(climb: Climb) -> bool:
        asked.append(climb)
        return len(climb.tops) < 2

    record = run_trial(ground, PARAMS, epochs=(0.5, 1.0, 2.0), seed=3, goes_on=goes_on).record
    assert [r.epochs for r in record.rungs] == pytest.approx([0.5, 1.5], abs=0.1)
    assert [e.epoch for e in record.epochs] == sorted(e.epoch for e in record.epochs)
    assert record.rungs[-1].top1 == record.top1
    assert [c.next_epochs for c in asked] == [1.0, 2.0]
    assert asked[1].tops == tuple(r.top1 for r in record.rungs)
    assert asked[0].cost_share == record.cost_share


def test_time_running_out_fails_the_trial(ground: Ground) -> None:
    def stop(epoch: EpochRecord) -> None:
        raise TrialError("the time budget ran out", "more")

    result = run_trial(ground, PARAMS, epochs=(1.0,), seed=3, on_epoch=stop)
    assert (result.record.failure, result.record.top1) == ("the time budget ran out", None)


def test_the_probe_times_an_epoch(ground: Ground, clock: Clock) -> None:
    """A training step takes two seconds, a batch of an evaluation a tenth of one."""

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        clock.advance(2.0 if output.requires_grad else 0.1)
        return torch.nn.functional.cross_entropy(output, target)

    speed = probe_speed(replace(ground, study=replace(ground.study, loss=loss)))
    assert speed.epoch_s == pytest.approx(6 * 2.0), "384 samples are six batches of 64"
    assert speed.trial_s == pytest.approx(TRIAL_EVALUATIONS * 0.1), "200 samples are one batch"
