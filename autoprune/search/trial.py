"""One trial: choose the units, make the smaller network, recover its accuracy, measure it.

A trial works on the round's dense starting network and knows nothing of Optuna: parameters in, a record
and a model out. Whatever goes wrong in it fails the trial, not the run.
"""

from __future__ import annotations

import copy
import math
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.config import Decay, Metric, Study
from autoprune.data import Data, Split, derive_seed
from autoprune.errors import AutopruneError, RunError, TrialError, UnreachableError
from autoprune.metrics import Evaluation
from autoprune.plan import PruningPlan
from autoprune.pruning import Scores, SensitivityTable, allocate, make_setup, rank_plans, score
from autoprune.record import EpochPoint, Rung, TrialRecord
from autoprune.search.budget import Speed
from autoprune.structure import ChannelGraph, densify, measure_latency_share
from autoprune.tasks import task_of
from autoprune.training import EpochRecord, Schedule, distributed, evaluate, finetune_, recalibrate_

PROBE_BATCHES = 8
TRIAL_EVALUATIONS = 3.0  # a trial evaluates twice and recalibrates; a guess until trials were timed
OUT_OF_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # torch's RuntimeErrors


@dataclass(frozen=True, kw_only=True)
class TrialParams:
    """What one trial tries; the fields after `strategy` belong to one decay each."""

    prune_rate: float
    lr: float
    decay: Decay
    criterion: str
    strategy: str
    gamma: float | None = None
    milestones: int | None = None
    final: float = 0.0
    peak: float | None = None

    def schedule(self, warmup: float) -> Schedule:
        """The learning rate over the trial."""
        return Schedule(
            lr=self.lr, decay=self.decay, gamma=self.gamma, milestones=self.milestones,
            final=self.final, peak=self.peak, warmup=warmup,
        )  # fmt: skip


def _untuned(prune_rate: float, criterion: str, strategy: str) -> TrialParams:
    """What to prune, where it does not matter how it will be tuned."""
    return TrialParams(prune_rate=prune_rate, lr=1.0, decay="linear", criterion=criterion, strategy=strategy)


@dataclass(frozen=True, kw_only=True, eq=False)
class Ground:
    """What all trials of a round stand on.

    Attributes:
        original: the teacher, and the network that plans are composed for.
        model: the round's dense starting network; `plan` leads from the original to it, `graph` is its own.
        original_cost, target_cost: in the target's metric.
        example: one input, to measure latency with.
        floor: of the round.
        seed: of the round.
        cached_scores: by criterion: they depend on the round only.
    """

    study: Study
    data: Data
    device: torch.device
    metric: Metric
    original: nn.Module
    original_cost: float
    target_cost: float
    model: nn.Module
    graph: ChannelGraph
    plan: PruningPlan
    table: SensitivityTable | None
    seed: int
    example: tuple[Tensor, ...] = ()
    cached_scores: dict[str, Scores] = field(default_factory=dict)

    def scores(self, criterion: str) -> Scores:
        """The units' scores by this criterion."""
        if criterion not in self.cached_scores:
            self.cached_scores[criterion] = score(
                self.model, self.graph, criterion, split=self.data.train, device=self.device,
                task=task_of(self.study), seed=self.seed,
            )  # fmt: skip
        return self.cached_scores[criterion]

    def choose(self, params: TrialParams) -> PruningPlan:
        """The plan that removes `prune_rate` of the starting network's cost, or the nearest to it."""
        limit = self.limit(params.prune_rate)
        scores = self.scores(params.criterion)
        table = self.table if params.strategy == "sensitivity" else None
        try:
            return self._allocate(scores, limit, params.strategy, table)
        except UnreachableError as error:
            nearest = error.nearest_cost
        try:
            return self._allocate(scores, nearest, params.strategy, table)
        except UnreachableError as error:
            raise TrialError(error.message, error.hint) from None

    def screened(self, prune_rate: float, ways: Sequence[tuple[str, str]]) -> tuple[str, str]:
        """The (criterion, strategy) that is best at this rate before any fine-tuning.

        Each is tried on a thousand search samples with batch-norm statistics estimated anew. Where that
        cannot be done, because the study's loss or score raises, the trials will record what is the matter.
        """
        if len(ways) == 1:
            return ways[0]
        try:
            plans = {way: self.choose(_untuned(prune_rate, *way)) for way in ways}
            setup = make_setup(
                self.model, self.graph, self.data.search, calibration=self.data.train, device=self.device,
                task=task_of(self.study),
            )  # fmt: skip
            best = rank_plans(setup, list(plans.values()))[0].plan
        except RunError:
            raise
        except Exception:  # of the user's own functions
            return ways[0]
        return next(way for way, plan in plans.items() if plan is best)

    def limit(self, prune_rate: float) -> float:
        """What a network pruned by this rate may cost; never less than the target needs."""
        present = self.graph.cost().of(self.metric)
        return max(self.target_cost, (1 - prune_rate) * present)

    def cost_after(self, plan: PruningPlan, model: nn.Module) -> float:
        """What a trial's network costs; a predicted latency gives way where measuring contradicts it.

        It stands as long as it lies within the measurement's spread, so that noise decides nothing.
        """
        cost = self.graph.cost(plan).of(self.metric)
        if self.metric != "latency":
            return cost
        share, spread = measure_latency_share(self.original, model, self.example, self.device)
        measured = share * self.original_cost
        return measured if abs(measured - cost) > spread * self.original_cost else cost

    def _allocate(
        self, scores: Scores, limit: float, strategy: str, table: SensitivityTable | None
    ) -> PruningPlan:
        return allocate(self.graph, scores, metric=self.metric, limit=limit, strategy=strategy, table=table)


@dataclass(frozen=True, kw_only=True, eq=False)
class TrialResult:
    """A trial's record (number and state are the storage's), and its model with the composed plan."""

    record: TrialRecord
    model: nn.Module | None
    plan: PruningPlan | None


@dataclass(frozen=True, kw_only=True)
class Climb:
    """Where a trial stands at the end of a rung.

    Attributes:
        prune_rate, cost_share: as in its record.
        tops: top-1 at the end of each rung so far.
        done: epochs so far; `next_epochs` would come on the next rung.
    """

    prune_rate: float
    cost_share: float
    tops: tuple[float, ...]
    done: float
    next_epochs: float


def all_the_way(climb: Climb) -> bool:
    """A trial that leaves no rung out."""
    return True


def run_trial(  # noqa: PLR0913 - one whole trial: each argument is a decision of its caller
    ground: Ground, params: TrialParams, *, epochs: tuple[float, ...], seed: int,
    goes_on: Callable[[Climb], bool] = all_the_way, seconds_left: Callable[[], float] = lambda: math.inf,
    on_epoch: Callable[[EpochRecord], None] | None = None,
) -> TrialResult:  # fmt: skip
    """Prune the ground's network by these parameters, fine-tune it and measure it on the search split.

    Args:
        ground: what the round stands on.
        params: what to try.
        epochs: of each rung, a complete schedule.
        seed: of order, augmentation and dropout.
        goes_on: asked between two rungs.
        seconds_left: of the budget; a schedule for which they are too few is gone through faster.
        on_epoch: told of every epoch.
    """
    began = time.perf_counter()
    try:
        return _Trial(ground, params, seed, on_epoch).run(epochs, goes_on, seconds_left)
    except RunError:
        raise  # storage is away: that is not the trial's fault
    except Exception as error:
        if distributed.world_size() > 1 and not isinstance(error, TrialError):
            told = f"a trial failed on rank {distributed.rank_and_size()[0]}: {_reason(error)}"
            raise RunError(told, "torchrun ends the other ranks; start them again") from error
        # whatever the user's loader, loss or evaluate raises fails this trial alone
        with suppress(RuntimeError):
            torch.cuda.empty_cache()
        record = failed_record(_reason(error), seconds=time.perf_counter() - began)
        return TrialResult(record=record, model=None, plan=None)


def failed_record(reason: str, *, seconds: float) -> TrialRecord:
    """The record of a trial that failed."""
    return _record(failure=reason, seconds=seconds)


def _reason(error: Exception) -> str:
    """Why a trial failed, in one line: what was raised, and the innermost line of code."""
    if isinstance(error, AutopruneError):
        return error.message.splitlines()[0][:300]
    told = f"{type(error).__name__}: {error}".splitlines()[0]
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or any(w in told for w in OUT_OF_MEMORY):
        return f"out of memory: {error}".splitlines()[0][:300]
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return told[: 300 - len(where)] + where


class _Trial:
    """One trial under way."""

    def __init__(
        self, ground: Ground, params: TrialParams, seed: int, on_epoch: Callable[[EpochRecord], None] | None
    ) -> None:
        self.ground, self.params, self.seed, self.on_epoch = ground, params, seed, on_epoch
        self.plan = distributed.from_rank_zero(lambda: ground.choose(params))
        self.model = densify(ground.model, ground.graph, self.plan)
        self.curve: list[EpochRecord] = []
        self.rungs: list[Rung] = []

    def run(
        self, epochs: tuple[float, ...], goes_on: Callable[[Climb], bool], seconds_left: Callable[[], float]
    ) -> TrialResult:  # fmt: skip
        """Climb, and say how far it came."""
        ground, tune, began = self.ground, self.ground.study.finetune, time.perf_counter()
        recalibrate_(
            self.model, ground.data.train, num_batches=tune.recalibrate_batches,
            batch_size=tune.batch_size, device=ground.device, seed=ground.seed,
        )  # fmt: skip
        untuned = measure(ground, self.model)
        after, present = ground.cost_after(self.plan, self.model), ground.graph.cost().of(ground.metric)
        rate, share, tuning_seconds = 1 - after / present, after / ground.original_cost, 0.0
        for number, part in enumerate(epochs):
            if number:
                tops = tuple(r.top1 for r in self.rungs)
                done = self.rungs[-1].epochs
                climb = Climb(prune_rate=rate, cost_share=share, tops=tops, done=done, next_epochs=part)
                if not distributed.from_rank_zero(partial(goes_on, climb)):
                    break
            tuning_began = time.perf_counter()
            self._climb(part, distributed.from_rank_zero(seconds_left))
            tuning_seconds += time.perf_counter() - tuning_began
            tuned = measure(ground, self.model)
            self.rungs.append(Rung(epochs=self.curve[-1].epoch, top1=tuned.top1))
        cost = ground.graph.cost(self.plan)
        record = _record(
            prune_rate=rate, cost_share=share, macs=cost.macs, num_params=cost.params,
            top1=tuned.top1, low=tuned.interval.low, high=tuned.interval.high,
            loss=tuned.loss if math.isfinite(tuned.loss) else None,
            before_tuning=untuned.top1, epochs=points(self.curve), rungs=tuple(self.rungs),
            tuning_seconds=tuning_seconds, seconds=time.perf_counter() - began,
        )  # fmt: skip
        return TrialResult(record=record, model=self.model, plan=ground.plan.compose(self.plan))

    def _tell(self) -> None:
        if self.on_epoch is not None:
            self.on_epoch(self.curve[-1])

    def _climb(self, epochs: float, seconds: float) -> None:
        """One complete schedule."""
        ground, study = self.ground, self.ground.study
        done = self.curve[-1].epoch if self.curve else 0.0

        def tell(record: EpochRecord) -> None:
            self.curve.append(replace(record, epoch=done + record.epoch))
            distributed.from_rank_zero(self._tell)

        finetune_(
            self.model, ground.data.train, schedule=self.params.schedule(study.finetune.warmup),
            settings=study.finetune, epochs=epochs, seed=derive_seed(self.seed, 1 + len(self.rungs)),
            device=ground.device, teacher=ground.original, task=task_of(study), seconds=seconds,
            on_epoch=tell,
        )  # fmt: skip


def probe_speed(ground: Ground) -> Speed:
    """Train a copy for a moment, and measure the network once, to see what an epoch and a trial take."""
    study, model = ground.study, copy.deepcopy(ground.model)
    used = ground.data.train.subset(study.finetune.share, seed=0)
    per_epoch = used.num_batches(study.finetune.batch_size)
    for count in (1, min(PROBE_BATCHES, per_epoch)):  # the first batch is slow: caches and threads warm up
        took = seconds_of_training(
            model, ground.data.train, study, count / per_epoch, teacher=ground.original, device=ground.device
        )
    epoch_s, began = took * per_epoch / count, time.perf_counter()
    measure(ground, model)
    return Speed(epoch_s=epoch_s, trial_s=TRIAL_EVALUATIONS * (time.perf_counter() - began), analysis_s=0.0)


def seconds_of_training(
    model: nn.Module, train: Split, study: Study, epochs: float, *, teacher: nn.Module, device: torch.device
) -> float:
    """Train in place as a trial would, and take the time of the steps alone, of no statistics afterwards."""
    began = time.perf_counter()
    finetune_(
        model, train, schedule=Schedule(lr=study.search.lr[0], decay="linear", warmup=0.0),
        settings=replace(study.finetune, recalibrate_batches=0), epochs=epochs, seed=0, device=device,
        teacher=teacher, task=task_of(study),
    )  # fmt: skip
    return time.perf_counter() - began


def measure(ground: Ground, model: nn.Module) -> Evaluation:
    """The model on the search split."""
    study = ground.study
    return evaluate(model, ground.data.search, device=ground.device, task=task_of(study))


def points(curve: list[EpochRecord]) -> tuple[EpochPoint, ...]:
    """A fine-tuning's epochs, as they are recorded."""
    return tuple(
        EpochPoint(epoch=e.epoch, lr=e.lr, train_loss=e.train_loss, images_per_s=e.images_per_s)
        for e in curve
    )


def _record(**values: Any) -> TrialRecord:
    return TrialRecord(number=-1, state="running", params={}, **values)
