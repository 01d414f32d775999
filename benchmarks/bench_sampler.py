"""Which sampler, how many start-up trials, which warm start? Recorded real trials decide.

    AUTOPRUNE_DATA=DIR python benchmarks/bench_sampler.py record digits --trials 128 --rungs 45
    AUTOPRUNE_DATA=DIR python benchmarks/bench_sampler.py record digits --round 2 --trials 36 --rungs 0
    AUTOPRUNE_DATA=DIR python benchmarks/bench_sampler.py record resnet8 --trials 36
    python benchmarks/bench_sampler.py replay --seeds 12

`record` runs the product's own trials (`run_trial`) at random points of the round's own space, every third
at the ceiling, and at the points that a round begins with; twenty are run again with another seed, so that
the noise is known. A trial climbs two rungs; the first is 0.1, 0.2 or 0.33 of its epochs in turn. The first
rungs alone are run once more, and scored after their batch-norm statistics were estimated anew, which the
product does not do. Rows go to results/sampler.csv as they come; a row that is there is not made again. The
second round stands on the network of the first round's best recorded trial at the ceiling.

`replay` fits a surrogate to each round (`sampler_worlds.py`), lets the product's own proposals play rounds
against it for many seeds (`sampler_replay.py`), and writes results/sampler.md.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import optuna
import torch
from oneshot_models import load
from rows import append_row
from sampler_page import write_page
from sampler_worlds import FIELDS, RUNG, Key, Point, Trial, params_of, read_trials
from torch import nn

from autoprune.config import Finetune, Optimizer, Study
from autoprune.data.splits import derive_seed
from autoprune.pipeline.preflight import prepare, trace_for_study
from autoprune.plan import PruningPlan
from autoprune.pruning.sensitivity import SensitivityTable, sensitivity
from autoprune.search.context import Problem, RoundContext, RoundStart
from autoprune.search.proposals import SearchSpace, initial_points, points_at_ceiling, suggest
from autoprune.search.trial import run_trial
from autoprune.training.evaluation import recalibrate_

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SHARES = (0.1, 0.2, 0.33)  # of a trial's epochs on its first rung
PRODUCT_SHARE = 0.2  # what known points get: `Heuristics.first_rung_share`
AT_CEILING = 3  # every third random point: once a trial recovered there, all of them are
OTHER_SEED = 10_000


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is recorded.

    Attributes:
        network: as `oneshot_models.load` names it.
        optimizer: of the fine-tuning.
        epochs: of a trial, over this share of the train split.
        search: samples of the search split that trials are scored on, at most.
        again: trials run a second time.
    """

    network: str
    optimizer: Optimizer
    epochs: float
    share: float
    search: int
    again: int


TARGET = "macs=0.1"  # so deep that no rate of the rounds is cut off
CEILINGS = {1: 0.5, 2: 0.625}
CELLS = {
    "digits": Cell(network="digits", optimizer="sgd", epochs=5.0, share=1.0, search=1000, again=20),
    "digits-muon": Cell(network="digits", optimizer="muon", epochs=5.0, share=1.0, search=1000, again=20),
    "resnet8": Cell(network="resnet8", optimizer="sgd", epochs=1.0, share=0.1, search=2000, again=6),
}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One trial to record."""

    kind: str
    number: int
    point: Point
    first_rung: float
    seed: int


def main() -> None:
    """Record, or replay."""
    args = _arguments()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # GPSampler tells every conditional parameter
    if args.command == "record":
        record(args)
    else:
        write_page(args.csv, args.csv.with_suffix(".md"), args.cache / "sampler-replay.json", args.seeds)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("cell", choices=CELLS)
    recording.add_argument("--round", type=int, choices=(1, 2), default=1)
    recording.add_argument("--trials", type=int, default=150, help="random ones")
    recording.add_argument("--rungs", type=int, default=60, help="first rungs run alone")
    replaying = commands.add_parser("replay")
    replaying.add_argument("--seeds", type=int, default=40)
    for each in (recording, replaying):
        each.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "autoprune-bench")
        each.add_argument("--csv", type=Path, default=RESULTS / "sampler.csv")
    return parser.parse_args()


def record(args: argparse.Namespace) -> None:
    """Run what is missing."""
    cell, done = CELLS[args.cell], {t.key: t for t in read_trials(args.csv)}
    problem = _problem(args.cell, args.cache)
    context = _analysed(_first_context(problem), args.cache / f"sampler-{args.cell}-1.json")
    if args.round == 2:
        context = _second_context(context, cell, [t for t in done.values() if t.of == (args.cell, 1)])
        context = _analysed(context, args.cache / f"sampler-{args.cell}-2.json")
    space = SearchSpace(search=problem.study.search, ceiling=CEILINGS[args.round])
    for job in _jobs(context, space, args, cell.again):
        key = Key(cell=args.cell, round=args.round, kind=job.kind, number=job.number)
        if key not in done:
            trial = _recorded(key, context, space, job, cell)
            append_row(args.csv, trial.row(json.dumps), FIELDS)
            print(trial, flush=True)


def _problem(name: str, cache: Path) -> Problem:
    cell = CELLS[name]
    case = load(cell.network, Path(os.environ.get("AUTOPRUNE_DATA", ".")), cache)
    data = case.data
    if len(data.search) > cell.search:
        data = replace(data, search=data.search.take(np.arange(cell.search)))
    return prepare(
        Study(
            name="sampler", model=case.model, data=data, target=TARGET, device="cpu", round_to=1,
            finetune=Finetune(share=cell.share, optimizer=cell.optimizer),
        )
    )  # fmt: skip


def _first_context(problem: Problem) -> RoundContext:
    start = RoundStart(model=problem.original, graph=problem.graph, plan=PruningPlan.full(problem.graph))
    return RoundContext(
        problem=problem, start=start, target_cost=problem.target_cost, table=None,
        seed=derive_seed(problem.study.seed, 1),
    )  # fmt: skip


def _second_context(first: RoundContext, cell: Cell, trials: list[Trial]) -> RoundContext:
    """On the network of the best recorded trial at the ceiling, which is made again."""
    ceiling = CEILINGS[1]
    deep = [t for t in trials if t.kind in ("first", "random") and t.point["prune_rate"] >= ceiling]
    best = max(deep, key=lambda t: t.top1)
    result = run_trial(
        first, params_of(best.point, ceiling), rungs=_ladder(cell, best.first_rung), seed=best.seed
    )
    assert result.model is not None
    assert result.plan is not None
    print(f"second round on trial {best.number}: {best.top1}, again {result.record.top1}", flush=True)
    problem = first.problem
    graph = trace_for_study(problem.study, result.model, problem.example).with_bounds_of(problem.graph)
    return RoundContext(
        problem=problem, start=RoundStart(model=result.model, graph=graph, plan=result.plan),
        target_cost=problem.target_cost, table=None, seed=derive_seed(problem.study.seed, 2),
    )  # fmt: skip


def _analysed(context: RoundContext, kept: Path) -> RoundContext:
    if not kept.exists():
        problem, start = context.problem, context.start
        table = sensitivity(
            start.model, start.graph, problem.data.search, settings=problem.study.analysis,
            calibration=problem.data.train, device=problem.device,
        )  # fmt: skip
        kept.write_text(table.to_json(), encoding="utf-8")
    return replace(context, table=SensitivityTable.from_json(kept.read_text(encoding="utf-8")))


def _jobs(
    context: RoundContext, space: SearchSpace, args: argparse.Namespace, num_again: int
) -> Iterator[Job]:
    first = initial_points(context, space)
    known = [*first, *(p for p in points_at_ceiling(first, space) if p not in first)]
    for number, params in enumerate(known):
        seed, point = derive_seed(context.seed, number), params.to_optuna()
        yield Job(kind="first", number=number, point=point, first_rung=PRODUCT_SHARE, seed=seed)
    for number in range(args.trials):
        yield _random_job("random", context, space, number, number)
        if number < num_again:
            yield _random_job("again", context, space, number, OTHER_SEED + number)
    for number in range(min(args.trials, args.rungs)):
        yield _random_job(RUNG, context, space, number, number)


def _random_job(kind: str, context: RoundContext, space: SearchSpace, number: int, seed: int) -> Job:
    sampler = optuna.samplers.RandomSampler(seed=derive_seed(context.seed, number) % 2**32)
    asked = optuna.create_study(sampler=sampler).ask()
    suggest(asked, space)
    point = dict(asked.params)
    if number % AT_CEILING == 0:
        point["prune_rate"] = space.ceiling
    share = SHARES[number // AT_CEILING % len(SHARES)]
    return Job(
        kind=kind, number=number, point=point, first_rung=share, seed=derive_seed(context.seed, 100 + seed)
    )


def _ladder(cell: Cell, share: float) -> tuple[float, ...]:
    return (share * cell.epochs, (1 - share) * cell.epochs)


def _recorded(key: Key, context: RoundContext, space: SearchSpace, job: Job, cell: Cell) -> Trial:
    ladder = _ladder(cell, job.first_rung)[: 1 if job.kind == RUNG else 2]
    result = run_trial(context, params_of(job.point, space.ceiling), rungs=ladder, seed=job.seed)
    found = result.record
    if job.kind == RUNG and result.model is not None:
        found = replace(found, top1=_recalibrated(context, result.model))
    return Trial(
        **vars(key), seed=job.seed, ceiling=space.ceiling, first_rung=job.first_rung, point=job.point,
        rate=found.prune_rate or 0.0, cost_share=found.cost_share or 1.0, untuned=found.before_tuning or 0.0,
        rungs=tuple((r.epochs, r.top1) for r in found.rungs), top1=found.top1 or 0.0,
        seconds=found.seconds, failure=found.failure or "",
    )  # fmt: skip


def _recalibrated(context: RoundContext, model: nn.Module) -> float:
    problem, tune = context.problem, context.problem.study.finetune
    recalibrate_(
        model, problem.data.train, num_batches=tune.recalibrate_batches, batch_size=tune.batch_size,
        device=problem.device, seed=context.seed,
    )  # fmt: skip
    return problem.evaluate_on_search(model).top1


if __name__ == "__main__":
    main()
