"""The end of a run: tune the best model once more, make it from the original, measure, export, report.

The best model is the deepest inside the floor, whether it reached the target or not; both are delivered the
same way. This is the one place besides `baseline` where the test split is read.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from autoprune import events as ev
from autoprune.artifact import Preprocessing, architecture_of, manifest_of_run, write_artifact
from autoprune.config import Protection
from autoprune.data import Split, derive_seed
from autoprune.errors import TrialError
from autoprune.formatting import percent
from autoprune.metrics import Evaluation, difference_pp
from autoprune.pipeline.measurement import measure_latency, summarise, with_latency
from autoprune.plan import PruningPlan
from autoprune.record import Difference, ModelSummary, Outcome, RunRecord, RunResult, Tuning
from autoprune.report import annotate_studies, write_report
from autoprune.search import (
    FinalEntry,
    Problem,
    Promotion,
    RunContext,
    State,
    TrialParams,
    best_near_miss,
    checkpoint_of,
    epoch_points,
    final_lr,
    measured_speed,
    read_baseline,
    read_final,
    read_run,
    read_trials,
    report_budget,
    round_record,
    unpack_bits,
    with_recovered,
)
from autoprune.storage import CHECKPOINT, FINAL, completed_trials
from autoprune.structure import densify, verify
from autoprune.training import EpochRecord, evaluate, finetune_

FINAL_SEED = 1 << 20  # far from any round's number
PLAIN_NAME, ENCRYPTED_NAME = "model.autoprune", "model.autoprune.age"


@dataclass(frozen=True, kw_only=True, eq=False)
class FinalModel:
    """The model to deliver: dense, with the plan that leads to it from the original."""

    model: nn.Module
    plan: PruningPlan
    search_top1: float
    tuned_epochs: float
    tuning: Tuning | None = None


def deliver(run: RunContext, state: State, protection: Protection) -> RunResult:
    """Finish the run: write everything that a user gets.

    Raises:
        VerificationError: the dense model does not compute what the masked original computes.
        ArtifactError: the delivered file cannot be written.
    """
    if run.store.study(FINAL) is None:
        began = time.perf_counter()
        state, final = _finish(run, state)
        _store_final(run, state, final, began)
    else:
        final = _load_final(run)
    record = read_run(run.store)
    model_file = _write_model(run, final, record, protection)
    report = write_report(record, run.store.folder)
    annotate_studies(run.store)
    assert record.after is not None
    assert record.outcome is not None
    run.on_event(
        ev.RunFinished(
            outcome=record.outcome, before=record.before, after=record.after, out=run.store.folder,
            files=(model_file, report),
        )
    )  # fmt: skip
    return RunResult(
        reached=record.outcome.reached, stopped_by=record.outcome.stopped_by, message=record.outcome.message,
        before=record.before, after=record.after, out=run.store.folder, model_file=model_file,
        report=report, record=record,
    )  # fmt: skip


def _finish(run: RunContext, state: State) -> tuple[State, FinalModel]:
    """Return the best model, tuned once more where that helps, made from the original and verified."""
    if state.ended != "target" and (recovered := _tune_near_miss(run, state)) is not None:
        return recovered
    model = _rebuild(run, state.best)
    return state, _tune(run, state.best, model) if state.best.round else model


def _tune_near_miss(run: RunContext, state: State) -> tuple[State, FinalModel] | None:
    """Return a deeper model that missed the floor, if what is left of the budget brings it back there."""
    heuristics, epochs = run.problem.heuristics, _affordable_epochs(run)
    rounds = [round_record(study) for study in run.store.rounds()]
    stored = {(r.number, t) for r in rounds for t in _trials_with_checkpoint(run, r.number)}
    near = [replace(r, trials=tuple(t for t in r.trials if (r.number, t.number) in stored)) for r in rounds]
    if epochs < heuristics.min_epochs:
        return None
    miss = best_near_miss(run.goal, state, near, epochs, heuristics)
    if miss is None:
        return None
    name, top1 = f"trial {miss.model.trial} of round {miss.model.round}", percent(miss.model.top1, 2)
    run.on_event(ev.Note(message=f"{name} missed the floor with {top1}: it gets what is left of the budget"))
    final = _tune(run, miss.model, _rebuild(run, miss.model))
    if final.search_top1 < run.goal.floor:
        run.on_event(ev.Note(message=f"it ended with {percent(final.search_top1, 2)}: left out"))
        return None
    return with_recovered(run.goal, state, replace(miss.model, top1=final.search_top1)), final


def _trials_with_checkpoint(run: RunContext, number: int) -> list[int]:
    study = run.store.study(number)
    assert study is not None
    artifacts = {t.number: t.user_attrs.get(CHECKPOINT) for t in completed_trials(study)}
    return [n for n, artifact in artifacts.items() if artifact and run.store.has_checkpoint(artifact)]


def _rebuild(run: RunContext, promoted: Promotion) -> FinalModel:
    """Make a trial's model from the original, and verify that it computes the same as the masked one."""
    problem = run.problem
    checkpoint = run.store.load_checkpoint(checkpoint_of(run.store, promoted.round, promoted.trial))
    model = densify(problem.original, problem.graph, checkpoint.plan)
    checkpoint.load_into_(model)
    if promoted.round:
        verify(problem.original, problem.graph, checkpoint.plan, problem.example)
    return FinalModel(model=model, plan=checkpoint.plan, search_top1=promoted.top1, tuned_epochs=0.0)


def _tune(run: RunContext, best: Promotion, untuned: FinalModel) -> FinalModel:
    """Fine-tune a model with all that is left of the budget; return the better of before and after."""
    problem, study, heuristics = run.problem, run.problem.study, run.problem.heuristics
    round_study = run.store.study(best.round)
    assert round_study is not None
    epochs = _affordable_epochs(run)
    if epochs < heuristics.min_epochs:
        return untuned
    run.on_event(ev.StageStarted(stage="finish", round=0, detail=f"tune {epochs:.3g} epochs"))
    params = TrialParams.from_optuna(round_study.trials[best.trial].params)
    trial = next(t for t in read_trials(round_study) if t.number == best.trial)
    lr = final_lr(params.lr, trial.rungs, epochs, study.search.lr, heuristics)
    model = copy.deepcopy(untuned.model)
    try:
        curve = finetune_(
            model, problem.data.train, schedule=replace(params, lr=lr).schedule(study.finetune.warmup),
            settings=study.finetune, epochs=epochs, seed=derive_seed(study.seed, FINAL_SEED),
            device=problem.device, teacher=problem.original, task=problem.task,
            seconds=run.budget.remaining().seconds, on_epoch=lambda e: _report_epoch(run, e, epochs),
        )  # fmt: skip
    except TrialError as error:
        run.on_event(ev.Note(message=f"the final tuning was left out: {error.message}"))
        return untuned
    run.budget.spend(epochs)
    report_budget(run.budget, run.on_event)
    top1 = problem.evaluate_on_search(model).top1
    is_better = top1 >= untuned.search_top1
    tuning = Tuning(epochs=epoch_points(curve), before=untuned.search_top1, search_top1=top1, kept=is_better)
    if not is_better:
        scores = f"{percent(top1, 2)}, less than {percent(untuned.search_top1, 2)}"
        run.on_event(ev.Note(message=f"the final tuning gave top-1 {scores}: left out"))
        return replace(untuned, tuning=tuning)
    return replace(untuned, model=model, search_top1=top1, tuned_epochs=epochs, tuning=tuning)


def _affordable_epochs(run: RunContext) -> float:
    """Return the epochs that the whole of the remaining budget buys."""
    remaining, speed, heuristics = run.budget.remaining(), measured_speed(run.store), run.problem.heuristics
    by_time = heuristics.time_safety * remaining.seconds / speed.epoch_s if speed else 0.0
    return min(heuristics.max_epochs, by_time, remaining.epochs)


def _store_final(run: RunContext, state: State, final: FinalModel, began: float) -> None:
    """Measure the model to deliver, and store it as the run's final study."""
    run.on_event(ev.StageStarted(stage="finish", round=0, detail="test, measure latency"))
    before, after, difference = _before_and_after(run, final)
    entry = FinalEntry(
        before=before,
        after=after,
        difference=difference,
        outcome=_outcome(run.problem, state, final, before, after),
        started_from=state.best.round,
        tuned_epochs=final.tuned_epochs,
        tuning=final.tuning,
        seconds=time.perf_counter() - began,
    )
    checkpoint = run.store.save_checkpoint(final.model, final.plan)
    run.store.create_study(FINAL, vars(entry), (checkpoint, final.search_top1))


def _load_final(run: RunContext) -> FinalModel:
    """Return the final model that an earlier process finished."""
    study, entry = run.store.study(FINAL), read_final(run.store)
    assert study is not None
    assert entry is not None
    trial = completed_trials(study)[0]
    checkpoint = run.store.load_checkpoint(trial.user_attrs[CHECKPOINT])
    model = densify(run.problem.original, run.problem.graph, checkpoint.plan)
    checkpoint.load_into_(model)
    assert trial.value is not None
    return FinalModel(
        model=model, plan=checkpoint.plan, search_top1=trial.value, tuned_epochs=entry.tuned_epochs
    )


def _before_and_after(run: RunContext, final: FinalModel) -> tuple[ModelSummary, ModelSummary, Difference]:
    """Read the test split for the second and last time, and time both models in turns."""
    problem, baseline = run.problem, read_baseline(run.store)
    first = baseline.before
    test = _evaluate(problem, final.model, problem.data.test)
    original = Evaluation(
        top1=first.top1, loss=0.0, num_samples=first.num_samples,
        correct=unpack_bits(baseline.test_correct, first.num_samples),
    )  # fmt: skip
    delta, interval = difference_pp(test, original)
    latencies = measure_latency(problem.original, final.model, problem.example, problem.device)
    after = summarise(final.model, problem.graph.cost(final.plan), test, final.search_top1)
    difference = Difference(delta_pp=delta, low_pp=interval.low, high_pp=interval.high)
    return with_latency(first, latencies[0]), with_latency(after, latencies[1]), difference


def _evaluate(problem: Problem, model: nn.Module, split: Split) -> Evaluation:
    return evaluate(model, split, device=problem.device, task=problem.task)


def _outcome(
    problem: Problem, state: State, final: FinalModel, before: ModelSummary, after: ModelSummary
) -> Outcome:
    study, share = problem.study, state.best.cost_share
    left = _cost_left(problem, share, before, after)
    target = f"asked for {100 * problem.target_share:.1f} %"
    if (
        state.ended == "target"
        and problem.metric == "latency"
        and is_slower(problem.target_share, before, after)
    ):
        message = (
            f"The target {study.target} is not reached, though its prediction is: {left} ({target}); ask for "
            "less than you need, or run on a machine that does nothing else."
        )
        return Outcome(reached=False, stopped_by="target", message=message)
    if state.ended == "target":
        accuracy = f"top-1 {percent(final.search_top1, 2)} on the search split"
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
    result = "nothing could be removed" if state.best.round == 0 else left
    message = f"The target {study.target} is not reached: {why} where {result} ({target}); {change}."
    return Outcome(reached=False, stopped_by=state.ended, message=message)


def _cost_left(problem: Problem, share: float, before: ModelSummary, after: ModelSummary) -> str:
    """Return in words which share of the original's cost is left; a latency as predicted and as measured."""
    if problem.metric == "latency":
        measured, spread = latency_share(before, after)
        return (
            f"predicted {100 * share:.1f} %, measured {100 * measured:.1f} % of the original's latency "
            f"(spread {100 * spread:.1f} %)"
        )
    names = {"macs": "MACs", "params": "parameters", "size": "bytes", "memory": "activation bytes"}
    return f"{100 * share:.1f} % of the original's {names[problem.metric]} are left"


def is_slower(target_share: float, before: ModelSummary, after: ModelSummary) -> bool:
    """Return whether the measured latency misses the target by more than its spread."""
    share, spread = latency_share(before, after)
    return share - spread > target_share


def latency_share(before: ModelSummary, after: ModelSummary) -> tuple[float, float]:
    """Return the latency after as a share of that before, and how far the spreads of both can move it."""
    assert before.latency_ms is not None
    assert after.latency_ms is not None
    share = after.latency_ms / before.latency_ms
    spreads = ((m.latency_spread_ms or 0.0) / (m.latency_ms or 1.0) for m in (before, after))
    return share, share * sum(spreads)


def _write_model(run: RunContext, final: FinalModel, record: RunRecord, protection: Protection) -> Path:
    problem = run.problem
    run.on_event(
        ev.StageStarted(stage="finish", round=0, detail="export" if protection.plain else "export, encrypt")
    )
    path = run.store.folder / (PLAIN_NAME if protection.plain else ENCRYPTED_NAME)
    manifest = manifest_of_run(
        record, architecture=architecture_of(problem.original, problem.study.model), plan=final.plan,
        preprocessing=Preprocessing(mean=problem.data.mean, std=problem.data.std),
        class_names=problem.data.class_names,
    )  # fmt: skip
    write_artifact(
        path, model=final.model, example_inputs=problem.example, manifest=manifest, graph=problem.graph,
        protection=protection,
    )  # fmt: skip
    return path


def _report_epoch(run: RunContext, epoch: EpochRecord, epochs: float) -> None:
    run.on_event(
        ev.EpochFinished(
            round=0, trial=None, epoch=epoch.epoch, epochs=epochs, lr=epoch.lr,
            train_loss=epoch.train_loss, images_per_s=epoch.images_per_s,
        )
    )  # fmt: skip
