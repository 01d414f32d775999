"""The original: trained where the study asks for it, measured once, kept as `round-00`; or taken up again.

This is the one place besides `delivery` where the test split is read.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from types import MappingProxyType
from typing import Any

from autoprune import events as ev
from autoprune.data import derive_seed
from autoprune.errors import UsageError
from autoprune.pipeline.measurement import summarise
from autoprune.pipeline.preflight import Setup, environment, measured_baseline, plain_settings
from autoprune.plan import PruningPlan
from autoprune.record import FrozenPart, SplitSummary
from autoprune.search import Goal, Meter, checkpoint_of, pack, read_goal, spent, tell_budget
from autoprune.storage import Member, RunStore
from autoprune.tasks import task_of
from autoprune.training import evaluate, train_baseline_

NONE: Mapping[str, str] = MappingProxyType({})
MAY_CHANGE = ("budget", "device", "data")  # the data are compared by their digests


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """A run at work: what was set up, where it is kept, what it aims at and what it may still spend.

    `me` is this process among those that work on it; None where there is no other.
    """

    setup: Setup
    store: RunStore
    goal: Goal
    meter: Meter
    on_event: ev.OnEvent
    me: Member | None = None

    @property
    def leads(self) -> bool:
        """Whether this process decides."""
        return self.me is None or self.me.role == "coordinator"


def is_measured(store: RunStore) -> bool:
    """Whether the original was measured and kept."""
    return store.study(0) is not None


def begin(
    setup: Setup, store: RunStore, on_event: ev.OnEvent, command: str, sources: Mapping[str, str] = NONE
) -> Work:
    """Measure the original and keep it, or take up what an earlier process measured."""
    if is_measured(store):
        _take_up(setup, store)
    else:
        _measure_baseline(setup, store, on_event, {"command": command, "sources": dict(sources)})
    goal, used = read_goal(store), spent(store)
    cost = setup.graph.cost()
    on_event(
        ev.BaselineMeasured(
            top1=goal.baseline_top1, num_samples=len(setup.data.search), floor=goal.floor,
            metric=setup.metric, cost=setup.original_cost, target_share=goal.target_share,
            macs=cost.macs, params=cost.params,
        )
    )  # fmt: skip
    meter = Meter(setup.budget.counted(used.seconds), seconds=used.seconds, epochs=used.epochs)
    tell_budget(meter, on_event)
    return Work(setup=setup, store=store, goal=goal, meter=meter, on_event=on_event)


def _measure_baseline(setup: Setup, store: RunStore, on_event: ev.OnEvent, given: dict[str, Any]) -> None:
    began, study, data = time.perf_counter(), setup.study, setup.data
    started = datetime.now(UTC).isoformat(timespec="seconds")
    on_event(ev.StageStarted(stage="baseline", round=0, detail="train" if study.baseline else "measure"))
    if study.baseline:
        _train(setup, on_event)
    found = setup.search_before or measured_baseline(study, setup.model, data, setup.device)
    test = evaluate(setup.model, data.test, device=setup.device, task=task_of(study))
    goal = Goal(baseline_top1=found.top1, max_drop_pp=study.max_drop, target_share=setup.target_share)
    attributes = {
        **given,
        "artifacts": store.location.artifacts,
        "started": started,
        "settings": plain_settings(study),
        "target": study.target,
        "target_metric": setup.metric,
        "goal": goal,
        "before": summarise(setup.model, setup.graph.cost(), test, found.top1),
        "test_correct": pack(test.correct),
        "data": _splits(setup),
        "frozen": tuple(FrozenPart(parameter=f.name, dim=f.dim, reason=f.reason) for f in setup.graph.frozen),
        "environment": environment(setup.device),
        "seconds": time.perf_counter() - began,
    }
    store.create_study(
        0, attributes, (store.save_checkpoint(setup.model, PruningPlan.full(setup.graph)), found.top1)
    )


def _train(setup: Setup, on_event: ev.OnEvent) -> None:
    baseline = setup.study.baseline
    assert baseline is not None
    train_baseline_(
        setup.model, setup.data.train, baseline, seed=derive_seed(setup.study.seed, 0),
        device=setup.device, task=task_of(setup.study),
        on_epoch=lambda e: on_event(
            ev.StageProgress(stage="baseline", round=0, done=e.epoch, total=baseline.epochs,
                             detail=f"loss {e.train_loss:.3f}")
        ),
    )  # fmt: skip


def _take_up(setup: Setup, store: RunStore) -> None:
    """See that study, data and network are those that the run was started with.

    Raises:
        UsageError: one of them is not.
    """
    baseline = store.study(0)
    assert baseline is not None
    hint = "resume it with what it was started with, or start a new run in another --out"
    kept, given = baseline.user_attrs["settings"], json.loads(json.dumps(plain_settings(setup.study)))
    changed = [name for name in kept if name not in MAY_CHANGE and kept[name] != given.get(name)]
    if changed:
        raise UsageError(f"the run was started with another {changed[0]} ({kept[changed[0]]})", hint)
    digests = [split.digest for split in _splits(setup)]
    if digests != [split["digest"] for split in baseline.user_attrs["data"]]:
        raise UsageError("the data are not those that the run was started with", hint)
    checkpoint = store.load_checkpoint(checkpoint_of(store, 0, 0))
    if setup.study.baseline is None and not checkpoint.matches(setup.model):
        raise UsageError("the network's weights are not those that the run was started with", hint)
    checkpoint.load_into_(setup.model)


def _splits(setup: Setup) -> tuple[SplitSummary, ...]:
    splits = {"train": setup.data.train, "search": setup.data.search, "test": setup.data.test}
    return tuple(SplitSummary(name=name, num_samples=len(s), digest=s.digest()) for name, s in splits.items())
