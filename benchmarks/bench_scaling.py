"""How far more workers help: a simulation with a run's own trial times, and one and two workers for real.

    python benchmarks/bench_scaling.py simulate RUN [--trials 8 16 24 48] [--seed 0]
    python benchmarks/bench_scaling.py measure [STUDY] [--out DIR]

`simulate`: rounds of a fixed number of trials whose durations are drawn from the run's finished trials, each
given to the first worker that is free; a round ends when its last trial does, and the next begins after the
run's mean time between two rounds, in which only the coordinator works. No trial runs ahead of its round:
what it would start from is not decided yet. `waiting` is the share of all workers' time without a trial.

`measure`: the same study with one and with two local workers, cores shared; trials per hour of the time from
the first trial of a round to its last.
"""

from __future__ import annotations

import argparse
import heapq
import os
import random
import subprocess
import sys
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from autoprune.history import read_plan, read_trials
from autoprune.store import RunStore, name_in, quiet_optuna, scored

WORKERS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 400


@dataclass(frozen=True, kw_only=True)
class Times:
    """What a run says about itself, in seconds: its trials, and what lies between two rounds."""

    trials: list[float]
    between: float


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """Many rounds with a number of workers."""

    per_hour: float
    waiting: float


def times_of(folder: Path) -> Times:
    """Read a run."""
    with closing(RunStore(folder, name_in(folder))) as store:
        rounds = list(store.rounds())
        trials = [t.seconds for study in rounds for t in read_trials(study) if t.top1 is not None]
        return Times(trials=trials, between=sum(read_plan(s).analysis_seconds for s in rounds) / len(rounds))


def simulate(times: Times, workers: int, planned: int, dice: random.Random) -> Scaled:
    """Greedy: a free worker takes the next seat."""
    wall = work = 0.0
    for _ in range(ROUNDS):
        free = [0.0] * workers
        for took in dice.choices(times.trials, k=planned):
            heapq.heapreplace(free, free[0] + took)
            work += took
        wall += max(free) + times.between
    return Scaled(per_hour=3600 * ROUNDS * planned / wall, waiting=1 - work / (workers * wall))


def show_simulation(args: argparse.Namespace) -> None:
    """A line for every number of trials in a round and of workers."""
    times = times_of(args.run)
    middle = sorted(times.trials)[len(times.trials) // 2]
    longest = max(times.trials)
    print(f"{args.run}: {len(times.trials)} trials, median {middle:.1f} s, longest {longest:.1f} s; "
          f"{times.between:.1f} s between rounds")  # fmt: skip
    print("trials a round  workers  trials/h  speed-up  waiting")
    for planned in args.trials:
        base = simulate(times, 1, planned, random.Random(args.seed)).per_hour  # noqa: S311 - a simulation
        for workers in WORKERS:
            found = simulate(times, workers, planned, random.Random(args.seed))  # noqa: S311
            print(f"{planned:14} {workers:8} {found.per_hour:9.0f} {found.per_hour / base:8.2f}x "
                  f"{100 * found.waiting:6.1f} %")  # fmt: skip


def measured(folder: Path) -> float:
    """Trials per hour of the time in which trials ran."""
    with closing(RunStore(folder, name_in(folder))) as store:
        seconds, count = 0.0, 0
        for study in store.rounds():
            trials = scored(study)
            began = min(t.datetime_start for t in trials if t.datetime_start)
            ended = max(t.datetime_complete for t in trials if t.datetime_complete)
            seconds, count = seconds + (ended - began).total_seconds(), count + len(trials)
    return 3600 * count / seconds


def measure(args: argparse.Namespace) -> None:
    """One worker, then two."""
    out = args.out or Path(tempfile.mkdtemp())
    print(f"{args.study}, {os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}")
    for workers in (1, 2):
        words = ["run", args.study, "--out", out / f"workers-{workers}", "--plain", "--quiet"]
        command = [sys.executable, "-m", "autoprune", *words, "--workers", str(workers)]
        subprocess.run(list(map(str, command)), check=False)
        print(f"{workers} workers: {measured(out / f'workers-{workers}'):.0f} trials per hour", flush=True)


def main() -> None:
    """Choose what to do."""
    look = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=look)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("simulate")
    one.add_argument("run", type=Path)
    one.add_argument("--trials", type=int, nargs="+", default=[8, 16, 24, 48])
    one.add_argument("--seed", type=int, default=0)
    one.set_defaults(what=show_simulation)
    two = commands.add_parser("measure")
    two.add_argument("study", nargs="?", default="digits")
    two.add_argument("--out", type=Path)
    two.set_defaults(what=measure)
    args = parser.parse_args()
    with quiet_optuna():
        args.what(args)


if __name__ == "__main__":
    main()
