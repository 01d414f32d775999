"""How far do more workers help? A simulation with a run's own trial times, and one and two workers for real.

    python benchmarks/bench_scaling.py simulate RUN [--trials 8 16 24 48] [--seed 0]
    python benchmarks/bench_scaling.py measure [--trials 24] [--workers 1 2] [--out DIR]

`simulate`: rounds of a fixed number of trials whose durations are drawn from the run's finished trials,
each given to the first worker that is free; a round ends when its last trial does, and the next begins
after the run's mean time between two rounds, in which only the coordinator works. No trial runs ahead of
its round, because its starting network is not decided yet. `waiting` is the share of all workers' time
without a trial.

`measure`: one round of the digits, in which no trial reaches the target and so all are run, with one and
with two local workers, cores shared; trials per hour of the time in which all workers had a trial.
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

from subcommands import Subcommand, run_subcommand

from autoprune.search.history import read_round, read_trials
from autoprune.storage.run_store import RunStore, completed_trials, run_name_at
from autoprune.storage.trial_slots import OWNER

WORKERS = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 400
STUDY = """
from dataclasses import replace

from autoprune.config import Control, Search
from autoprune.cli.study_file import load_study

study = replace(
    load_study("digits"), name="scaling", target="macs=0.15", max_drop=0.0, budget="epochs={epochs}",
    search=Search(trials={trials}, epochs=2), control=Control(first_ceiling=0.4, max_rounds=1),
)
"""


@dataclass(frozen=True, kw_only=True)
class Times:
    """What a run says about itself, in seconds: its trials, and what lies between two rounds."""

    trials: list[float]
    between: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What came of a round: trials, and parts of trials, in the time that all workers shared."""

    workers: int
    trials: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Scaled:
    """Many rounds with a number of workers."""

    per_hour: float
    waiting: float


def times_of(folder: Path) -> Times:
    """Read a run."""
    with closing(RunStore(folder, run_name_at(folder))) as store:
        rounds = list(store.rounds())
        trials = [t.seconds for study in rounds for t in read_trials(study) if t.top1 is not None]
        return Times(trials=trials, between=sum(read_round(s).analysis_seconds for s in rounds) / len(rounds))


def simulate(times: Times, workers: int, planned: int, dice: random.Random) -> Scaled:
    """Greedy: a free worker takes the next slot."""
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
    times = times_of(args.run_folder)
    middle = sorted(times.trials)[len(times.trials) // 2]
    longest = max(times.trials)
    print(f"{args.run_folder}: {len(times.trials)} trials, median {middle:.1f} s, longest {longest:.1f} s; "
          f"{times.between:.1f} s between rounds")  # fmt: skip
    print("trials a round  workers  trials/h  speed-up  waiting")
    for planned in args.trials:
        base = simulate(times, 1, planned, random.Random(args.seed)).per_hour  # noqa: S311 - a simulation
        for workers in WORKERS:
            found = simulate(times, workers, planned, random.Random(args.seed))  # noqa: S311
            print(f"{planned:14} {workers:8} {found.per_hour:9.0f} {found.per_hour / base:8.2f}x "
                  f"{100 * found.waiting:6.1f} %")  # fmt: skip


def measured(folder: Path) -> Measured:
    """Of the first round, from when the last worker began until the first one found no trial any more."""
    with closing(RunStore(folder, run_name_at(folder))) as store:
        spans: dict[int, list[tuple[float, float]]] = {}
        for trial in completed_trials(next(iter(store.rounds()))):
            assert trial.datetime_start is not None
            assert trial.datetime_complete is not None
            span = (trial.datetime_start.timestamp(), trial.datetime_complete.timestamp())
            spans.setdefault(trial.user_attrs[OWNER], []).append(span)
    began = max(min(start for start, _ in mine) for mine in spans.values())
    ended = min(max(end for _, end in mine) for mine in spans.values())
    done = sum(
        max(0.0, min(end, ended) - max(start, began)) / (end - start)
        for mine in spans.values()
        for start, end in mine
    )
    return Measured(workers=len(spans), trials=done, seconds=ended - began)


def measure(args: argparse.Namespace) -> None:
    """As often as asked for."""
    out = args.out or Path(tempfile.mkdtemp())
    out.mkdir(parents=True, exist_ok=True)
    study = out / "scaling_study.py"
    study.write_text(STUDY.format(trials=args.trials, epochs=4 * args.trials), encoding="utf-8")
    print(f"{args.trials} trials, {os.cpu_count()} cores, load before {os.getloadavg()[0]:.1f}")
    for workers in args.workers:
        words = ["run", study, "--out", out / f"workers-{workers}", "--plain", "--quiet"]
        command = [sys.executable, "-m", "autoprune", *words, "--workers", str(workers)]
        subprocess.run(list(map(str, command)), check=False)
        found = measured(out / f"workers-{workers}")
        print(f"{found.workers} workers: {3600 * found.trials / found.seconds:.0f} trials per hour "
              f"({found.trials:.1f} trials in {found.seconds:.0f} s), load after {os.getloadavg()[0]:.1f}",
              flush=True)  # fmt: skip


def _simulate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="run", type=Path)
    parser.add_argument("--trials", type=int, nargs="+", default=[8, 16, 24, 48])
    parser.add_argument("--seed", type=int, default=0)


def _measure_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path)


SUBCOMMANDS = {
    "simulate": Subcommand(run=show_simulation, add_options=_simulate_options),
    "measure": Subcommand(run=measure, add_options=_measure_options),
}

if __name__ == "__main__":
    run_subcommand(__doc__, SUBCOMMANDS)
