"""The cost of a campaign beside training: storage per trial, growth with trials, and a run's own overhead.

    python benchmarks/bench_overhead.py storage [--postgres] [--trials 64] [--workers 1 4 8]
    python benchmarks/bench_overhead.py growth [--trials 1000] [--whole] [--sampler tpe]
    python benchmarks/bench_overhead.py run RUN

`storage`: every process takes slots, is suggested five parameters, stores a record of ten epochs, and
tells; nothing is trained. `growth`: the same alone, the first hundred trials of a study against its last
hundred; with `--whole` all that a round does beside pruning and training, the sampler's proposals included.
`run`: of a finished run's time between its first trial and its last model, the share outside analyses,
trials (pruning, training, evaluation) and the final stage, by the run's own records.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import mean, median
from typing import Any
from unittest.mock import patch

import optuna
from optuna.storages.journal import JournalFileBackend
from subcommands import Subcommand, run_subcommand

from autoprune import events as ev
from autoprune.location import RunLocation, parse_database_url
from autoprune.record import EpochPoint, Rung, TrialRecord
from autoprune.search.history import RESULT, read_round, read_trials
from autoprune.search.trial import RungState, TrialHooks, TrialResult
from autoprune.storage.database import open_storage
from autoprune.storage.run_store import (
    FINAL,
    RunStore,
    completed_trials,
    run_name_at,
    set_attrs,
)
from autoprune.storage.trial_slots import claim_slot, finish_trial, start_trial

ROOT = Path(__file__).resolve().parents[1]
EPOCH = EpochPoint(epoch=1.0, lr=0.1, train_loss=1.0, images_per_s=100.0)
POINT = {"prune_rate": 0.3, "lr": 0.01, "decay": "cosine", "criterion": "l1", "strategy": "sensitivity"}
CHOICES = {"decay": ["cosine", "linear"], "criterion": ["l1", "l2"], "strategy": ["sensitivity"]}


def open_study(where: str, *, create: bool = False) -> optuna.Study:
    """`sqlite:FOLDER`, `journal:FILE` or a PostgreSQL URL."""
    kind, _, rest = where.partition(":")
    if kind == "journal":
        backend = JournalFileBackend(rest)
        storage: optuna.storages.BaseStorage = optuna.storages.JournalStorage(backend)
    else:
        database = None if kind == "sqlite" else parse_database_url(where)
        folder = Path(rest) if kind == "sqlite" else Path("unused")
        storage = open_storage(RunLocation(folder=folder, database=database))
    if create:
        return optuna.create_study(study_name="bench/round-01", storage=storage, direction="maximize")
    return optuna.load_study(study_name="bench/round-01", storage=storage)


def one_trial(study: optuna.Study, planned: int, owner: int) -> bool:
    """Everything that a trial asks of the storage."""
    taken = claim_slot(study, planned, owner)
    if taken is None:
        return False
    trial = start_trial(study, taken, POINT)
    trial.suggest_float("prune_rate", 0.1, 0.4)
    trial.suggest_float("lr", 1e-3, 0.1, log=True)
    for name, choices in CHOICES.items():
        trial.suggest_categorical(name, choices)
    record = TrialRecord(number=-1, state="running", params={}, top1=0.9, epochs=(EPOCH,) * 10, seconds=1.0)
    set_attrs(trial, checkpoint="0" * 64)
    set_attrs(trial, **{RESULT: record})
    finish_trial(study, trial, 0.5)
    return True


def worker(where: str, planned: int, owner: int) -> None:
    """Run trials until no slot is left; prints the milliseconds of each."""
    study = open_study(where)
    print("ready", flush=True)
    sys.stdin.readline()
    while True:
        began = time.perf_counter()
        if not one_trial(study, planned, owner):
            return
        print(1000 * (time.perf_counter() - began))


def storage_cost(where: str, workers: int, planned: int) -> list[float]:
    """Milliseconds of every trial, over all processes."""
    open_study(where, create=True)
    command = [sys.executable, __file__, "worker", where, str(planned)]
    started = [
        subprocess.Popen([*command, str(n)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for n in range(workers)
    ]
    for one in started:
        assert one.stdout is not None
        one.stdout.readline()
    told = []
    for one in started:
        assert one.stdin is not None
        one.stdin.write("\n")
        one.stdin.flush()
    for one in started:
        out, _ = one.communicate()
        told += [float(line) for line in out.split()]
    assert len(told) == planned, "every slot is taken once"
    return told


@contextmanager
def locations(*, with_postgres: bool) -> Iterator[list[str]]:
    """A kind of storage each, in a temporary folder."""
    with tempfile.TemporaryDirectory() as folder:
        kinds = ["sqlite", "journal"]
        if not with_postgres:
            yield [f"{kind}:{folder}/{kind}" for kind in kinds]
            return
        sys.path.insert(0, str(ROOT))
        from tests.services import postgres

        with postgres(Path(tempfile.gettempdir()) / f"autoprune-bench-{time.time_ns()}") as server:
            yield [*(f"{kind}:{folder}/{kind}" for kind in kinds), server.url]


def storage(args: argparse.Namespace) -> None:
    """One line for every storage and number of workers."""
    print(f"{'storage':12} workers  trials  median ms  mean ms  worst ms  trials/s")
    for workers in args.workers:
        with locations(with_postgres=args.postgres) as found:
            for where in found:
                kind = where.partition(":")[0]
                if kind == "sqlite":
                    Path(where.partition(":")[2]).mkdir()
                began = time.perf_counter()
                took = storage_cost(where, workers, args.trials)
                rate = args.trials / (time.perf_counter() - began)
                print(f"{kind:12} {workers:7} {args.trials:7} {median(took):10.0f} {mean(took):8.0f} "
                      f"{max(took):9.0f} {rate:9.1f}", flush=True)  # fmt: skip


def growth(args: argparse.Namespace) -> None:
    """The first hundred trials against the last hundred."""
    with tempfile.TemporaryDirectory() as folder:
        took = whole_round(Path(folder), args) if args.whole else seats_alone(folder, args.trials)
    for initial_state in range(0, args.trials, max(100, args.trials // 10)):
        wall, cpu = zip(*took[initial_state : initial_state + 100], strict=True)
        print(f"trials {initial_state:5} to {initial_state + len(wall):5}: median {median(wall):6.1f} ms, "
              f"CPU {median(cpu):6.1f} ms", flush=True)  # fmt: skip


def now_ms() -> tuple[float, float]:
    """The clock, and this process's own time on the CPU."""
    return 1000 * time.perf_counter(), 1000 * time.process_time()


def between(moments: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """What lies between one moment and the next, by both clocks."""
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairwise(moments)]


def seats_alone(folder: str, trials: int) -> list[tuple[float, float]]:
    """Milliseconds of every trial: the storage alone."""
    study, moments = open_study(f"sqlite:{folder}", create=True), [now_ms()]
    for _ in range(trials):
        one_trial(study, trials, 0)
        moments.append(now_ms())
    return between(moments)


def untrained(context: object, params: object, *, hooks: TrialHooks, **_: object) -> Any:
    """In place of a trial: asks whether to climb, as a trial does, and gives a record of ten epochs."""
    state = RungState(top1s=(0.4,), epochs=0.5, next_epochs=0.5, prune_rate=0.3, cost_share=0.7)
    hooks.should_continue(state)
    rungs = tuple(Rung(epochs=e, top1=t) for e, t in ((0.5, 0.4), (1.0, 0.45)))
    record = TrialRecord(
        number=-1, state="running", params={}, top1=0.45, prune_rate=0.3, cost_share=0.7, rungs=rungs,
        epochs=(EPOCH,) * 10, seconds=1e-3,
    )  # fmt: skip
    return TrialResult(record=record, model=None, plan=None)


def whole_round(folder: Path, args: argparse.Namespace) -> list[tuple[float, float]]:
    """Milliseconds between two finished trials of a round that trains nothing."""
    sys.path.insert(0, str(ROOT))
    from autoprune.config import Protection, Search
    from autoprune.pipeline.baseline import start_run
    from autoprune.pipeline.preflight import prepare
    from autoprune.pipeline.run import analyze, load_round_start
    from autoprune.search.controller import initial_state
    from autoprune.search.round import search_round, starting_points
    from tests.tiny import tiny_study

    study = tiny_study(
        search=Search(trials=args.trials, epochs=0.5, sampler=args.sampler),
        budget=f"epochs={5 * args.trials}",
    )
    ends = []
    with closing(RunStore(folder, "tiny", create=True)) as store:
        run = start_run(prepare(study, protection=Protection(plain=True)), store, ev.ignore_event)
        state = initial_state(run.goal, study.control)
        search, round_study = analyze(run, state, load_round_start(run, state))
        points = starting_points(search)

        def listen(event: ev.Event) -> None:
            if isinstance(event, ev.TrialFinished):
                ends.append(now_ms())

        ends.append(now_ms())
        with patch("autoprune.search.round.run_trial", untrained):
            search_round(replace(search, run=replace(run, on_event=listen)), round_study, points)
    return between(ends)


def overhead_of(store: RunStore) -> tuple[float, float]:
    """Wall seconds from the first trial to the delivered model, and those of them that are accounted for."""
    rounds = list(store.rounds())
    final = store.study(FINAL)
    assert final is not None, "the run is not finished"
    first = min(t.datetime_start for t in completed_trials(rounds[0]) if t.datetime_start)
    last = max(t.datetime_complete for t in completed_trials(final) if t.datetime_complete)
    work = sum(t.seconds for study in rounds for t in read_trials(study))
    work += sum(read_round(study).analysis_seconds for study in rounds[1:])
    return (last - first).total_seconds(), work + final.user_attrs["seconds"]


def run(args: argparse.Namespace) -> None:
    """A finished run's overhead; one process ran it, without a pause."""
    folder = args.run_folder
    with closing(RunStore(folder, run_name_at(folder))) as store:
        wall, work = overhead_of(store)
        trials = sum(len(completed_trials(study)) for study in store.rounds())
    share = 1 - work / wall
    print(f"{folder}: {trials} trials, {wall:.1f} s, of which {100 * share:.2f} % overhead")


def _storage_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--postgres", action="store_true")
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4, 8])


def _growth_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--sampler", default="tpe")


def _run_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="run", type=Path)


def _worker_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("where")
    parser.add_argument("planned", type=int)
    parser.add_argument("owner", type=int)


SUBCOMMANDS = {
    "storage": Subcommand(run=storage, add_options=_storage_options),
    "growth": Subcommand(run=growth, add_options=_growth_options),
    "run": Subcommand(run=run, add_options=_run_options),
    # one of the processes that `storage` starts
    "worker": Subcommand(run=lambda a: worker(a.where, a.planned, a.owner), add_options=_worker_options),
}

if __name__ == "__main__":
    run_subcommand(__doc__, SUBCOMMANDS)
