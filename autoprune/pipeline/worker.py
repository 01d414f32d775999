"""`autoprune worker`: another process, here or on any machine, that runs trials of a run.

A worker opens its own connection to the storage, builds the study again, checks that network, data and
settings are those that the run was started with, and runs trials of the present round through the same code
as a single process. It decides nothing: rounds are planned and judged by the run's coordinator.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace

import optuna

from autoprune import events as ev
from autoprune.config import Protection, Study
from autoprune.errors import RunError
from autoprune.location import RunLocation
from autoprune.pipeline.baseline import start_run
from autoprune.pipeline.preflight import prepare, thread_limit
from autoprune.pipeline.run import analyze, load_round_start
from autoprune.search import (
    RoundSearch,
    RunContext,
    TrialParams,
    is_decided,
    replay,
    round_outcomes,
    run_trial,
    search_round,
    starting_points,
)
from autoprune.storage import (
    FINAL,
    GRACE_PERIOD_S,
    MembershipLostError,
    RunStore,
    join_run,
    list_processes,
    quiet_optuna,
    run_cipher,
)
from autoprune.training import distributed

MAX_WAIT_S = 2 * GRACE_PERIOD_S  # without a coordinator for this long, none is expected any more; a guess
POLL_S = 2.0  # between two looks for a new round; a guess


def run_worker(
    study: Study,
    location: RunLocation,
    *,
    protection: Protection = Protection(),  # noqa: B008 - frozen, never changed
    on_event: ev.OnEvent = ev.ignore_event,
) -> int:
    """Run trials of a run until the run is finished, and return how many this process ran.

    Under torchrun the first rank does so, and the other ranks train each trial together with it.

    Raises:
        UsageError: study, data or network are not those that the run was started with.
        RunError: the run has no coordinator any more.
    """
    with distributed.process_group() as rank:
        if rank > 0:
            _follow_first_rank(study, location, protection)
            return 0
        try:
            return _work(study, location, protection, on_event)
        finally:
            distributed.send_job(None)


@contextmanager
def _opened(study: Study, location: RunLocation, protection: Protection) -> Iterator[RunContext]:
    """Open a run that another process has started."""
    problem = prepare(study, resume=True)
    with (
        quiet_optuna(), thread_limit(study, problem.graph),
        closing(RunStore(location, study.name, cipher=run_cipher(protection))) as store,
    ):  # fmt: skip
        yield start_run(problem, store, ev.ignore_event)


def _work(study: Study, location: RunLocation, protection: Protection, on_event: ev.OnEvent) -> int:
    counter = _OwnTrials(on_event)
    with _opened(study, location, protection) as run:
        while run.store.study(FINAL) is None:
            # A process that was taken for dead joins again, under another number.
            with suppress(MembershipLostError), join_run(run.store, "worker") as member:
                _search_rounds(replace(run, member=member, on_event=counter))
                break
    return counter.number


def _follow_first_rank(study: Study, location: RunLocation, protection: Protection) -> None:
    """Train the trials that the first rank announces; only the first rank writes to the storage."""
    rounds = _RoundCache()
    with _opened(study, location, protection) as run:
        run.store.guard_with(_refuse_to_write)
        while (trial := distributed.receive_job()) is not None:
            round_study = run.store.study(trial.round)
            assert round_study is not None, "the first rank works on a round that exists"
            search = rounds.search(run, round_study)
            assert search is not None
            with distributed.shared_work():
                run_trial(search.context, trial.params, rungs=trial.rungs, seed=trial.seed)


def _refuse_to_write() -> None:
    raise AssertionError("only the first rank writes to the storage")


class _OwnTrials:
    """A listener that counts the trials started here, and passes no end of another trial on."""

    def __init__(self, on_event: ev.OnEvent) -> None:
        self.number, self._on_event = 0, on_event
        self._started: set[tuple[int, int]] = set()

    def __call__(self, event: ev.Event) -> None:
        if isinstance(event, ev.TrialStarted):
            self._started.add((event.round, event.trial))
        if isinstance(event, ev.TrialFinished):
            if (event.round, event.record.number) not in self._started:
                return
            self.number += 1
        self._on_event(event)


def _search_rounds(run: RunContext) -> None:
    monitor, rounds = _CoordinatorMonitor(run.store), _RoundCache()
    while run.store.study(FINAL) is None:
        study = next((s for s in run.store.rounds() if not is_decided(s)), None)
        if study is not None and (search := rounds.search(run, study)) is not None:
            search_round(search, study, rounds.points)
        monitor.check()
        assert run.member is not None
        run.member.check()
        time.sleep(POLL_S)


class _RoundCache:
    """The round that this process works on; its network and graph are built once."""

    def __init__(self) -> None:
        self._name = ""
        self._search: RoundSearch | None = None
        self.points: list[TrialParams] = []

    def search(self, run: RunContext, study: optuna.Study) -> RoundSearch | None:
        """Return the round of this study; None where the rounds before it are not settled yet."""
        if study.study_name == self._name:
            return self._search
        state = replay(run.goal, run.problem.study.control, round_outcomes(run.store))
        if state.ended is not None:
            return None
        self._search, _ = analyze(run, state, load_round_start(run, state))
        self.points, self._name = starting_points(self._search), study.study_name
        return self._search


class _CoordinatorMonitor:
    """A watch that notices when a run has had no coordinator for a while."""

    def __init__(self, store: RunStore) -> None:
        self._store, self._last_seen = store, time.monotonic()

    def check(self) -> None:
        """Look for the coordinator.

        Raises:
            RunError: there was no coordinator for `MAX_WAIT_S`.
        """
        processes = list_processes(self._store)
        if any(p.role == "coordinator" and p.state == "working" for p in processes):
            self._last_seen = time.monotonic()
        elif time.monotonic() - self._last_seen > MAX_WAIT_S:
            raise RunError(
                f"nobody has coordinated the run {self._store.name!r} for {MAX_WAIT_S:.0f} s",
                "start it, or go on with it: autoprune run ... --resume",
            )
