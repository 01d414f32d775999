"""The whole of `autoprune run` in one file: measure, analyse, prune, fine-tune, decide, until done; deliver.

The truth is in the store (`store`, `history`): a run that was stopped goes on by replaying its decided
rounds and finishing the undecided one. How a round is searched is in `search`, how one trial works in
`trial`, what the decisions are in `controller`, and what is delivered in `delivery`.
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
from autoprune.pipeline.baseline import NONE, Work, begin, is_measured
from autoprune.pipeline.delivery import deliver
from autoprune.pipeline.preflight import Setup, fitting_threads, prepare, traced
from autoprune.pruning import SensitivityPoint, SensitivityTable, max_num_points, sensitivity
from autoprune.record import RunResult, SensitivityCell
from autoprune.report import annotate_studies
from autoprune.search import (
    FINAL_SHARE,
    MIN_EPOCHS,
    Decision,
    Effort,
    Ground,
    Point,
    RoundJob,
    RoundOutcome,
    RoundPlan,
    Speed,
    State,
    checkpoint_of,
    decide,
    first_points,
    floor_of_round,
    is_near,
    keep_point,
    kept_points,
    measured_speed,
    next_points,
    outcomes,
    plan_round,
    probe_speed,
    read_plan,
    read_trials,
    replay,
    rounds_ahead,
    same_failure,
    search_round,
    should_tune_near_miss,
    summaries,
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
from autoprune.tasks import task_of

WORTHWHILE = 0.5  # of the longest trials' epochs: shorter ones are not worth a round; a guess
ANALYSIS_PART = 0.25  # of the time left: there an analysis is cut short, and not made again; a guess


def run(  # noqa: PLR0913 - the whole product: each argument is a decision of its caller
    study: Study,
    *,
    out: Path | str | RunLocation | None = None,
    resume: bool = False,
    protection: Protection = Protection(),  # noqa: B008 - frozen, never changed
    on_event: ev.OnEvent = ev.ignore_event,
    command: str = "",
    sources: Mapping[str, str] = NONE,
) -> RunResult:
    """Prune the study's network to its target, and deliver the result into a folder.

    Args:
        study: what to do.
        out: where the run is kept, the folder `runs/NAME` by default; it must not hold anything yet.
        resume: go on with the run in `out`, or start it where there is none.
        protection: who can open the delivered file; by default your own key, made on first use.
        on_event: told of everything that happens.
        command: what to type to make this run again, for the report and for workers.
        sources: SHA-256 of the files that the command names, which a worker compares.

    Raises:
        UsageError: something is wrong with what was given; nothing was written.
        HeldError: another process coordinates this run.
        RunError: the run cannot go on; what was finished is kept.
    """
    location = (
        out if isinstance(out, RunLocation) else RunLocation(folder=Path(out or Path("runs") / study.name))
    )
    resume = resume and has_run(location, study.name)
    cipher = run_cipher(protection)
    setup = prepare(study, out=location, resume=resume, protection=protection)
    with quiet_optuna(), fitting_threads(setup), _led(location, study.name, cipher) as me:
        store = me.store
        on_event(_run_started(setup, location.folder, resume=resume))
        work = replace(begin(setup, store, on_event, command, sources), me=me)
        state = replay(work.goal, study.control, outcomes(store))
        while state.ended is None:
            ground = stand(work, state)
            job, attempt = analyse(work, state, ground)  # Analysis
            annotate_studies(store)  # the round that begins, and the one that was just decided
            search_round(job, attempt, known_points(job))  # Pruning and Fine-tuning
            state = judge(work, job, attempt).state
        result = deliver(work, state, protection)  # Transformation
        store.delete_checkpoints_except(_needed(store, state))
        return result


def stand(work: Work, state: State) -> Ground:
    """The dense network that the next round starts from, with its graph."""
    setup, start = work.setup, state.current
    checkpoint = work.store.load_checkpoint(checkpoint_of(work.store, start.round, start.trial))
    model = densify(setup.model, setup.graph, checkpoint.plan)
    checkpoint.load_into_(model)
    graph = traced(setup.study, model, setup.example).with_bounds_of(setup.graph)
    target_cost = setup.target_cost
    if setup.metric == "latency":
        beside = (setup.model, setup.original_cost)
        graph = with_latency_model(graph, model, setup.example, setup.device, beside=beside)
        target_cost = work.goal.target_share * setup.original_cost  # a resumed run measured it anew
    return Ground(
        study=setup.study, data=setup.data, device=setup.device, metric=setup.metric,
        original=setup.model, original_cost=setup.original_cost, target_cost=target_cost,
        model=model, graph=graph, plan=checkpoint.plan, table=None,
        seed=derive_seed(setup.study.seed, state.round + 1), example=setup.example,
    )  # fmt: skip


def analyse(work: Work, state: State, ground: Ground) -> tuple[RoundJob, optuna.Study]:
    """Measure how fragile each group is, and plan the round by what that and the budget say.

    An earlier attempt that started from the same model was analysed already; a round that was stopped is
    planned already.
    """
    number = state.round + 1
    attempt = next((a for n, a in enumerate(work.store.rounds(), 1) if n == number), None)
    if attempt is not None and work.leads and _was_in_vain(attempt):
        work.store.delete_study(number)  # what made all its trials fail may be mended
        attempt = None
    table = _known_table(work, state, ground) if attempt is None else _table_of(attempt)
    if attempt is None:
        groups = f"{len(ground.graph.groups)} groups" + ("" if table is None else ", known from before")
        work.on_event(ev.StageStarted(stage="analysis", round=number, detail=groups))
        attempt, table = _plan_round(work, state, ground, table)
    plan = read_plan(attempt)
    work.on_event(
        ev.RoundStarted(
            round=number, started_from=plan.started_from, ceiling=plan.ceiling, floor=plan.floor,
            trials=plan.trials, epochs=plan.epochs, cost_share=plan.cost_share,
        )
    )  # fmt: skip
    work.on_event(ev.StageStarted(stage="search", round=number, detail=f"{plan.trials} trials"))
    job = RoundJob(
        ground=replace(ground, table=table), plan=plan, goal=work.goal, state=state, store=work.store,
        meter=work.meter, speed=_speed(work, ground), on_event=work.on_event, me=work.me,
    )  # fmt: skip
    return job, attempt


def _was_in_vain(attempt: optuna.Study) -> bool:
    """Whether all trials of a round were run, and failed in the same way."""
    return len(completed_trials(attempt)) >= read_plan(attempt).trials and same_failure(attempt) is not None


def known_points(job: RoundJob) -> list[Point]:
    """What the round tries first: in a later round, what was best in the one before."""
    previous = job.store.study(job.plan.number - 1) if job.plan.number > 1 else None
    tried = [t for t in read_trials(previous) if t.top1 is not None] if previous is not None else []
    if not tried:
        return first_points(job.ground, job.space)
    best = next((t for t in tried if t.promoted), max(tried, key=lambda t: t.top1 or 0.0))
    return next_points(best.params, job.space)


def judge(work: Work, job: RoundJob, attempt: optuna.Study) -> Decision:
    """Let the controller decide, check the promoted network, and keep the decision.

    Raises:
        RunError: all trials failed in the same way.
    """
    if (failure := same_failure(attempt)) is not None:
        raise RunError(
            f"all trials of round {job.plan.number} failed in the same way: {failure}",
            "mend that; the same command with --resume tries the round again",
        )
    study = work.setup.study
    epochs = study.search.epochs or _worthwhile_epochs(work)
    enough = work.meter.affords(job.speed.trial_of(epochs), epochs)
    enough = enough and not should_tune_near_miss(job, attempt) and bool(attempt.get_trials(deepcopy=False))
    outcome = RoundOutcome(trials=summaries(attempt), budget_left=enough)
    decision = decide(work.goal, study.control, job.state, outcome)
    if decision.promoted is not None:
        plan = work.store.load_checkpoint(checkpoint_of(work.store, job.plan.number, decision.promoted)).plan
        verify(work.setup.model, work.setup.graph, plan, work.setup.example)
    work.store.guard()
    set_attrs(
        attempt, budget_left=outcome.budget_left, promoted=decision.promoted, reason=decision.reason,
        action=decision.action,
    )  # fmt: skip
    _forget_losers(work, attempt, decision)
    current = decision.state.current
    work.on_event(
        ev.RoundDecided(
            round=job.plan.number, action=decision.action, reason=decision.reason,
            ceiling=decision.state.ceiling, cost_share=current.cost_share, top1=current.top1,
        )
    )  # fmt: skip
    return decision


@contextmanager
def _led(location: RunLocation, name: str, cipher: CheckpointCipher | None) -> Iterator[Member]:
    """The run's store, coordinated by this process alone.

    A run that ends before its original was measured leaves nothing behind.
    """
    is_new = not location.folder.exists()
    location.folder.mkdir(parents=True, exist_ok=True)
    store, leads = RunStore(location, name, create=True, cipher=cipher), False
    try:
        with join_run(store, "coordinator") as me:
            leads = True
            store.guard_with(me.check)
            yield me
    finally:
        has_begun = not leads or is_measured(store)
        store.close()
        if not has_begun:
            store.erase()
            if is_new:
                location.folder.rmdir()


def _run_started(setup: Setup, out: Path, *, resume: bool) -> ev.RunStarted:
    study = setup.study
    return ev.RunStarted(
        name=study.name, out=out, target=study.target, max_drop_pp=study.max_drop, budget=study.budget,
        device=str(setup.device), resumed=resume,
    )  # fmt: skip


def _plan_round(
    work: Work, state: State, ground: Ground, table: SensitivityTable | None
) -> tuple[optuna.Study, SensitivityTable]:
    """Analyse where that is still to be done, then fix the round's ceiling, floor, trials and epochs."""
    number, began, took = state.round + 1, time.perf_counter(), 0.0
    if table is None:
        table = _sensitivity(work, state, number, ground)
        took = time.perf_counter() - began
    plan = RoundPlan(
        number=number,
        started_from=state.current.round,
        checkpoint=checkpoint_of(work.store, state.current.round, state.current.trial),
        ceiling=state.ceiling,
        floor=floor_of_round(work.goal, state),
        cost_share=state.current.cost_share,
        **vars(_effort(work, state, ground, took)),
        sensitivity=_cells(table),
        analysis_seconds=took,
    )
    return work.store.create_study(number, vars(plan) | {"table": table.to_json()}), table


def _effort(work: Work, state: State, ground: Ground, analysis_s: float) -> Effort:
    """The round's trials and epochs: its part of what the final tuning and later analyses leave."""
    rounds, left = rounds_ahead(state, work.goal.target_share), work.meter.left(keep=FINAL_SHARE)
    later_s = analysis_s * (rounds - 1) if analysis_s <= ANALYSIS_PART * left.seconds else 0.0
    speed = replace(_speed(work, ground), analysis_s=later_s / rounds)
    return plan_round(
        left, speed, work.setup.study.search, rounds, state.epochs_scale,
        at_least=_worthwhile_epochs(work), workers=max(1, count_working(work.store)),
    )  # fmt: skip


def _worthwhile_epochs(work: Work) -> float:
    """A trial of fewer epochs is not worth its while: so far longer ones were needed."""
    needed = [t.rungs[-1].epochs for a in work.store.rounds() for t in read_trials(a) if t.rungs]
    return max(MIN_EPOCHS, WORTHWHILE * max(needed, default=0.0))


def _sensitivity(work: Work, state: State, number: int, ground: Ground) -> SensitivityTable:
    """The table of the round's starting network; what a stopped process measured is not measured again."""
    study, analysis, current = work.setup.study, work.setup.study.analysis, state.current
    original, checkpoint = work.store.study(0), checkpoint_of(work.store, current.round, current.trial)
    assert original is not None
    known = kept_points(original, checkpoint)
    if known is None and analysis.known is not None and current.round == 0:
        known = SensitivityTable.from_json(Path(analysis.known).read_text(encoding="utf-8"))
    total = max_num_points(ground.graph, analysis.ratios, exact=analysis.exact)
    done = count(1 + (len(known.points) if known else 0))

    def on_point(point: SensitivityPoint) -> None:
        keep_point(original, checkpoint, point)
        detail = f"{point.group} without {100 * point.ratio:.0f} %: {-point.drop_pp:+.1f} pp"
        work.on_event(
            ev.StageProgress(stage="analysis", round=number, done=next(done), total=total, detail=detail)
        )

    return sensitivity(
        ground.model, ground.graph, ground.data.search, settings=analysis,
        calibration=ground.data.train, device=ground.device,
        task=task_of(study), on_point=on_point, known=known,
        seconds=ANALYSIS_PART * work.meter.left(keep=FINAL_SHARE).seconds,
    )  # fmt: skip


def _cells(table: SensitivityTable) -> tuple[SensitivityCell, ...]:
    return tuple(
        SensitivityCell(
            group=p.group, ratio=p.ratio, drop_pp=p.drop_pp, low_pp=p.low_pp, high_pp=p.high_pp,
            macs_share_removed=p.macs_share_removed,
        )
        for p in table.points
    )  # fmt: skip


def _speed(work: Work, ground: Ground) -> Speed:
    """From the last trials where there are any; a probe is taken only where time is limited."""
    known = measured_speed(work.store)
    if known is not None:
        return known
    if work.meter.budget.seconds is None:
        return Speed(epoch_s=1.0, trial_s=0.0, analysis_s=0.0)
    return probe_speed(ground)


def _known_table(work: Work, state: State, ground: Ground) -> SensitivityTable | None:
    """The analysis of an earlier attempt from the same model, or the last one where time is short."""
    attempts = list(work.store.rounds())
    for attempt in attempts:
        if read_plan(attempt).started_from == state.current.round:
            return _table_of(attempt)
    took = max((read_plan(a).analysis_seconds for a in attempts), default=0.0)
    if not attempts or took <= ANALYSIS_PART * work.meter.left(keep=FINAL_SHARE).seconds:
        return None
    table = _table_of(attempts[-1])
    if {g.name for g in ground.graph.groups} - {p.group for p in table.points}:
        return None
    work.on_event(ev.Note(message="the last round's analysis is used again: the budget affords no new one"))
    return table


def _table_of(attempt: optuna.Study) -> SensitivityTable:
    return SensitivityTable.from_json(attempt.user_attrs["table"])


def _needed(store: RunStore, state: State) -> set[str]:
    """The checkpoints of the models that lead to the result, and the result's."""
    final = store.study(FINAL)
    assert final is not None
    path = {checkpoint_of(store, p.round, p.trial) for p in (*state.path, state.best)}
    return path | {checkpoint_of(store, 0, 0), completed_trials(final)[0].user_attrs[CHECKPOINT]}


def _forget_losers(work: Work, attempt: optuna.Study, decision: Decision) -> None:
    """Remove the models that no round can start from and that cannot be delivered.

    Of those below the floor, the best of the round stays for the end of the run (`closing`).
    """
    state, number = decision.state, decision.state.round
    needed = {(p.round, p.trial) for p in (*state.path, state.best)}
    below = [t for t in summaries(attempt) if t.top1 < work.goal.floor and is_near(work.goal, t.top1)]
    if below:
        needed.add((number, max(below, key=lambda t: t.top1).number))
    losers = [t for t in completed_trials(attempt) if (number, t.number) not in needed]
    kept = {checkpoint_of(work.store, r, t) for r, t in needed}
    for trial in losers:
        if (artifact := trial.user_attrs.get(CHECKPOINT)) and artifact not in kept:
            work.store.delete_checkpoint(artifact)
