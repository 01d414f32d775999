"""The end of a run: tune the best model once more, make it from the original, measure, export, report.

The best model is the deepest inside the floor, whether it reached the target or not; both are delivered the
same way. This is the one place besides `baseline` where the test split is read.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from autoprune import events as ev
from autoprune.artifact import Preprocessing, architecture_of, manifest_of_run, write_artifact
from autoprune.config import Protection
from autoprune.data import derive_seed
from autoprune.errors import TrialError
from autoprune.formatting import percent
from autoprune.metrics import Evaluation, difference_pp
from autoprune.pipeline.baseline import Work
from autoprune.pipeline.measurement import measure_latency, summarise, with_latency
from autoprune.pipeline.preflight import Setup
from autoprune.plan import PruningPlan
from autoprune.record import Difference, ModelSummary, Outcome, RunRecord, RunResult, Tuning
from autoprune.report import annotate_studies, write_report
from autoprune.search import (
    MAX_EPOCHS,
    MIN_EPOCHS,
    Promotion,
    State,
    checkpoint_of,
    final_rate,
    measured_speed,
    nearest_miss,
    params_of,
    points,
    read_plan,
    read_round,
    read_run,
    read_trials,
    saved,
    tell_budget,
    unpack,
)
from autoprune.storage import CHECKPOINT, FINAL, completed_trials
from autoprune.structure import densify, verify
from autoprune.tasks import task_of
from autoprune.training import EpochRecord, evaluate, finetune_

SAFETY = 0.95  # of the seconds left: epochs are planned from a mean
FINAL_SEED = 1 << 20  # far from any round's number
PLAIN_NAME, ENCRYPTED_NAME = "model.autoprune", "model.autoprune.age"


@dataclass(frozen=True, kw_only=True, eq=False)
class Finished:
    """The model to deliver: dense, with the plan that leads to it from the original."""

    model: nn.Module
    plan: PruningPlan
    search_top1: float
    tuned_epochs: float
    tuning: Tuning | None = None


def deliver(work: Work, state: State, protection: Protection) -> RunResult:
    """Finish the run: everything that a user gets is written here.

    Raises:
        VerificationError: the dense model does not compute what the masked original computes.
        ArtifactError: the delivered file cannot be written.
    """
    if work.store.study(FINAL) is None:
        began = time.perf_counter()
        state, finished = _finish(work, state)
        _keep(work, state, finished, began)
    else:
        finished = _kept(work)
    record = read_run(work.store)
    model_file = _write_model(work, finished, record, protection)
    report = write_report(record, work.store.folder)
    annotate_studies(work.store)
    assert record.after is not None
    assert record.outcome is not None
    work.on_event(
        ev.RunFinished(
            outcome=record.outcome, before=record.before, after=record.after, out=work.store.folder,
            files=(model_file, report),
        )
    )  # fmt: skip
    return RunResult(
        reached=record.outcome.reached, stopped_by=record.outcome.stopped_by, message=record.outcome.message,
        before=record.before, after=record.after, out=work.store.folder, model_file=model_file,
        report=report, record=record,
    )  # fmt: skip


def _finish(work: Work, state: State) -> tuple[State, Finished]:
    """The best model, tuned once more where that helps, made from the original and proven equal to it."""
    if state.ended != "target" and (chance := _last_chance(work, state)) is not None:
        return chance
    finished = _made(work, state.best)
    return state, _tuned(work, state.best, finished) if state.best.round else finished


def _last_chance(work: Work, state: State) -> tuple[State, Finished] | None:
    """A deeper model that missed the floor, if what is left of the budget brings it back there."""
    rounds = [read_round(a) for a in work.store.rounds()]
    kept = {(r.number, t) for r in rounds for t in _with_checkpoint(work, r.number)}
    near = [replace(r, trials=tuple(t for t in r.trials if (r.number, t.number) in kept)) for r in rounds]
    epochs = _affordable_epochs(work)
    miss = nearest_miss(work.goal, state, near, epochs) if epochs >= MIN_EPOCHS else None
    if miss is None:
        return None
    who, top1 = f"trial {miss.model.trial} of round {miss.model.round}", percent(miss.model.top1, 2)
    work.on_event(ev.Note(message=f"{who} missed the floor with {top1}: it gets what is left of the budget"))
    finished = _tuned(work, miss.model, _made(work, miss.model))
    if finished.search_top1 < work.goal.floor:
        work.on_event(ev.Note(message=f"it ended with {percent(finished.search_top1, 2)}: left out"))
        return None
    model = replace(miss.model, top1=finished.search_top1)
    return saved(work.goal, state, model), finished


def _with_checkpoint(work: Work, number: int) -> list[int]:
    attempt = work.store.study(number)
    assert attempt is not None
    kept = {t.number: t.user_attrs.get(CHECKPOINT) for t in completed_trials(attempt)}
    return [number for number, artifact in kept.items() if artifact and work.store.has_checkpoint(artifact)]


def _made(work: Work, promoted: Promotion) -> Finished:
    """A trial's model, made from the original and proven equal to it."""
    setup = work.setup
    checkpoint = work.store.load_checkpoint(checkpoint_of(work.store, promoted.round, promoted.trial))
    model = densify(setup.model, setup.graph, checkpoint.plan)
    checkpoint.load_into_(model)
    if promoted.round:
        verify(setup.model, setup.graph, checkpoint.plan, setup.example)
    return Finished(model=model, plan=checkpoint.plan, search_top1=promoted.top1, tuned_epochs=0.0)


def _tuned(work: Work, best: Promotion, found: Finished) -> Finished:
    """A longer fine-tuning with what worked; the better of before and after."""
    setup, study = work.setup, work.setup.study
    attempt = work.store.study(best.round)
    assert attempt is not None
    plan = read_plan(attempt)
    epochs = _affordable_epochs(work)
    if epochs < MIN_EPOCHS:
        return found
    work.on_event(ev.StageStarted(stage="finish", round=0, detail=f"tune {epochs:.3g} epochs"))
    params = params_of(attempt.trials[best.trial].params, plan.ceiling)
    trial = next(t for t in read_trials(attempt) if t.number == best.trial)
    lr = final_rate(params.lr, trial.rungs, epochs, study.search.lr)
    model = copy.deepcopy(found.model)
    try:
        curve = finetune_(
            model, setup.data.train, schedule=replace(params, lr=lr).schedule(study.finetune.warmup),
            settings=study.finetune, epochs=epochs, seed=derive_seed(study.seed, FINAL_SEED),
            device=setup.device, teacher=setup.model, task=task_of(study), seconds=work.meter.left().seconds,
            on_epoch=lambda e: _tell_epoch(work, e, epochs),
        )  # fmt: skip
    except TrialError as error:
        work.on_event(ev.Note(message=f"the final tuning was left out: {error.message}"))
        return found
    work.meter.spend(epochs)
    tell_budget(work.meter, work.on_event)
    top1 = _evaluate(setup, model, setup.data.search).top1
    kept = top1 >= found.search_top1
    found = replace(
        found, tuning=Tuning(epochs=points(curve), before=found.search_top1, search_top1=top1, kept=kept)
    )
    if not kept:
        told = f"{percent(top1, 2)}, less than {percent(found.search_top1, 2)}"
        work.on_event(ev.Note(message=f"the final tuning gave top-1 {told}: left out"))
        return found
    return replace(found, model=model, search_top1=top1, tuned_epochs=epochs)


def _affordable_epochs(work: Work) -> float:
    """All that is left of the budget."""
    left, speed = work.meter.left(), measured_speed(work.store)
    by_time = SAFETY * left.seconds / speed.epoch_s if speed else 0.0
    return min(MAX_EPOCHS, by_time, left.epochs)


def _keep(work: Work, state: State, finished: Finished, began: float) -> None:
    """Measure what is delivered, and store it as the run's final study."""
    setup = work.setup
    work.on_event(ev.StageStarted(stage="finish", round=0, detail="test, measure latency"))
    before, after, difference = _before_and_after(work, finished)
    attributes = {
        "before": before,
        "after": after,
        "difference": difference,
        "outcome": _outcome(setup, state, finished, before, after),
        "started_from": state.best.round,
        "tuned_epochs": finished.tuned_epochs,
        "tuning": finished.tuning,
        "seconds": time.perf_counter() - began,
    }
    kept = work.store.save_checkpoint(finished.model, finished.plan)
    work.store.create_study(FINAL, attributes, (kept, finished.search_top1))


def _kept(work: Work) -> Finished:
    """What an earlier process finished."""
    study = work.store.study(FINAL)
    assert study is not None
    done = completed_trials(study)[0]
    checkpoint = work.store.load_checkpoint(done.user_attrs[CHECKPOINT])
    model = densify(work.setup.model, work.setup.graph, checkpoint.plan)
    checkpoint.load_into_(model)
    assert done.value is not None
    return Finished(
        model=model, plan=checkpoint.plan, search_top1=done.value,
        tuned_epochs=study.user_attrs["tuned_epochs"],
    )  # fmt: skip


def _before_and_after(work: Work, finished: Finished) -> tuple[ModelSummary, ModelSummary, Difference]:
    """The second and last reading of the test split, and both models' latency in turns."""
    setup, first = work.setup, read_run(work.store).before
    test = _evaluate(setup, finished.model, setup.data.test)
    baseline = work.store.study(0)
    assert baseline is not None
    known = Evaluation(
        top1=first.top1, loss=0.0, num_samples=first.num_samples,
        correct=unpack(baseline.user_attrs["test_correct"], first.num_samples),
    )  # fmt: skip
    delta, interval = difference_pp(test, known)
    latencies = measure_latency(setup.model, finished.model, setup.example, setup.device)
    after = summarise(finished.model, setup.graph.cost(finished.plan), test, finished.search_top1)
    difference = Difference(delta_pp=delta, low_pp=interval.low, high_pp=interval.high)
    return with_latency(first, latencies[0]), with_latency(after, latencies[1]), difference


def _evaluate(setup: Setup, model: nn.Module, split: Any) -> Evaluation:
    return evaluate(model, split, device=setup.device, task=task_of(setup.study))


def _outcome(
    setup: Setup, state: State, finished: Finished, before: ModelSummary, after: ModelSummary
) -> Outcome:
    study, share = setup.study, state.best.cost_share
    left, wanted = _left(setup, share, before, after), f"asked for {100 * setup.target_share:.1f} %"
    if state.ended == "target" and setup.metric == "latency" and is_slower(setup.target_share, before, after):
        message = (
            f"The target {study.target} is not reached, though its prediction is: {left} ({wanted}); ask for "
            "less than you need, or run on a machine that does nothing else."
        )
        return Outcome(reached=False, stopped_by="target", message=message)
    if state.ended == "target":
        accuracy = f"top-1 {percent(finished.search_top1, 2)} on the search split"
        message = f"The target {study.target} is reached: {left}, {accuracy}."
        return Outcome(reached=True, stopped_by="target", message=message)
    assert state.ended is not None
    why, change = {
        "floor": (f"the accuracy floor (max_drop {study.max_drop:g} pp) stopped the run",
                  "allow a larger --max-drop, a larger --budget or a milder --target"),
        "budget": (f"the budget ({study.budget}) stopped the run", "give a larger --budget"),
        "rounds": (f"the limit of {study.control.max_rounds} rounds stopped the run",
                   "raise control.max_rounds in the study"),
    }[state.ended]  # fmt: skip
    what = "nothing could be removed" if state.best.round == 0 else left
    message = f"The target {study.target} is not reached: {why} where {what} ({wanted}); {change}."
    return Outcome(reached=False, stopped_by=state.ended, message=message)


def _left(setup: Setup, share: float, before: ModelSummary, after: ModelSummary) -> str:
    """What the result costs of the original, in words; a latency as predicted and as measured."""
    if setup.metric == "latency":
        measured, spread = latency_share(before, after)
        return (
            f"predicted {100 * share:.1f} %, measured {100 * measured:.1f} % of the original's latency "
            f"(spread {100 * spread:.1f} %)"
        )
    names = {"macs": "MACs", "params": "parameters", "size": "bytes", "memory": "activation bytes"}
    return f"{100 * share:.1f} % of the original's {names[setup.metric]} are left"


def is_slower(target_share: float, before: ModelSummary, after: ModelSummary) -> bool:
    """Whether the measured latency misses the target by more than its spread."""
    share, spread = latency_share(before, after)
    return share - spread > target_share


def latency_share(before: ModelSummary, after: ModelSummary) -> tuple[float, float]:
    """Measured latency after over before, and how far the spreads of both can move it."""
    assert before.latency_ms is not None
    assert after.latency_ms is not None
    share = after.latency_ms / before.latency_ms
    spreads = ((m.latency_spread_ms or 0.0) / (m.latency_ms or 1.0) for m in (before, after))
    return share, share * sum(spreads)


def _write_model(work: Work, finished: Finished, record: RunRecord, protection: Protection) -> Path:
    setup = work.setup
    work.on_event(
        ev.StageStarted(stage="finish", round=0, detail="export" if protection.plain else "export, encrypt")
    )
    path = work.store.folder / (PLAIN_NAME if protection.plain else ENCRYPTED_NAME)
    manifest = manifest_of_run(
        record, architecture=architecture_of(setup.model, setup.study.model), plan=finished.plan,
        preprocessing=Preprocessing(mean=setup.data.mean, std=setup.data.std),
        class_names=setup.data.class_names,
    )  # fmt: skip
    write_artifact(
        path, model=finished.model, example_inputs=setup.example, manifest=manifest, graph=setup.graph,
        protection=protection,
    )  # fmt: skip
    return path


def _tell_epoch(work: Work, epoch: EpochRecord, epochs: float) -> None:
    work.on_event(
        ev.EpochFinished(
            round=0, trial=None, epoch=epoch.epoch, epochs=epochs, lr=epoch.lr,
            train_loss=epoch.train_loss, images_per_s=epoch.images_per_s,
        )
    )  # fmt: skip
