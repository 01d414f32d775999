from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import optuna
import pytest
import torch

from autoprune import events as ev
from autoprune.baseline import Work, begin
from autoprune.config import DECAYS, Lock, Search
from autoprune.controller import start
from autoprune.history import CHECKPOINT, read_trials
from autoprune.pipeline import analyse, known_points, stand
from autoprune.preflight import prepare
from autoprune.record import TrialRecord
from autoprune.search import (
    FAILED_VALUE,
    RoundJob,
    first_points,
    make_sampler,
    next_points,
    params_of,
    search_round,
    suggest,
    value_of,
)
from autoprune.store import RunStore, quiet_optuna, scored
from autoprune.trial import run_trial
from tests.tiny import tiny_study


@pytest.fixture
def work(tmp_path: Path) -> Iterator[Work]:
    study = tiny_study(search=Search(trials=3, epochs=0.5))
    with quiet_optuna(), closing(RunStore(tmp_path, "tiny", create=True)) as store:
        yield begin(prepare(study, lock=Lock(plain=True)), store, ev.silent, "")


def first_round(work: Work) -> tuple[RoundJob, optuna.Study]:
    state = start(work.goal, work.setup.study.control)
    return analyse(work, state, stand(work, state))


def test_a_round_runs_its_planned_trials_and_keeps_models_inside_the_floor(work: Work) -> None:
    job, study = first_round(work)
    search_round(job, study, known_points(job))
    assert len(scored(study)) == 3
    for record, trial in zip(read_trials(study), scored(study), strict=True):
        assert record.state == "complete"
        assert record.top1 is not None
        assert (CHECKPOINT in trial.user_attrs) == (record.top1 >= job.goal.floor - 1e-9)
        assert trial.value == pytest.approx(value_of(record, job))
        assert record.prune_rate == pytest.approx(record.params["prune_rate"], abs=0.05)


def test_the_first_trial_is_the_prior_at_the_ceiling(work: Work) -> None:
    job, study = first_round(work)
    search_round(replace(job, plan=replace(job.plan, trials=1)), study, known_points(job))
    params = read_trials(study)[0].params
    assert params["prune_rate"] == job.plan.ceiling
    assert params["decay"] == "cosine"
    assert job.search.lr[0] <= params["lr"] <= job.search.lr[1]


def test_the_less_goes_the_lower_the_learning_rate(work: Work) -> None:
    deep, shallow = first_points(first_round(work)[0])
    assert shallow["lr"] < deep["lr"]


def test_a_later_round_starts_from_the_best_of_the_last(work: Work) -> None:
    job, study = first_round(work)
    search_round(job, study, known_points(job))
    best = max(read_trials(study), key=lambda t: t.top1 or 0)
    deep, safe = next_points(replace(job, plan=replace(job.plan, ceiling=0.2)), study)
    assert deep == best.params | {"prune_rate": 0.2}
    assert safe["prune_rate"] == pytest.approx(0.1)


def test_a_diverged_trial_fails_alone(work: Work) -> None:
    job, study = first_round(work)
    hot = replace(job.ground.study, search=Search(trials=1, epochs=1, lr=(1e9, 1e10)))
    job = replace(job, ground=replace(job.ground, study=hot), plan=replace(job.plan, trials=1, epochs=1.0))
    search_round(job, study, [])
    (trial,) = read_trials(study)
    assert trial.state == "failed"
    assert "diverged" in trial.failure
    assert scored(study)[0].value == FAILED_VALUE


def test_running_out_of_memory_fails_the_trial_and_other_errors_stop_the_run(work: Work) -> None:
    job, _ = first_round(work)
    params = params_of(known_points(job)[0], job.plan.ceiling)

    def failing(error: Exception) -> RoundJob:
        def loss(output: object, target: object) -> torch.Tensor:
            raise error

        study = replace(job.ground.study, loss=loss)
        return replace(job, ground=replace(job.ground, study=study, cached_scores=job.ground.cached_scores))

    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        result = run_trial(failing(error).ground, params, epochs=0.1, seed=0)
        assert "memory" in result.record.failure
        assert result.model is None
    with pytest.raises(RuntimeError, match="a bug"):
        run_trial(failing(RuntimeError("a bug")).ground, params, epochs=0.1, seed=0)


def test_values_are_lexicographic(work: Work) -> None:
    job, _ = first_round(work)

    def value(rate: float, top1: float | None) -> float:
        share = job.state.current.cost_share * (1 - rate)
        record = TrialRecord(
            number=0, state="complete", params={}, prune_rate=rate, cost_share=share, top1=top1
        )
        return value_of(record, job)

    floor = job.plan.floor
    ranked = [value(0.1, None), value(0.5, 0.0), value(0.3, floor - 0.1), value(0.1, floor - 0.01),
              value(0.05, 1.0), value(0.3, floor), value(0.3, floor + 0.01), value(0.35, floor)]  # fmt: skip
    assert ranked == sorted(ranked)
    assert value(0.35, floor - 0.001) < 0 < value(0.05, floor)


@pytest.mark.parametrize("kind", ["tpe", "gp", "random"])
def test_samplers_repeat_for_a_seed_and_cover_every_decay(kind: str) -> None:
    def draw(seed: int, count: int) -> list[dict[str, object]]:
        study = optuna.create_study(direction="maximize")
        for number in range(count):
            study.sampler = make_sampler(kind, seed + number)
            trial = study.ask()
            params = suggest(trial, Search(), 0.4)
            params.schedule(0.1)
            assert 0.2 <= params.prune_rate <= 0.4
            study.tell(trial, params.prune_rate)
        return [t.params for t in study.trials]

    with quiet_optuna():
        few = 7 if kind == "gp" else 30
        assert draw(1, few) == draw(1, few)
        assert draw(1, 3) != draw(2, 3)
        if kind != "gp":
            assert {p["decay"] for p in draw(1, few)} == set(DECAYS)
