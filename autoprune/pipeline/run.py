"""The whole of `autoprune run` in one file: check, measure, then rounds until done, then deliver.

One round is: analyse the model it starts from, plan what it may spend, search (prune, fine-tune and score
trial after trial), and let the controller decide. Every decision is stored before it is acted on, so that
this function, called again with `resume`, goes on where a process was stopped.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path

import optuna

from autoprune import events as ev
from autoprune.config import Protection, Study
from autoprune.data import derive_seed
from autoprune.errors import RunError
from autoprune.location import RunLocation
from autoprune.pipeline.baseline import NO_SOURCES, is_measured, start_run
from autoprune.pipeline.delivery import deliver
from autoprune.pipeline.preflight import prepare, thread_limit, trace_for_study
from autoprune.pruning import SensitivityPoint, SensitivityTable, max_num_points, sensitivity
from autoprune.record import RunResult, SensitivityCell
from autoprune.report import annotate_studies
from autoprune.search import (
    Allotment,
    Decision,
    DecisionEntry,
    Problem,
    RoundBudget,
    RoundContext,
    RoundEntry,
    RoundOutcome,
    RoundSearch,
    RoundStart,
    RunContext,
    Speed,
    State,
    allot_round,
    checkpoint_of,
    decide,
    is_near,
    load_points,
    measured_speed,
    probe_speed,
    read_round,
    read_trials,
    replay,
    round_floor,
    round_outcomes,
    rounds_ahead,
    same_failure,
    search_round,
    should_tune_near_miss,
    starting_points,
    store_point,
    trial_summaries,
)
from autoprune.storage import (
    CHECKPOINT,
    FINAL,
    CheckpointCipher,
    Member,
    RunStore,
    completed_trials,
    count_working,
    has_run,
    join_run,
    quiet_optuna,
    run_cipher,
    set_attrs,
)
from autoprune.structure import densify, verify, with_latency_model


def run(  # noqa: PLR0913 - the whole product: each argument is a decision of its caller
    study: Study,
    *,
    out: Path | str | RunLocation | None = None,
    resume: bool = False,
    protection: Protection = Protection(),  # noqa: B008 - frozen, never changed
    on_event: ev.OnEvent = ev.ignore_event,
    command: str = "",
    sources: Mapping[str, str] = NO_SOURCES,
) -> RunResult:
    """Prune the study's network to its target, and deliver the result into a folder.

    Args:
        study: the network, the data, the target and the settings.
        out: the place where the run is kept, by default the folder `runs/NAME`; it must be empty or new.
        resume: go on with the run in `out`, or start one where there is none.
        protection: who can open the delivered file; by default your own key, made on first use.
        on_event: called with everything that happens, in order.
        command: the command line that makes this run again, for the report and for workers.
        sources: SHA-256 of the files that the command names, which a worker compares.

    Raises:
        UsageError: something is wrong with what was given; nothing was written.
        RunLockedError: another process coordinates this run.
        RunError: the run cannot go on; what was finished is kept.
    """
    location = (
        out if isinstance(out, RunLocation) else RunLocation(folder=Path(out or Path("runs") / study.name))
    )
    resume = resume and has_run(location, study.name)
    cipher = run_cipher(protection)
    problem = prepare(study, out=location, resume=resume, protection=protection)
    with (
        quiet_optuna(),
        thread_limit(study, problem.graph),
        _coordinated(location, study.name, cipher) as member,
    ):
        store = member.store
        on_event(_run_started(problem, location.folder, resume=resume))
        context = replace(start_run(problem, store, on_event, command, sources), member=member)
        state = replay(context.goal, study.control, round_outcomes(store))
        while state.ended is None:
            start = load_round_start(context, state)
            search, round_study = analyze(context, state, start)  # Analysis
            annotate_studies(store)  # the round that begins, and the one that was just decided
            search_round(search, round_study, starting_points(search))  # Pruning and Fine-tuning
            state = decide_round(search, round_study).state
        result = deliver(context, state, protection)  # Transformation
        store.delete_checkpoints_except(_checkpoints_of_result(store, state))
        return result


def load_round_start(run: RunContext, state: State) -> RoundStart:
    """Return the dense network that the next round starts from, with its graph."""
    problem, current = run.problem, state.current
    checkpoint = run.store.load_checkpoint(checkpoint_of(run.store, current.round, current.trial))
    model = densify(problem.original, problem.graph, checkpoint.plan)
    checkpoint.load_into_(model)
    graph = trace_for_study(problem.study, model, problem.example).with_bounds_of(problem.graph)
    if problem.metric == "latency":
        beside = (problem.original, problem.original_cost)
        graph = with_latency_model(graph, model, problem.example, problem.device, beside=beside)
    return RoundStart(model=model, graph=graph, plan=checkpoint.plan)


def analyze(run: RunContext, state: State, start: RoundStart) -> tuple[RoundSearch, optuna.Study]:
    """Measure how fragile each group is, and fix what the round may try and spend.

    An earlier attempt that started from the same model was analysed already; a round that was stopped has its
    entry already.
    """
    number = state.round + 1
    study = next((s for n, s in enumerate(run.store.rounds(), 1) if n == number), None)
    if study is not None and run.is_coordinator and _all_failed_alike(study):
        run.store.delete_study(number)  # what made all of its trials fail may be mended by now
        study = None
    if study is None:
        study = _create_round(run, state, start)
    entry = read_round(study)
    run.on_event(
        ev.RoundStarted(
            round=number, started_from=entry.started_from, ceiling=entry.ceiling, floor=entry.floor,
            trials=entry.trials, epochs=entry.epochs, cost_share=entry.cost_share,
        )
    )  # fmt: skip
    run.on_event(ev.StageStarted(stage="search", round=number, detail=f"{entry.trials} trials"))
    context = RoundContext(
        problem=run.problem, start=start, target_cost=_target_cost(run),
        table=entry.sensitivity_table(), seed=derive_seed(run.problem.study.seed, number),
    )  # fmt: skip
    search = RoundSearch(run=run, context=context, entry=entry, state=state, speed=_speed(run, start))
    return search, study


def decide_round(search: RoundSearch, study: optuna.Study) -> Decision:
    """Let the controller decide, verify the promoted network, and store the decision.

    Raises:
        RunError: all trials failed in the same way.
    """
    run, number = search.run, search.entry.number
    if (failure := same_failure(study)) is not None:
        raise RunError(
            f"all trials of round {number} failed in the same way: {failure}",
            "mend that; the same command with --resume tries the round again",
        )
    outcome = RoundOutcome(trials=trial_summaries(study), budget_left=_has_budget_left(search, study))
    decision = decide(run.goal, run.problem.study.control, search.state, outcome)
    if decision.promoted is not None:
        problem = run.problem
        plan = run.store.load_checkpoint(checkpoint_of(run.store, number, decision.promoted)).plan
        verify(problem.original, problem.graph, plan, problem.example)
    run.store.guard()
    entry = DecisionEntry(
        budget_left=outcome.budget_left, promoted=decision.promoted, reason=decision.reason,
        action=decision.action,
    )  # fmt: skip
    set_attrs(study, **vars(entry))
    _delete_losers(run, study, decision)
    current = decision.state.current
    run.on_event(
        ev.RoundDecided(
            round=number, action=decision.action, reason=decision.reason,
            ceiling=decision.state.ceiling, cost_share=current.cost_share, top1=current.top1,
        )
    )  # fmt: skip
    return decision


@contextmanager
def _coordinated(location: RunLocation, name: str, cipher: CheckpointCipher | None) -> Iterator[Member]:
    """Open the run's store as its only coordinator.

    A run that ends before its original was measured leaves nothing behind.
    """
    is_new = not location.folder.exists()
    location.folder.mkdir(parents=True, exist_ok=True)
    store, joined = RunStore(location, name, create=True, cipher=cipher), False
    try:
        with join_run(store, "coordinator") as member:
            joined = True
            store.guard_with(member.check)
            yield member
    finally:
        is_worth_keeping = not joined or is_measured(store)
        store.close()
        if not is_worth_keeping:
            store.erase()
            if is_new:
                location.folder.rmdir()


def _run_started(problem: Problem, out: Path, *, resume: bool) -> ev.RunStarted:
    study = problem.study
    return ev.RunStarted(
        name=study.name, out=out, target=study.target, max_drop_pp=study.max_drop, budget=study.budget,
        device=str(problem.device), resumed=resume,
    )  # fmt: skip


def _target_cost(run: RunContext) -> float:
    """Return what the result may cost; a resumed run has measured the original's latency anew."""
    if run.problem.metric == "latency":
        return run.goal.target_share * run.problem.original_cost
    return run.problem.target_cost


def _all_failed_alike(study: optuna.Study) -> bool:
    """Return whether all trials of a round were run, and failed in the same way."""
    return len(completed_trials(study)) >= read_round(study).trials and same_failure(study) is not None


def _create_round(run: RunContext, state: State, start: RoundStart) -> optuna.Study:
    """Analyse where that is still to be done, then fix the round's ceiling, floor, trials and epochs."""
    number, current = state.round + 1, state.current
    table = _earlier_table(run, state, start)
    groups = f"{len(start.graph.groups)} groups" + ("" if table is None else ", known from before")
    run.on_event(ev.StageStarted(stage="analysis", round=number, detail=groups))
    began, seconds = time.perf_counter(), 0.0
    if table is None:
        table = _measure_sensitivity(run, state, start)
        seconds = time.perf_counter() - began
    budget = _round_budget(run, state, start, seconds)
    entry = RoundEntry(
        number=number,
        started_from=current.round,
        checkpoint=checkpoint_of(run.store, current.round, current.trial),
        ceiling=state.ceiling,
        floor=round_floor(run.goal, state),
        cost_share=current.cost_share,
        trials=budget.trials,
        epochs=budget.epochs,
        sensitivity=_cells(table),
        table=table.to_json(),
        analysis_seconds=seconds,
    )
    return run.store.create_study(number, vars(entry))


def _round_budget(run: RunContext, state: State, start: RoundStart, analysis_s: float) -> RoundBudget:
    """Return the round's trials and epochs: its part of what the final tuning and later analyses leave."""
    heuristics = run.problem.heuristics
    rounds = rounds_ahead(state, run.goal.target_share)
    remaining = run.budget.remaining(reserve=heuristics.final_share)
    # An analysis that takes too large a part of the time is not repeated: see `_earlier_table`.
    is_repeated = analysis_s <= heuristics.analysis_share * remaining.seconds
    later_s = analysis_s * (rounds - 1) if is_repeated else 0.0
    allotment = Allotment(
        remaining=remaining,
        speed=replace(_speed(run, start), analysis_s=later_s / rounds),
        rounds=rounds,
        epochs_scale=state.epochs_scale,
        min_epochs=_worthwhile_epochs(run),
        workers=max(1, count_working(run.store)),
    )
    return allot_round(allotment, run.problem.study.search, heuristics)


def _has_budget_left(search: RoundSearch, study: optuna.Study) -> bool:
    """Return whether another round is affordable, and worth more than tuning the best model."""
    run = search.run
    epochs = search.settings.epochs or _worthwhile_epochs(run)
    affordable = run.budget.affords(
        search.speed.trial_seconds(epochs), epochs, reserve=search.heuristics.final_share
    )
    # A round without any trial was too expensive already: lowering its ceiling would change nothing.
    return affordable and not should_tune_near_miss(search, study) and bool(study.get_trials(deepcopy=False))


def _worthwhile_epochs(run: RunContext) -> float:
    """Return the epochs below which a trial is not worth running, from what the trials so far took."""
    needed = [t.rungs[-1].epochs for s in run.store.rounds() for t in read_trials(s) if t.rungs]
    heuristics = run.problem.heuristics
    return max(heuristics.min_epochs, heuristics.worthwhile_share * max(needed, default=0.0))


def _measure_sensitivity(run: RunContext, state: State, start: RoundStart) -> SensitivityTable:
    """Measure the table of the round's start, without the points that a stopped process measured."""
    problem, current = run.problem, state.current
    analysis, heuristics = problem.study.analysis, problem.heuristics
    baseline, checkpoint = run.store.study(0), checkpoint_of(run.store, current.round, current.trial)
    assert baseline is not None
    earlier = load_points(baseline, checkpoint)
    if earlier is None and analysis.known is not None and current.round == 0:
        earlier = SensitivityTable.from_json(Path(analysis.known).read_text(encoding="utf-8"))
    total = max_num_points(start.graph, analysis.ratios, exact=analysis.exact)
    num_points = count(1 + (len(earlier.points) if earlier else 0))

    def on_point(point: SensitivityPoint) -> None:
        store_point(baseline, checkpoint, point)
        detail = f"{point.group} without {100 * point.ratio:.0f} %: {-point.drop_pp:+.1f} pp"
        run.on_event(
            ev.StageProgress(
                stage="analysis", round=state.round + 1, done=next(num_points), total=total, detail=detail
            )
        )

    remaining = run.budget.remaining(reserve=heuristics.final_share)
    return sensitivity(
        start.model, start.graph, problem.data.search, settings=analysis,
        calibration=problem.data.train, device=problem.device, task=problem.task, on_point=on_point,
        known=earlier, seconds=heuristics.analysis_share * remaining.seconds,
    )  # fmt: skip


def _cells(table: SensitivityTable) -> tuple[SensitivityCell, ...]:
    return tuple(
        SensitivityCell(
            group=p.group, ratio=p.ratio, drop_pp=p.drop_pp, low_pp=p.low_pp, high_pp=p.high_pp,
            macs_share_removed=p.macs_share_removed,
        )
        for p in table.points
    )  # fmt: skip


def _speed(run: RunContext, start: RoundStart) -> Speed:
    """Return the speed of the last trials where there are any; it is probed only where time is limited."""
    measured = measured_speed(run.store)
    if measured is not None:
        return measured
    if run.budget.budget.seconds is None:
        return Speed(epoch_s=1.0, trial_s=0.0, analysis_s=0.0)
    return probe_speed(run.problem, start)


def _earlier_table(run: RunContext, state: State, start: RoundStart) -> SensitivityTable | None:
    """Return the table of an earlier attempt from the same model, or the last one where time is short."""
    entries = [read_round(study) for study in run.store.rounds()]
    for entry in entries:
        if entry.started_from == state.current.round:
            return entry.sensitivity_table()
    heuristics = run.problem.heuristics
    seconds = max((e.analysis_seconds for e in entries), default=0.0)
    remaining = run.budget.remaining(reserve=heuristics.final_share)
    if not entries or seconds <= heuristics.analysis_share * remaining.seconds:
        return None
    table = entries[-1].sensitivity_table()
    if {g.name for g in start.graph.groups} - {p.group for p in table.points}:
        return None
    run.on_event(ev.Note(message="the last round's analysis is used again: the budget affords no new one"))
    return table


def _checkpoints_of_result(store: RunStore, state: State) -> set[str]:
    """Return the checkpoints of the models that lead to the result, and the result's own."""
    final = store.study(FINAL)
    assert final is not None
    path = {checkpoint_of(store, p.round, p.trial) for p in (*state.path, state.best)}
    return path | {checkpoint_of(store, 0, 0), completed_trials(final)[0].user_attrs[CHECKPOINT]}


def _delete_losers(run: RunContext, study: optuna.Study, decision: Decision) -> None:
    """Remove the models that no round can start from and that cannot be delivered.

    Of those below the floor, the best of the round stays for the end of the run (`search.near_miss`).
    """
    state, number, heuristics = decision.state, decision.state.round, run.problem.heuristics
    needed = {(p.round, p.trial) for p in (*state.path, state.best)}
    below = [
        t for t in trial_summaries(study) if t.top1 < run.goal.floor and is_near(run.goal, t.top1, heuristics)
    ]
    if below:
        needed.add((number, max(below, key=lambda t: t.top1).number))
    needed_ids = {checkpoint_of(run.store, r, t) for r, t in needed}
    for trial in completed_trials(study):
        artifact = trial.user_attrs.get(CHECKPOINT)
        # Equal weights have one checkpoint, so that a needed one may be a loser's too.
        if artifact and (number, trial.number) not in needed and artifact not in needed_ids:
            run.store.delete_checkpoint(artifact)
