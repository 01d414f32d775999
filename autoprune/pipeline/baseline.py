"""The original: trained where the study asks for it, measured once, stored as `round-00`.

A run that is resumed, and a worker, read the original from there.

This is the one place besides `delivery` where the test split is read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from types import MappingProxyType

from autoprune import events as ev
from autoprune.data import derive_seed
from autoprune.errors import UsageError
from autoprune.pipeline.measurement import summarise
from autoprune.pipeline.preflight import environment, evaluate_original, plain_settings
from autoprune.plan import PruningPlan
from autoprune.record import FrozenPart, SplitSummary
from autoprune.search import (
    BaselineEntry,
    BudgetTracker,
    Goal,
    Problem,
    RunContext,
    checkpoint_of,
    pack_bits,
    read_baseline,
    report_budget,
    used_budget,
)
from autoprune.storage import RunStore
from autoprune.training import evaluate, train_baseline_

NO_SOURCES: Mapping[str, str] = MappingProxyType({})
# Settings that may change when a run is resumed; the data are compared by their digests.
MAY_CHANGE = ("budget", "device", "data")


def is_measured(store: RunStore) -> bool:
    """Return whether the original was measured and stored."""
    return store.study(0) is not None


def start_run(
    problem: Problem,
    store: RunStore,
    on_event: ev.OnEvent,
    command: str = "",
    sources: Mapping[str, str] = NO_SOURCES,
) -> RunContext:
    """Measure the original and store it, or load what an earlier process measured.

    Raises:
        UsageError: study, data or network are not those that the run was started with.
    """
    if is_measured(store):
        _load_original(problem, store)
    else:
        _measure(problem, store, on_event, command, sources)
    goal, used = read_baseline(store).goal, used_budget(store)
    cost = problem.graph.cost()
    on_event(
        ev.BaselineMeasured(
            top1=goal.baseline_top1, num_samples=len(problem.data.search), floor=goal.floor,
            metric=problem.metric, cost=problem.original_cost, target_share=goal.target_share,
            macs=cost.macs, params=cost.params,
        )
    )  # fmt: skip
    budget = BudgetTracker(problem.budget.counted(used.seconds), seconds=used.seconds, epochs=used.epochs)
    report_budget(budget, on_event)
    return RunContext(problem=problem, store=store, goal=goal, budget=budget, on_event=on_event)


def _measure(
    problem: Problem, store: RunStore, on_event: ev.OnEvent, command: str, sources: Mapping[str, str]
) -> None:
    began, study, data = time.perf_counter(), problem.study, problem.data
    started = datetime.now(UTC).isoformat(timespec="seconds")
    on_event(ev.StageStarted(stage="baseline", round=0, detail="train" if study.baseline else "measure"))
    if study.baseline:
        _train(problem, on_event)
    search = problem.search_evaluation or evaluate_original(problem)
    test = evaluate(problem.original, data.test, device=problem.device, task=problem.task)
    frozen = problem.graph.frozen
    entry = BaselineEntry(
        command=command,
        sources=dict(sources),
        artifacts=store.location.artifacts,
        started=started,
        settings=plain_settings(study),
        target=study.target,
        target_metric=problem.metric,
        goal=Goal(baseline_top1=search.top1, max_drop_pp=study.max_drop, target_share=problem.target_share),
        before=summarise(problem.original, problem.graph.cost(), test, search.top1),
        test_correct=pack_bits(test.correct),
        data=_split_summaries(problem),
        frozen=tuple(FrozenPart(parameter=f.name, dim=f.dim, reason=f.reason) for f in frozen),
        environment=environment(problem.device),
        seconds=time.perf_counter() - began,
    )
    checkpoint = store.save_checkpoint(problem.original, PruningPlan.full(problem.graph))
    store.create_study(0, vars(entry), (checkpoint, search.top1))


def _train(problem: Problem, on_event: ev.OnEvent) -> None:
    baseline = problem.study.baseline
    assert baseline is not None
    train_baseline_(
        problem.original, problem.data.train, baseline, seed=derive_seed(problem.study.seed, 0),
        device=problem.device, task=problem.task,
        on_epoch=lambda e: on_event(
            ev.StageProgress(stage="baseline", round=0, done=e.epoch, total=baseline.epochs,
                             detail=f"loss {e.train_loss:.3f}")
        ),
    )  # fmt: skip


def _load_original(problem: Problem, store: RunStore) -> None:
    """Check that study, data and network are those that the run was started with, and load the weights.

    Raises:
        UsageError: one of them is not.
    """
    entry = read_baseline(store)
    hint = "resume it with what it was started with, or start a new run in another --out"
    settings = json.loads(json.dumps(plain_settings(problem.study)))  # as the storage gives them back
    changed = [
        name
        for name in entry.settings
        if name not in MAY_CHANGE and entry.settings[name] != settings.get(name)
    ]
    if changed:
        before = entry.settings[changed[0]]
        raise UsageError(f"the run was started with another {changed[0]} ({before})", hint)
    if [s.digest for s in _split_summaries(problem)] != [s.digest for s in entry.data]:
        raise UsageError("the data are not those that the run was started with", hint)
    checkpoint = store.load_checkpoint(checkpoint_of(store, 0, 0))
    if problem.study.baseline is None and not checkpoint.matches(problem.original):
        raise UsageError("the network's weights are not those that the run was started with", hint)
    checkpoint.load_into_(problem.original)


def _split_summaries(problem: Problem) -> tuple[SplitSummary, ...]:
    data = problem.data
    splits = {"train": data.train, "search": data.search, "test": data.test}
    return tuple(SplitSummary(name=name, num_samples=len(s), digest=s.digest()) for name, s in splits.items())
