"""One coordinator a run: the second is refused, the dead are replaced, who was only asleep notices it."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import optuna
import pytest

from autoprune.errors import RunError
from autoprune.storage import database, membership
from autoprune.storage.membership import (
    MembershipLostError,
    RunLockedError,
    StaleMonitor,
    join_run,
    list_processes,
)
from autoprune.storage.run_store import RunStore, quiet_optuna

HOLDER = """
import sys, time
from pathlib import Path
from autoprune.storage import database
from autoprune.storage import membership
from autoprune.storage.run_store import RunStore
membership.HEARTBEAT_S = float(sys.argv[3])
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
def other(store: RunStore, role: str = "coordinator", beat: float = 10) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(store.folder), role, str(beat)]
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
        time.sleep(1.1)
        with pytest.raises(RunLockedError) as caught, join_run(store, "coordinator"):
            pytest.fail("there are two")
        assert f"(process {holder.pid}), since " in caught.value.message
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


def test_a_sleeper_is_replaced_and_notices_it(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "HEARTBEAT_S", 1)
    store.storage.grace_period = 3
    with other(store, beat=1) as sleeper:
        sleeper.send_signal(signal.SIGSTOP)
        time.sleep(5)  # longer than the grace period
        began = time.monotonic()
        with join_run(store, "coordinator"):
            assert time.monotonic() - began >= 2, "a silence has to last two beats"
            sleeper.send_signal(signal.SIGCONT)
            _, told = sleeper.communicate("\n")
            assert sleeper.returncode != 0
            assert "taken for dead" in told


def test_a_jump_of_the_clock_buries_nobody(store: RunStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "HEARTBEAT_S", 0.5)
    with join_run(store, "worker") as me:
        monitor = StaleMonitor(store)
        store.storage.grace_period = -3600  # as if the database's clock had jumped an hour ahead
        assert [p.state for p in monitor.refresh()] == ["silent"]
        store.storage.grace_period = database.GRACE_PERIOD_S
        time.sleep(1.1)
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
