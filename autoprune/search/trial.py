"""One trial: choose the units, make the smaller network, recover its accuracy, measure it.

A trial works on the context of its round and knows nothing of Optuna or storage: parameters go in, a record
and a model come out. Whatever goes wrong in it fails the trial, not the run.

A trial climbs rungs. Each rung is a complete learning-rate schedule, so that only annealed models are ever
compared; between two rungs the round is asked whether to go on.
"""

from __future__ import annotations

import copy
import math
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from autoprune.config import Decay, Study
from autoprune.data import Split, derive_seed
from autoprune.errors import AutopruneError, RunError, TrialError
from autoprune.plan import PruningPlan
from autoprune.record import EpochPoint, Rung, TrialRecord
from autoprune.search.budget import Speed
from autoprune.search.context import Problem, RoundContext, RoundStart
from autoprune.structure import densify
from autoprune.tasks import task_of
from autoprune.training import EpochRecord, Schedule, distributed, finetune_, recalibrate_

# What torch's RuntimeErrors say when memory runs out on the CPU; they have no type of their own.
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
MAX_REASON = 300  # characters of a failure's reason, which has to fit into a table; a guess


@dataclass(frozen=True, kw_only=True)
class TrialParams:
    """What one trial tries; each field after `strategy` belongs to one decay, as in `Schedule`."""

    prune_rate: float
    lr: float
    decay: Decay
    criterion: str
    strategy: str
    gamma: float | None = None
    milestones: int | None = None
    final: float = 0.0
    peak: float | None = None

    @classmethod
    def from_optuna(cls, params: Mapping[str, Any]) -> TrialParams:
        """Read the parameters of an Optuna trial; `step_gamma` is the `gamma` of the decay `step`."""
        decay = params["decay"]
        return cls(
            prune_rate=params["prune_rate"], lr=params["lr"], decay=decay,
            criterion=params["criterion"], strategy=params["strategy"],
            gamma=params.get(f"{decay}_gamma"), milestones=params.get(f"{decay}_milestones"),
            final=params.get(f"{decay}_final", 0.0), peak=params.get(f"{decay}_peak"),
        )  # fmt: skip

    def to_optuna(self) -> dict[str, Any]:
        """Return the parameters as an Optuna trial is suggested them, those of other decays left out."""
        params: dict[str, Any] = {
            "prune_rate": self.prune_rate, "lr": self.lr, "decay": self.decay,
            "criterion": self.criterion, "strategy": self.strategy,
        }  # fmt: skip
        if self.decay == "step":
            return params | {"step_gamma": self.gamma, "step_milestones": self.milestones}
        if self.decay == "exponential":
            return params | {"exponential_gamma": self.gamma}
        if self.decay == "onecycle":
            return params | {"onecycle_peak": self.peak}
        return params | {f"{self.decay}_final": self.final}

    def schedule(self, warmup: float) -> Schedule:
        """Return the learning rate over one rung."""
        return Schedule(
            lr=self.lr, decay=self.decay, gamma=self.gamma, milestones=self.milestones,
            final=self.final, peak=self.peak, warmup=warmup,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class TrialResult:
    """A trial's record (number and state are the storage's), and its model with the composed plan."""

    record: TrialRecord
    model: nn.Module | None
    plan: PruningPlan | None


@dataclass(frozen=True, kw_only=True)
class RungState:
    """How far a trial is at the end of a rung.

    Attributes:
        prune_rate, cost_share: as in its record.
        top1s: top-1 on the search split at the end of each rung so far.
        epochs: of fine-tuning so far; the next rung would add `next_epochs`.
    """

    prune_rate: float
    cost_share: float
    top1s: tuple[float, ...]
    epochs: float
    next_epochs: float


def always_continue(state: RungState) -> bool:
    """Let a trial climb all of its rungs."""
    return True


@dataclass(frozen=True, kw_only=True)
class TrialHooks:
    """How the round watches and steers one of its trials.

    Attributes:
        should_continue: asked between two rungs.
        seconds_left: of the budget; a rung that does not fit skips steps of its schedule, see `finetune_`.
        on_epoch: called after every epoch.
    """

    should_continue: Callable[[RungState], bool] = always_continue
    seconds_left: Callable[[], float] = lambda: math.inf
    on_epoch: Callable[[EpochRecord], None] | None = None


def run_trial(
    context: RoundContext,
    params: TrialParams,
    *,
    rungs: tuple[float, ...],
    seed: int,
    hooks: TrialHooks = TrialHooks(),
) -> TrialResult:
    """Prune the round's start by these parameters, fine-tune it, and measure it on the search split.

    Args:
        context: of the round.
        params: what to try.
        rungs: the epochs of each rung.
        seed: of order, augmentation and dropout.
        hooks: how the round watches and steers the trial.

    Raises:
        RunError: storage is away, or another rank of a distributed trial failed. Any other exception, also of
            the user's loader, loss or score, fails the trial and is noted in its record.
    """
    began = time.perf_counter()
    try:
        return _Trial(context, params, seed, hooks).run(rungs)
    except RunError:
        raise
    except Exception as error:
        if distributed.world_size() > 1 and not isinstance(error, TrialError):
            message = f"a trial failed on rank {distributed.rank_and_size()[0]}: {_reason(error)}"
            raise RunError(message, "torchrun ends the other ranks; start them again") from error
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
        record = failed_record(_reason(error), seconds=time.perf_counter() - began)
        return TrialResult(record=record, model=None, plan=None)


def failed_record(reason: str, *, seconds: float) -> TrialRecord:
    """Return the record of a trial that failed."""
    return _record(failure=reason, seconds=seconds)


def _reason(error: Exception) -> str:
    """Return why a trial failed, in one line: what was raised, and the innermost line of code."""
    if isinstance(error, AutopruneError):
        return error.message.splitlines()[0][:MAX_REASON]
    message = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in message for w in OUT_OF_MEMORY):
        return f"out of memory: {error}".splitlines()[0][:MAX_REASON]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return message[: MAX_REASON - len(where)] + where


class _Trial:
    """A trial that is running."""

    def __init__(self, context: RoundContext, params: TrialParams, seed: int, hooks: TrialHooks) -> None:
        self.context, self.params, self.seed, self.hooks = context, params, seed, hooks
        # Ranks compute scores on different data orders: all of them prune by the first one's plan.
        self.plan = distributed.from_rank_zero(
            lambda: context.choose_plan(params.prune_rate, params.criterion, params.strategy)
        )
        self.model = densify(context.start.model, context.start.graph, self.plan)
        self.curve: list[EpochRecord] = []
        self.rungs: list[Rung] = []

    def run(self, rungs: tuple[float, ...]) -> TrialResult:
        """Climb the rungs, and record how far the trial came."""
        context, began = self.context, time.perf_counter()
        problem, graph = context.problem, context.start.graph
        tune = problem.study.finetune
        recalibrate_(
            self.model, problem.data.train, num_batches=tune.recalibrate_batches,
            batch_size=tune.batch_size, device=problem.device, seed=context.seed,
        )  # fmt: skip
        untuned = problem.evaluate_on_search(self.model)
        cost, start_cost = context.cost_of(self.plan, self.model), graph.cost().of(problem.metric)
        rate, share, tuning_seconds = 1 - cost / start_cost, cost / problem.original_cost, 0.0
        for epochs in rungs:
            if self.rungs:
                state = RungState(
                    prune_rate=rate, cost_share=share, top1s=tuple(r.top1 for r in self.rungs),
                    epochs=self.rungs[-1].epochs, next_epochs=epochs,
                )  # fmt: skip
                if not distributed.from_rank_zero(partial(self.hooks.should_continue, state)):
                    break
            tuning_began = time.perf_counter()
            self._finetune(epochs, distributed.from_rank_zero(self.hooks.seconds_left))
            tuning_seconds += time.perf_counter() - tuning_began
            tuned = problem.evaluate_on_search(self.model)
            self.rungs.append(Rung(epochs=self.curve[-1].epoch, top1=tuned.top1))
        exact = graph.cost(self.plan)
        record = _record(
            prune_rate=rate, cost_share=share, macs=exact.macs, num_params=exact.params,
            top1=tuned.top1, low=tuned.interval.low, high=tuned.interval.high,
            loss=tuned.loss if math.isfinite(tuned.loss) else None,
            before_tuning=untuned.top1, epochs=epoch_points(self.curve), rungs=tuple(self.rungs),
            tuning_seconds=tuning_seconds, seconds=time.perf_counter() - began,
        )  # fmt: skip
        return TrialResult(record=record, model=self.model, plan=context.start.plan.compose(self.plan))

    def _finetune(self, epochs: float, seconds: float) -> None:
        """Train for one complete schedule."""
        problem = self.context.problem
        done = self.curve[-1].epoch if self.curve else 0.0

        def append(record: EpochRecord) -> None:
            self.curve.append(replace(record, epoch=done + record.epoch))
            distributed.from_rank_zero(self._report_epoch)

        finetune_(
            self.model, problem.data.train,
            schedule=self.params.schedule(problem.study.finetune.warmup), settings=problem.study.finetune,
            epochs=epochs, seed=derive_seed(self.seed, 1 + len(self.rungs)), device=problem.device,
            teacher=problem.original, task=problem.task, seconds=seconds, on_epoch=append,
        )  # fmt: skip

    def _report_epoch(self) -> None:
        if self.hooks.on_epoch is not None:
            self.hooks.on_epoch(self.curve[-1])


def probe_speed(problem: Problem, start: RoundStart) -> Speed:
    """Train a copy for a moment and evaluate it once, to see how long an epoch and a trial take."""
    study, model, heuristics = problem.study, copy.deepcopy(start.model), problem.heuristics
    subset = problem.data.train.subset(study.finetune.share, seed=0)
    per_epoch = subset.num_batches(study.finetune.batch_size)
    # The first batch is slow, as caches and threads warm up: its time is measured and thrown away.
    for count in (1, min(heuristics.probe_batches, per_epoch)):
        seconds = seconds_of_training(
            model, problem.data.train, study, count / per_epoch,
            teacher=problem.original, device=problem.device,
        )  # fmt: skip
    began = time.perf_counter()
    problem.evaluate_on_search(model)
    evaluation_s = time.perf_counter() - began
    return Speed(
        epoch_s=seconds * per_epoch / count,
        trial_s=heuristics.evaluations_per_trial * evaluation_s,
        analysis_s=0.0,
    )


def seconds_of_training(
    model: nn.Module, train: Split, study: Study, epochs: float, *, teacher: nn.Module, device: torch.device
) -> float:
    """Train in place as a trial does, and return the seconds of the steps alone, without recalibration."""
    began = time.perf_counter()
    finetune_(
        model, train, schedule=Schedule(lr=study.search.lr[0], decay="linear", warmup=0.0),
        settings=replace(study.finetune, recalibrate_batches=0), epochs=epochs, seed=0, device=device,
        teacher=teacher, task=task_of(study),
    )  # fmt: skip
    return time.perf_counter() - began


def epoch_points(curve: list[EpochRecord]) -> tuple[EpochPoint, ...]:
    """Return a fine-tuning's epochs as they are recorded."""
    return tuple(
        EpochPoint(epoch=e.epoch, lr=e.lr, train_loss=e.train_loss, images_per_s=e.images_per_s)
        for e in curve
    )


def _record(**values: Any) -> TrialRecord:
    return TrialRecord(number=-1, state="running", params={}, **values)
