"""How many trials does a round of several processes run, some of which are killed? Slots against Optuna.

    python benchmarks/bench_slots.py                # a table to stdout; about two minutes

Both sides share one SQLite file that is opened as `storage.database` opens it, have the same planned number
of trials, and lose the same processes to SIGKILL in the middle of a trial. Optuna's own way is
`Study.optimize` with heartbeats, `RetryHeartbeatStaleTrialCallback` and `MaxTrialsCallback`; ours is
`storage.trial_slots` with a coordinator that releases the slots of dead processes. The goal is exactly the
planned number of completed trials, with every lost trial tried again once.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import optuna
from machine import headline

HEARTBEAT_S, GRACE_S = 1, 4
WORKER = """
import sys, time, optuna
from pathlib import Path
from optuna.study import MaxTrialsCallback
from optuna.trial import TrialState
sys.path.insert(0, sys.argv[1])
from autoprune.location import RunLocation
from autoprune.storage import database, trial_slots
optuna.logging.set_verbosity(optuna.logging.ERROR)
folder, way, planned, owner = Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
seconds = float(sys.argv[6])


def objective(trial):
    x = trial.suggest_float("x", 0, 1)
    time.sleep(seconds)
    return x


if way == "slots":
    study = optuna.load_study(study_name="a", storage=database.open_storage(RunLocation(folder=folder)))
    while (slot := trial_slots.claim_slot(study, planned, owner)) is not None:
        point = slot.retry_point or {"x": (slot.number + 1) / 100}
        trial = trial_slots.start_trial(study, slot, point)
        trial_slots.finish_trial(study, trial, objective(trial))
else:
    database.RetryingStorage.get_heartbeat_interval = lambda self: self.heartbeat_interval
    storage = database.open_storage(RunLocation(folder=folder))
    storage.heartbeat_interval, storage.grace_period = 1, 4
    storage.heartbeat_stale_trial_callback = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=1)
    study = optuna.load_study(study_name="a", storage=storage)
    stop = MaxTrialsCallback(planned, states=(TrialState.COMPLETE,))
    study.optimize(objective, n_trials=planned, callbacks=[stop])
"""


def play(way: str, planned: int, workers: int, kills: int, seconds: float) -> tuple[int, int, int]:
    """Return completed trials, trials that were lost for good, and points that were completed twice."""
    from autoprune.location import RunLocation
    from autoprune.storage import database, trial_slots

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        storage = database.open_storage(RunLocation(folder=folder))
        study = optuna.create_study(study_name="a", storage=storage)
        root = str(Path(__file__).resolve().parents[1])

        def start(owner: int) -> subprocess.Popen[bytes]:
            words = [root, name, way, str(planned), str(owner), str(seconds)]
            return subprocess.Popen([sys.executable, "-c", WORKER, *words], stderr=subprocess.DEVNULL)

        running = {n: start(n) for n in range(workers)}
        while len(trial_slots.running_trials(study)) < workers:
            time.sleep(0.05)
        for owner in range(kills):
            os.kill(running[owner].pid, signal.SIGKILL)
        killed_at, next_owner = time.monotonic(), workers
        while any(p.poll() is None for p in running.values()):
            if way == "slots" and time.monotonic() - killed_at > GRACE_S:
                # The coordinator's part: the membership study tells it who is alive.
                trial_slots.release_stale(study, {n for n, p in running.items() if p.poll() is None})
            time.sleep(0.1)
        if way == "slots":
            # The others may have ended before the grace period was over: the coordinator takes what is left.
            trial_slots.release_stale(study, set())
            start(next_owner).wait()
        trials = study.get_trials()
        database.close_storage(storage)
    completed = [t for t in trials if t.state is optuna.trial.TrialState.COMPLETE]
    points = Counter(t.params["x"] for t in completed)
    lost = [t for t in trials if t.state is not optuna.trial.TrialState.COMPLETE and t.params]
    return len(completed), sum(t.params["x"] not in points for t in lost), sum(c - 1 for c in points.values())


def main() -> None:
    """Play both ways several times."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--planned", type=int, default=12)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a trial")
    parser.add_argument("--repeat", type=int, default=3)
    args = parser.parse_args()
    print(headline("optuna", "sqlalchemy"))
    print(
        f"{args.planned} planned trials of {args.seconds} s, {args.workers} processes, {args.kills} killed\n"
    )
    print("| way | completed | lost for good | completed twice |")
    print("|---|---|---|---|")
    for way in ("slots", "optimize"):
        rows = [play(way, args.planned, args.workers, args.kills, args.seconds) for _ in range(args.repeat)]
        print(
            f"| {way} | "
            + " | ".join(", ".join(map(str, column)) for column in zip(*rows, strict=True))
            + " |"
        )


if __name__ == "__main__":
    main()
