"""`autoprune worker`: another process, here or on any machine, that runs trials of a run.

It opens its own connection to the storage, builds the study again, checks that network, data and settings
are those that the run was started with, and runs trials of the present round through the same code as a
single process. It decides nothing: rounds are planned and judged by the run's coordinator.
"""

from __future__ import annotations

import time
from contextlib import closing, suppress
from dataclasses import replace
from typing import Any

import optuna

from autoprune import events as ev
from autoprune.config import Protection, Study
from autoprune.errors import RunError
from autoprune.location import RunLocation
from autoprune.pipeline.baseline import Work, begin
from autoprune.pipeline.preflight import fitting_threads, prepare
from autoprune.pipeline.run import analyse, known_points, stand
from autoprune.search import RoundJob, State, is_decided, outcomes, replay, run_trial, search_round
from autoprune.storage import (
    FINAL,
    GRACE_PERIOD_S,
    Member,
    MembershipLostError,
    RunStore,
    join_run,
    list_processes,
    quiet_optuna,
    run_cipher,
)
from autoprune.training import distributed

LONELY_S = 2 * GRACE_PERIOD_S  # without a coordinator for this long, nothing will come any more
POLL_S = 2.0


def work_on(
    study: Study,
    location: RunLocation,
    *,
    protection: Protection = Protection(),  # noqa: B008 - frozen, never changed
    on_event: ev.OnEvent = ev.ignore_event,
) -> int:
    """Run trials of the run until it is finished; gives how many.

    Raises:
        UsageError: study, data or network are not those that the run was started with.
        RunError: the run has no coordinator any more.
    """
    with distributed.process_group() as rank:
        if rank > 0:
            _follow(study, location, protection)
            return 0
        try:
            return _lead(study, location, protection, on_event)
        finally:
            distributed.send_job(None)


def _lead(study: Study, location: RunLocation, protection: Protection, on_event: ev.OnEvent) -> int:
    done = _Count(on_event)
    setup = prepare(study, resume=True)
    with (
        quiet_optuna(), fitting_threads(setup),
        closing(RunStore(location, study.name, cipher=run_cipher(protection))) as store,
    ):  # fmt: skip
        work = begin(setup, store, ev.ignore_event, "")
        while store.study(FINAL) is None:
            with suppress(MembershipLostError), join_run(store, "worker") as me:
                _work(replace(work, me=me, on_event=done), me)
                break
    return done.number


def _follow(study: Study, location: RunLocation, protection: Protection) -> None:
    """Train what the first rank announces; nothing is written here."""
    setup, ready = prepare(study, resume=True), _Ready()
    with (
        quiet_optuna(), fitting_threads(setup),
        closing(RunStore(location, study.name, cipher=run_cipher(protection))) as store,
    ):  # fmt: skip
        store.guard_with(_forbidden)
        work = begin(setup, store, ev.ignore_event, "")
        while (task := distributed.receive_job()) is not None:
            attempt = store.study(task.round)
            assert attempt is not None, "the first rank works on a round that is planned"
            job = ready.job(work, attempt)
            assert job is not None
            with distributed.shared_work():
                run_trial(job.ground, task.params, epochs=task.epochs, seed=task.seed)


def _forbidden() -> None:
    raise AssertionError("only the first rank speaks to the storage")


class _Count:
    """Passes events on, and counts the trials that were started here."""

    def __init__(self, on_event: ev.OnEvent) -> None:
        self.number, self._on_event = 0, on_event
        self._mine: set[tuple[int, int]] = set()

    def __call__(self, event: ev.Event) -> None:
        if isinstance(event, ev.TrialStarted):
            self._mine.add((event.round, event.trial))
        if isinstance(event, ev.TrialFinished):
            if (event.round, event.record.number) not in self._mine:
                return
            self.number += 1
        self._on_event(event)


def _work(work: Work, me: Member) -> None:
    alone, ready = _Alone(work.store), _Ready()
    while work.store.study(FINAL) is None:
        attempt = next((a for a in work.store.rounds() if not is_decided(a)), None)
        if attempt is not None and (job := ready.job(work, attempt)) is not None:
            search_round(job, attempt, ready.known)
        alone.check()
        me.check()
        time.sleep(POLL_S)


class _Ready:
    """The round that this process stands on; building its network and graph once is enough."""

    def __init__(self) -> None:
        self._name = ""
        self._job: RoundJob | None = None
        self.known: list[dict[str, Any]] = []

    def job(self, work: Work, attempt: optuna.Study) -> RoundJob | None:
        """What to work with in this round; None where its state is not settled yet."""
        if attempt.study_name == self._name:
            return self._job
        state: State = replay(work.goal, work.setup.study.control, outcomes(work.store))
        if state.ended is not None:
            return None
        self._job, _ = analyse(work, state, stand(work, state))
        self.known, self._name = known_points(self._job), attempt.study_name
        return self._job


class _Alone:
    """Notices that a run has had no coordinator for a while."""

    def __init__(self, store: RunStore) -> None:
        self._store, self._since = store, time.monotonic()

    def check(self) -> None:
        """Look whether there is one.

        Raises:
            RunError: there was none for `LONELY_S`.
        """
        if any(p.role == "coordinator" and p.state == "working" for p in list_processes(self._store)):
            self._since = time.monotonic()
        elif time.monotonic() - self._since > LONELY_S:
            raise RunError(
                f"nobody has coordinated the run {self._store.name!r} for {LONELY_S:.0f} s",
                "start it, or go on with it: autoprune run ... --resume",
            )
