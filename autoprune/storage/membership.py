"""Who works on a run: one coordinator and any number of workers, each a running trial with a heartbeat.

`NAME/processes` is an Optuna study with one trial per process, which tells its role, host and process id and
is finished when the process ends. A process that stopped without saying so no longer exists on this host, or
has no heartbeat any more by the database's own clock; since clocks jump, it has to be silent at two looks
that lie two beats apart. Trial numbers are given out atomically, so the lowest living coordinator holds the
run: the others are refused.
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
from autoprune.storage.retry import BEAT_S, GRACE_S
from autoprune.storage.run_store import RunStore

PROCESSES = "processes"
Role = Literal["coordinator", "worker"]
Being = Literal["working", "silent", "gone", "ended"]
POLL_S = 1.0
_HERE: set[str] = set()  # tokens of the members that this very process still is


class HeldError(AutopruneError):
    """Another process coordinates the run."""

    exit_code = 2


class BuriedError(RunError):
    """This process was taken for dead."""


@dataclass(frozen=True, kw_only=True)
class Process:
    """One process that works, or worked, on the run.

    Attributes:
        state: `working`, `silent` (no heartbeat), `gone` (no such process, or buried) or `ended`.
        seconds: since it joined, or that it worked.
    """

    number: int
    role: Role
    host: str
    pid: int
    state: Being
    seconds: float

    def __str__(self) -> str:
        return f"{self.host} (process {self.pid})"


class Presence:
    """This process as a member of the run, with a thread that says every few seconds that it is alive."""

    def __init__(self, store: RunStore, study: optuna.Study, trial: FrozenTrial, role: Role) -> None:
        self.store, self.number, self.role = store, trial.number, role
        self._study, self._trial_id, self._token = study, trial._trial_id, trial.user_attrs["token"]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        store.storage.record_heartbeat(self._trial_id)
        self._thread.start()

    def check(self) -> None:
        """See that nobody has taken this process for dead.

        Raises:
            BuriedError: somebody has.
        """
        if self.store.storage.get_trial(self._trial_id).state is not TrialState.RUNNING:
            raise BuriedError(
                f"this process was silent for more than {GRACE_S} s and was taken for dead",
                "another process goes on with the run: see autoprune status; nothing was lost",
            )

    def leave(self) -> None:
        """Say that this process ends."""
        self._stop.set()
        _HERE.discard(self._token)  # should nobody hear of it, then at least this process knows
        self._thread.join(timeout=BEAT_S)
        with suppress(UpdateFinishedTrialError, ValueError, RunError):
            self._study.tell(self.number, state=TrialState.COMPLETE, values=0.0)

    def _beat(self) -> None:
        while not self._stop.wait(BEAT_S):
            with suppress(Exception):  # the next operation of the main thread tells what is wrong
                self.store.storage.record_heartbeat(self._trial_id)


class Watch:
    """Finds the dead among the members of a run, and buries them."""

    def __init__(self, store: RunStore) -> None:
        self._store = store
        self._silent_since: dict[int, float] = {}

    def look(self) -> tuple[Process, ...]:
        """Everyone who is, or was, a member; who has died is `gone` from now on."""
        found, now = members(self._store), time.monotonic()
        silent = {p.number for p in found if p.state == "silent"}
        self._silent_since = {n: self._silent_since.get(n, now) for n in silent}
        dead = {n for n, since in self._silent_since.items() if now - since >= 2 * BEAT_S}
        dead |= {p.number for p in found if p.state == "gone"}
        study = _known_processes(self._store)
        for number in dead:
            assert study is not None
            with suppress(UpdateFinishedTrialError, ValueError):
                study.tell(number, state=TrialState.FAIL)
        return tuple(replace(p, state="gone") if p.number in dead else p for p in found)


@contextmanager
def joined(store: RunStore, role: Role) -> Iterator[Presence]:
    """Be a member of the run.

    Raises:
        HeldError: the run has a coordinator already, and this process wants to be one.
    """
    study = _processes(store)
    me = Presence(store, study, _enter(study, role), role)
    try:
        if role == "coordinator":
            _refuse_or_take_over(store, me.number)
        yield me
    finally:
        me.leave()


def members(store: RunStore) -> tuple[Process, ...]:
    """Everyone who ever worked on the run, in the order they came."""
    study = _known_processes(store)
    if study is None:
        return ()
    stale = set(store.storage.stale_trial_ids(study))
    return tuple(_process(t, stale) for t in study.get_trials(deepcopy=False))


def num_working(store: RunStore) -> int:
    """How many processes run trials at this moment."""
    return sum(process.state == "working" for process in members(store))


def _known_processes(store: RunStore) -> optuna.Study | None:
    with suppress(KeyError):
        return optuna.load_study(study_name=f"{store.name}/{PROCESSES}", storage=store.storage)
    return None


def _processes(store: RunStore) -> optuna.Study:
    return optuna.create_study(
        study_name=f"{store.name}/{PROCESSES}", storage=store.storage, direction="maximize",
        load_if_exists=True,
    )  # fmt: skip


def _enter(study: optuna.Study, role: Role) -> FrozenTrial:
    token = uuid4().hex
    _HERE.add(token)
    who = {"role": role, "host": platform.node(), "pid": os.getpid(), "space": _space(), "token": token}
    study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=who))
    return next(t for t in study.get_trials(deepcopy=False) if t.user_attrs["token"] == token)


def _refuse_or_take_over(store: RunStore, mine: int) -> None:
    """Wait until a silent holder has spoken or is dead; the dead notice it should they wake up."""
    watch = Watch(store)
    while True:
        rivals = [p for p in watch.look() if p.role == "coordinator" and p.number < mine]
        holder = next((p for p in rivals if p.state == "working"), None)
        if holder is not None:
            raise HeldError(
                f"the run {store.name!r} is held by {holder}, since {_spell(holder.seconds)}",
                "autoprune worker joins it; or wait until that process has ended",
            )
        if not any(p.state == "silent" for p in rivals):
            return
        time.sleep(POLL_S)


def _process(trial: FrozenTrial, stale: set[int]) -> Process:
    who: dict[str, Any] = trial.user_attrs
    state: Being = "silent" if trial._trial_id in stale else "working"
    if trial.state is TrialState.COMPLETE:
        state = "ended"
    elif trial.state is TrialState.FAIL or _has_died(who):
        state = "gone"
    started = trial.datetime_start or datetime.now()
    ended = trial.datetime_complete or datetime.now(started.tzinfo)
    return Process(
        number=trial.number, role=who["role"], host=who["host"], pid=who["pid"], state=state,
        seconds=max(0.0, (ended - started).total_seconds()),
    )  # fmt: skip


def _has_died(who: dict[str, Any]) -> bool:
    """Whether it was a process of this host that exists no longer, or was this one and has left."""
    if (who["host"], who["space"]) != (platform.node(), _space()):
        return False
    if who["pid"] == os.getpid():
        return who["token"] not in _HERE
    try:
        os.kill(who["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _space() -> str:
    """Process ids mean something inside one boot and one namespace of a host only."""
    parts = []
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(str(Path("/proc/self/ns/pid").readlink()))
    return " ".join(parts)


def _spell(seconds: float) -> str:
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
