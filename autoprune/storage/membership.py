"""The processes of a run: one coordinator and any number of workers, each a running trial with a heartbeat.

`NAME/processes` is an Optuna study with one trial per process. The trial holds the process's role, host and
process id, and is completed when the process leaves. A process has died without leaving if it no longer
exists on this host, or if its heartbeat is older than the grace period by the database's own clock. Clocks
jump, so a silent process has to be silent at two looks that lie two heartbeats apart. Optuna gives trial
numbers out atomically: the living coordinator with the lowest number holds the run, and the others are
refused.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState, create_trial

from autoprune.errors import AutopruneError, RunError
from autoprune.storage.database import GRACE_PERIOD_S, HEARTBEAT_S
from autoprune.storage.optuna_private import is_running, stale_trial_ids, trial_id
from autoprune.storage.run_store import RunStore

PROCESSES = "processes"
Role = Literal["coordinator", "worker"]
ProcessState = Literal["working", "silent", "gone", "ended"]
POLL_S = 1.0  # between two looks at other processes and their trials; a guess
_LOCAL_TOKENS: set[str] = set()  # of the members that this very process still is


class RunLockedError(AutopruneError):
    """Another process coordinates the run."""

    exit_code = 2


class MembershipLostError(RunError):
    """This process was silent for so long that another one counted it as dead."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process that works, or worked, on a run.

    Attributes:
        number: of its trial in the study of processes.
        state: `working`, `silent` (its heartbeat is overdue), `gone` (it exists no longer, or was declared
            dead) or `ended` (it left).
        seconds: since it joined, or between joining and leaving.
    """

    number: int
    role: Role
    host: str
    pid: int
    state: ProcessState
    seconds: float

    def __str__(self) -> str:
        return f"{self.host} (process {self.pid})"


class Member:
    """This process as a member of a run; a thread records its heartbeat."""

    def __init__(self, store: RunStore, study: optuna.Study, trial: FrozenTrial, role: Role) -> None:
        self.store, self.number, self.role = store, trial.number, role
        self._study, self._trial_id, self._token = study, trial_id(trial), trial.user_attrs["token"]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._record_heartbeats, name="heartbeat", daemon=True)
        store.storage.record_heartbeat(self._trial_id)
        self._thread.start()

    def check(self) -> None:
        """Check that no other process has declared this one dead.

        Raises:
            MembershipLostError: one has; whatever this process held may be another's by now.
        """
        if not is_running(self.store.storage, self._trial_id):
            raise MembershipLostError(
                f"this process was silent for more than {GRACE_PERIOD_S} s and was taken for dead",
                "another process goes on with the run: see autoprune status; nothing was lost",
            )

    def leave(self) -> None:
        """Record that this process has ended."""
        self._stop.set()
        # The database may be away: then nobody else learns of it, but this very process must know.
        _LOCAL_TOKENS.discard(self._token)
        self._thread.join(timeout=HEARTBEAT_S)
        with suppress(UpdateFinishedTrialError, ValueError, RunError):
            self._study.tell(self.number, state=TrialState.COMPLETE, values=0.0)

    def _record_heartbeats(self) -> None:
        while not self._stop.wait(HEARTBEAT_S):
            with suppress(Exception):  # the main thread's next operation reports what is wrong
                self.store.storage.record_heartbeat(self._trial_id)
        with suppress(Exception):
            self.store.storage.remove_session()  # sessions are per thread: no other can close it


class StaleMonitor:
    """Finds the members of a run that have died, and fails their trials in the study of processes."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._silent_since: dict[int, float] = {}

    def refresh(self) -> tuple[Process, ...]:
        """Return every process that is or was a member; the dead are declared `gone`."""
        processes, now = list_processes(self._store), time.monotonic()
        silent = {p.number for p in processes if p.state == "silent"}
        self._silent_since = {n: self._silent_since.get(n, now) for n in silent}
        dead = {n for n, since in self._silent_since.items() if now - since >= 2 * HEARTBEAT_S}
        dead |= {p.number for p in processes if p.state == "gone"}
        study = _load_processes(self._store)
        for number in dead:
            assert study is not None
            with suppress(UpdateFinishedTrialError, ValueError):
                study.tell(number, state=TrialState.FAIL)
        return tuple(replace(p, state="gone") if p.number in dead else p for p in processes)


@contextmanager
def join_run(store: RunStore, role: Role) -> Iterator[Member]:
    """Be a member of a run for the length of a `with` block.

    Raises:
        RunLockedError: this process wants to coordinate the run, and another one does already.
    """
    study = _create_processes(store)
    member = Member(store, study, _add_process(study, role), role)
    try:
        if role == "coordinator":
            _refuse_or_take_over(store, member.number)
        yield member
    finally:
        member.leave()


def list_processes(store: RunStore) -> tuple[Process, ...]:
    """Return every process that ever worked on the run, in the order in which they joined."""
    study = _load_processes(store)
    if study is None:
        return ()
    stale = set(stale_trial_ids(store.storage, study))
    return tuple(_process_of(t, stale) for t in study.get_trials(deepcopy=False))


def count_working(store: RunStore) -> int:
    """Return how many processes work on the run at this moment."""
    return sum(process.state == "working" for process in list_processes(store))


def _load_processes(store: RunStore) -> optuna.Study | None:
    with suppress(KeyError):
        return optuna.load_study(study_name=f"{store.name}/{PROCESSES}", storage=store.storage)
    return None


def _create_processes(store: RunStore) -> optuna.Study:
    return optuna.create_study(
        study_name=f"{store.name}/{PROCESSES}", storage=store.storage, direction="maximize",
        load_if_exists=True,
    )  # fmt: skip


def _add_process(study: optuna.Study, role: Role) -> FrozenTrial:
    token = uuid4().hex
    _LOCAL_TOKENS.add(token)
    identity = {
        "role": role, "host": platform.node(), "pid": os.getpid(), "space": _pid_space(), "token": token,
    }  # fmt: skip
    study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=identity))
    return next(t for t in study.get_trials(deepcopy=False) if t.user_attrs["token"] == token)


def _refuse_or_take_over(store: RunStore, own_number: int) -> None:
    """Wait until a silent coordinator has spoken or is dead; a dead one notices that if it wakes up."""
    monitor = StaleMonitor(store)
    while True:
        rivals = [p for p in monitor.refresh() if p.role == "coordinator" and p.number < own_number]
        holder = next((p for p in rivals if p.state == "working"), None)
        if holder is not None:
            raise RunLockedError(
                f"the run {store.name!r} is held by {holder}, since {_minutes(holder.seconds)}",
                "autoprune worker joins it; or wait until that process has ended",
            )
        if not any(p.state == "silent" for p in rivals):
            return
        time.sleep(POLL_S)


def _process_of(trial: FrozenTrial, stale: set[int]) -> Process:
    identity: dict[str, Any] = trial.user_attrs
    state: ProcessState = "silent" if trial_id(trial) in stale else "working"
    if trial.state is TrialState.COMPLETE:
        state = "ended"
    elif trial.state is TrialState.FAIL or _has_died(identity):
        state = "gone"
    start = trial.datetime_start or datetime.now()
    end = trial.datetime_complete or datetime.now(start.tzinfo)
    return Process(
        number=trial.number, role=identity["role"], host=identity["host"], pid=identity["pid"], state=state,
        seconds=max(0.0, (end - start).total_seconds()),
    )  # fmt: skip


def _has_died(identity: dict[str, Any]) -> bool:
    """Return whether this was a process of this host that exists no longer, or this one before it left."""
    if (identity["host"], identity["space"]) != (platform.node(), _pid_space()):
        return False
    if identity["pid"] == os.getpid():
        return identity["token"] not in _LOCAL_TOKENS
    try:
        os.kill(identity["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _pid_space() -> str:
    """Return what identifies a space of process ids: one boot and one namespace of a host."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _minutes(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
