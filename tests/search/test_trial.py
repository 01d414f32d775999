from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from autoprune.config import Analysis, Baseline, Budget, Target
from autoprune.errors import TrialError
from autoprune.plan import PruningPlan
from autoprune.pruning.screening import make_setup, rank_plans
from autoprune.pruning.sensitivity import sensitivity
from autoprune.search.context import Problem, RoundContext, RoundStart
from autoprune.search.trial import RungState, TrialHooks, TrialParams, probe_speed, run_trial
from autoprune.structure.densify import densify
from autoprune.structure.tracing import trace
from autoprune.tasks import task_of
from autoprune.training.evaluation import evaluate
from autoprune.training.finetune import EpochRecord, train_baseline_
from tests.clock import Clock
from tests.tiny import tiny_data, tiny_net, tiny_study

PARAMS = TrialParams(prune_rate=0.3, lr=0.05, decay="cosine", criterion="l2", strategy="sensitivity")


@pytest.fixture(scope="module")
def context() -> RoundContext:
    model, data, study = tiny_net(), tiny_data(), tiny_study()
    train_baseline_(model, data.train, Baseline(epochs=6, batch_size=64), seed=0)
    graph = trace(model, torch.zeros(1, 1, 8, 8))
    problem = Problem(
        study=study, task=task_of(study), target=Target.parse("macs=0.5"), budget=Budget(epochs=1.0),
        original=model, graph=graph, data=data, device=torch.device("cpu"), example=(),
        original_cost=graph.cost().macs, target_cost=graph.cost().macs // 2,
    )  # fmt: skip
    start = RoundStart(model=model, graph=graph, plan=PruningPlan.full(graph))
    table = sensitivity(model, graph, data.search, settings=Analysis(ratios=(0.5,)), calibration=data.train)
    return RoundContext(problem=problem, start=start, target_cost=problem.target_cost, table=table, seed=1)


def choose(context: RoundContext, params: TrialParams) -> PruningPlan:
    return context.choose_plan(params.prune_rate, params.criterion, params.strategy)


def test_a_trial_says_what_it_left_and_how_well_that_does(context: RoundContext) -> None:
    epochs: list[EpochRecord] = []
    result = run_trial(context, PARAMS, rungs=(1.0,), seed=3, hooks=TrialHooks(on_epoch=epochs.append))
    record, model, plan = result.record, result.model, result.plan
    assert model is not None
    assert plan is not None
    assert record.prune_rate == pytest.approx(0.3, abs=0.05)
    assert record.cost_share == pytest.approx(1 - (record.prune_rate or 0))
    assert record.macs == context.start.graph.cost(plan).macs
    assert record.top1 == evaluate(model, context.problem.data.search).top1
    assert record.low is not None
    assert record.low <= record.top1
    assert len(record.epochs) == len(epochs) == 1
    assert record.tuning_seconds <= record.seconds


def test_a_trial_leaves_its_ground_alone_and_repeats_for_a_seed(context: RoundContext) -> None:
    before = {k: v.clone() for k, v in context.start.model.state_dict().items()}
    first, second = (run_trial(context, PARAMS, rungs=(0.5,), seed=3) for _ in range(2))
    assert first.model is not None
    assert second.model is not None
    states = zip(first.model.state_dict().values(), second.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in states)
    assert all(torch.equal(v, before[k]) for k, v in context.start.model.state_dict().items())


@pytest.mark.parametrize("criterion", ["l2", "taylor", "bn_scale", "fpgm", "random"])
@pytest.mark.parametrize("strategy", ["sensitivity", "uniform", "global"])
def test_every_choice_meets_the_rate(context: RoundContext, criterion: str, strategy: str) -> None:
    plan = choose(context, replace(PARAMS, criterion=criterion, strategy=strategy))
    cost, present = context.start.graph.cost(plan).macs, context.start.graph.cost().macs
    assert 0.64 * present <= cost <= 0.7 * present


def test_the_ranking_that_does_best_untuned_is_found_by_trying(context: RoundContext) -> None:
    ways = [(c, s) for c in ("random", "l1", "taylor") for s in ("uniform", "sensitivity")]
    best = context.screen(0.4, ways)
    assert context.screen(0.4, [best]) == best

    def loss(way: tuple[str, str]) -> float:
        params = replace(PARAMS, prune_rate=0.4, criterion=way[0], strategy=way[1])
        setup = make_setup(
            context.start.model,
            context.start.graph,
            context.problem.data.search,
            calibration=context.problem.data.train,
        )
        return rank_plans(setup, [choose(context, params)])[0].loss_key

    assert loss(best) == min(loss(way) for way in ways) < max(loss(way) for way in ways)


def test_a_loss_that_raises_is_left_to_the_trials(context: RoundContext) -> None:
    def loss(output: object, target: object) -> torch.Tensor:
        raise OSError("no such image")

    study = replace(context.problem.study, loss=loss)
    problem = replace(context.problem, study=study, task=task_of(study))
    broken = replace(context, problem=problem, _scores={})
    assert broken.screen(0.4, [("taylor", "uniform"), ("l1", "uniform")]) == ("taylor", "uniform")


def test_no_trial_overshoots_the_target(context: RoundContext) -> None:
    assert context.cost_limit(0.9) == context.target_cost


def test_a_rate_beyond_reach_takes_the_nearest(context: RoundContext) -> None:
    plan = choose(replace(context, target_cost=1), replace(PARAMS, prune_rate=0.999))
    dense = densify(context.start.model, context.start.graph, plan)
    assert sum(p.numel() for p in dense.parameters()) == context.start.graph.cost(plan).params


def test_the_plan_is_told_for_the_original(context: RoundContext) -> None:
    first = PruningPlan(keep={"conv2": np.arange(1, 13)}, num_units={"conv2": 16})
    model = densify(context.start.model, context.start.graph, first)
    graph = trace(model, torch.zeros(1, 1, 8, 8))
    table = sensitivity(model, graph, context.problem.data.search, settings=Analysis(ratios=(0.5,)))
    start = RoundStart(model=model, graph=graph, plan=first)
    later = replace(context, start=start, table=table, _scores={})
    result = run_trial(later, replace(PARAMS, prune_rate=0.2), rungs=(0.1,), seed=0)
    assert result.plan is not None
    assert result.model is not None
    assert result.plan.num_units["conv2"] == 16
    rebuilt = densify(context.start.model, context.start.graph, result.plan)
    shapes = {k: v.shape for k, v in rebuilt.state_dict().items()}
    assert shapes == {k: v.shape for k, v in result.model.state_dict().items()}


def test_a_trial_climbs_complete_schedules_until_it_is_told_to_stop(context: RoundContext) -> None:
    asked: list[RungState] = []

    def should_continue(state: RungState) -> bool:
        asked.append(state)
        return len(state.top1s) < 2

    hooks = TrialHooks(should_continue=should_continue)
    record = run_trial(context, PARAMS, rungs=(0.5, 1.0, 2.0), seed=3, hooks=hooks).record
    assert [r.epochs for r in record.rungs] == pytest.approx([0.5, 1.5], abs=0.1)
    assert [e.epoch for e in record.epochs] == sorted(e.epoch for e in record.epochs)
    assert record.rungs[-1].top1 == record.top1
    assert [c.next_epochs for c in asked] == [1.0, 2.0]
    assert asked[1].top1s == tuple(r.top1 for r in record.rungs)
    assert asked[0].cost_share == record.cost_share


def test_time_running_out_fails_the_trial(context: RoundContext) -> None:
    def stop(epoch: EpochRecord) -> None:
        raise TrialError("the time budget ran out", "more")

    result = run_trial(context, PARAMS, rungs=(1.0,), seed=3, hooks=TrialHooks(on_epoch=stop))
    assert (result.record.failure, result.record.top1) == ("the time budget ran out", None)


def test_the_probe_times_an_epoch(context: RoundContext, clock: Clock) -> None:
    """A training step takes two seconds, a batch of an evaluation a tenth of one."""

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        clock.advance(2.0 if output.requires_grad else 0.1)
        return torch.nn.functional.cross_entropy(output, target)

    study = replace(context.problem.study, loss=loss)
    problem = replace(context.problem, study=study, task=task_of(study))
    speed = probe_speed(problem, context.start)
    assert speed.epoch_s == pytest.approx(6 * 2.0), "384 samples are six batches of 64"
    trial_s = problem.heuristics.evaluations_per_trial * 0.1
    assert speed.trial_s == pytest.approx(trial_s), "200 samples are one batch"
