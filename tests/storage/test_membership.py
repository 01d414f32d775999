"""One coordinator a run: the second is refused, the dead are replaced, who was only asleep notices it."""

from __future__ import annotations

import re
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import optuna
import pytest

from autoprune.errors import RunError
from autoprune.storage import database
from autoprune.storage.membership import (
    MembershipLostError,
    RunLockedError,
    StaleMonitor,
    join_run,
    list_processes,
)
from autoprune.storage.run_store import DATABASE, RunStore, quiet_optuna
from tests.clock import Clock

HOLDER = """
import sys
from pathlib import Path
from autoprune.storage import membership
from autoprune.storage.run_store import RunStore
with membership.join_run(RunStore(Path(sys.argv[1]), "a"), sys.argv[2]) as me:
    print("in", flush=True)
    sys.stdin.readline()
    me.check()
"""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    with quiet_optuna(), closing(RunStore(tmp_path, "a", create=True)) as made:
        yield made


@contextmanager
def other(store: RunStore, role: str = "coordinator") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(store.folder), role]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "in\n"
            yield process
        finally:
            process.kill()


def test_the_second_coordinator_is_refused_with_name_and_age(store: RunStore) -> None:
    with other(store) as holder:
        with pytest.raises(RunLockedError) as caught, join_run(store, "coordinator"):
            pytest.fail("there are two")
        assert re.search(rf"\(process {holder.pid}\), since \d+ s$", caught.value.message)
        assert "autoprune worker" in caught.value.hint
        with join_run(store, "worker"):  # workers are welcome
            states = [(p.role, p.state) for p in list_processes(store)]
        assert states == [("coordinator", "working"), ("coordinator", "ended"), ("worker", "working")]
        holder.communicate("\n")
    with join_run(store, "coordinator"):
        assert list_processes(store)[0].state == "ended"


def test_a_killed_coordinator_is_replaced_at_once(store: RunStore) -> None:
    with other(store) as holder:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with join_run(store, "coordinator") as me:
        assert [p.state for p in list_processes(store)] == ["gone", "working"]
        me.check()


def test_who_could_not_say_goodbye_does_not_hold_the_run_against_itself(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full database takes no last word, and a notebook goes on in the same process."""

    def full(*_: object, **__: object) -> None:
        raise RunError("database or disk is full", "make room")

    with monkeypatch.context() as patched, join_run(store, "coordinator") as me:
        patched.setattr(me._study, "tell", full)
    with join_run(store, "coordinator"):
        assert [p.state for p in list_processes(store)] == ["gone", "working"]


def test_a_sleeper_is_replaced_and_notices_it(store: RunStore, clock: Clock) -> None:
    with other(store) as sleeper:
        sleeper.send_signal(signal.SIGSTOP)
        with closing(sqlite3.connect(store.folder / DATABASE)) as connection:  # as if it slept for an hour
            changed = connection.execute("UPDATE trial_heartbeats SET heartbeat = datetime('now', '-1 hour')")
            assert changed.rowcount == 1
            connection.commit()
        began = clock.now
        with join_run(store, "coordinator"):
            assert clock.now - began >= 2 * database.HEARTBEAT_S, "a silence has to last two beats"
            sleeper.send_signal(signal.SIGCONT)
            _, told = sleeper.communicate("\n")
            assert sleeper.returncode != 0
            assert "taken for dead" in told


def test_a_jump_of_the_clock_buries_nobody(store: RunStore, clock: Clock) -> None:
    with join_run(store, "worker") as me:
        monitor = StaleMonitor(store)
        store.storage.grace_period = -3600  # as if the database's clock had jumped an hour ahead
        assert [p.state for p in monitor.refresh()] == ["silent"]
        store.storage.grace_period = database.GRACE_PERIOD_S
        clock.advance(3 * database.HEARTBEAT_S)
        assert [p.state for p in monitor.refresh()] == ["working"]
        me.check()


def test_the_buried_stay_buried(store: RunStore) -> None:
    with join_run(store, "worker") as me:
        study = optuna.load_study(study_name="a/processes", storage=store.storage)
        from optuna.trial import TrialState

        study.tell(me.number, state=TrialState.FAIL)
        with pytest.raises(MembershipLostError):
            me.check()
    assert [p.state for p in list_processes(store)] == ["gone"]
