"""The check of a study, before anything is trained or written.

Whatever can be known to be wrong is reported here. `prepare` turns a study into a `Problem`: the network, its
graph, the data, the device, and the target in absolute numbers. `forecast_run` adds what a dry run shows: the
rounds to come.
"""

from __future__ import annotations

import copy
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.artifact import export_model
from autoprune.config import Budget, Protection, Study, Target, check_study
from autoprune.crypto import check_protection, sign_manifest
from autoprune.data import Data
from autoprune.errors import AutopruneError, ConfigError, RunError, UnreachableError, UsageError
from autoprune.formatting import milliseconds
from autoprune.location import RunLocation
from autoprune.metrics import Evaluation, wilson_interval
from autoprune.pruning import CRITERIA, STRATEGIES
from autoprune.search import Goal, Problem, forecast_ceilings, initial_state
from autoprune.serialization import to_plain
from autoprune.storage import has_run
from autoprune.structure import ChannelGraph, device_name, trace, with_latency_model
from autoprune.tasks import task_of
from autoprune.training import resolve_device

PACKAGES = ("autoprune", "torch", "optuna", "numpy", "onnx", "pyrage", "safetensors")


@dataclass(frozen=True, kw_only=True)
class ForecastRound:
    """A round to come, if every round before it succeeds at its ceiling."""

    number: int
    ceiling: float
    cost_share: float
    floor: float | None


@dataclass(frozen=True, kw_only=True)
class RunForecast:
    """The forecast of a run; floors are known where the network comes trained."""

    name: str
    target: str
    metric: str
    original_cost: float
    target_cost: float
    macs: int
    params: int
    num_groups: int
    num_frozen: int
    num_samples: dict[str, int]
    top1: float | None
    floor: float | None
    budget: str
    device: str
    rounds: tuple[ForecastRound, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class TracedStudy:
    """A study's own copy of its network, its data, one real input, and the network's graph."""

    model: nn.Module
    data: Data
    example: tuple[Tensor, ...]
    graph: ChannelGraph


def trace_study(study: Study) -> TracedStudy:
    """Build a study's network and data, and trace the one with the other.

    Raises:
        UsageError: the network or the data cannot be made, or the network cannot be traced.
    """
    data = _build_data(study)
    model = _copy_model(study)
    example = _first_input(data)
    graph = trace_for_study(study, model, example)
    return TracedStudy(model=model, data=data, example=example, graph=graph)


def prepare(
    study: Study,
    *,
    out: Path | RunLocation | None = None,
    resume: bool = False,
    protection: Protection | None = None,
) -> Problem:
    """Check a study, its data, its network, and that it can be delivered; nothing is trained or written.

    Args:
        study: the study to run.
        out: the place where the run is kept; None leaves the place unchecked.
        resume: whether a run may exist already, which has measured the network.
        protection: the protection of the delivered file; None leaves it unchecked.

    Raises:
        UsageError: something is wrong; no work was lost.
    """
    check_study(study)
    _check_choices(study)
    if out is not None:
        check_location(out, study.name, resume=resume)
    if protection is not None:
        _check_protection(protection)
    device, target = resolve_device(study.device), Target.parse(study.target)
    traced = trace_study(study)
    graph = traced.graph
    if target.metric == "latency":
        graph = with_latency_model(graph, traced.model, traced.example, device)
    original_cost, target_cost = _costs(target, graph)
    if out is not None and not resume:
        check_delivery(traced.model, traced.example)
    problem = Problem(
        study=study, task=task_of(study), target=target, budget=Budget.parse(study.budget),
        original=traced.model, graph=graph, data=traced.data, device=device, example=traced.example,
        original_cost=original_cost, target_cost=target_cost,
    )  # fmt: skip
    is_measured = resume and out is None  # a worker joins a run whose original was measured
    if study.baseline or is_measured:
        return problem
    return replace(problem, search_evaluation=evaluate_original(problem))


def _check_protection(protection: Protection) -> None:
    if not protection.plain and (protection.recipients or protection.passphrase is not None):
        check_protection(protection.recipients, protection.passphrase)
    if protection.signing_key is not None:
        sign_manifest(b"", protection.signing_key)


def check_delivery(model: nn.Module, example: tuple[Tensor, ...]) -> None:
    """Export the original once, so that no night is spent on a network that cannot be delivered.

    Cost: about two seconds for a small network, up to a minute for one of thousands of operators.

    Raises:
        UsageError: the network cannot be exported, or the exported forms compute something else.
    """
    try:
        export_model(model, example)
    except AutopruneError as error:
        raise UsageError(f"the network could not be delivered: {error.message}", error.hint) from error


def trace_for_study(study: Study, model: nn.Module, example: tuple[Tensor, ...]) -> ChannelGraph:
    """Return the graph of a network, with what the study allows to be pruned."""
    graph = trace(
        model,
        example,
        exclude=study.exclude,
        only=study.only,
        norms=study.norms,
        round_to=study.round_to or study.heuristics.round_to,
    )
    return graph.with_bounds(min_keep=study.min_keep, max_ratio=study.max_ratio)


def evaluate_original(problem: Problem) -> Evaluation:
    """Evaluate the original on the search split.

    Raises:
        UsageError: the original is no better than guessing.
        RunError: the original is no better than guessing though the study trained it.
    """
    study, data = problem.study, problem.data
    evaluation = problem.evaluate_on_search(problem.original)
    chance = 1 / data.num_classes if data.num_classes > 1 and study.evaluate is None else 0.0
    if wilson_interval(evaluation.top1, evaluation.num_samples).low <= chance:
        top1, samples = evaluation.top1, evaluation.num_samples
        message = f"the network scores {top1:.4f} on {samples} samples of the search split"
        if study.baseline:
            raise RunError(
                f"{message} after training: no better than guessing",
                "give the baseline more epochs, or another lr",
            )
        raise UsageError(
            f"{message}: no better than guessing among {data.num_classes} classes",
            "load trained weights into it, check that inputs are normalised as in training, or give the "
            "study a baseline=Baseline(epochs=...) to train it first",
        )
    return evaluation


def forecast_run(problem: Problem) -> RunForecast:
    """Return the rounds to come if all of them succeed at their ceilings."""
    study, data, before = problem.study, problem.data, problem.search_evaluation
    goal = Goal(
        baseline_top1=before.top1 if before else 1.0,
        max_drop_pp=study.max_drop,
        target_share=problem.target_share,
    )
    share, rounds = 1.0, []
    ceilings = forecast_ceilings(initial_state(goal, study.control), study.control, goal.target_share)
    for number, ceiling in enumerate(ceilings, 1):
        share *= 1 - ceiling
        floor = goal.floor_at(share) if before else None
        rounds.append(ForecastRound(number=number, ceiling=ceiling, cost_share=share, floor=floor))
    cost = problem.graph.cost()
    return RunForecast(
        name=study.name, target=study.target, metric=problem.metric, original_cost=problem.original_cost,
        target_cost=problem.target_cost, macs=cost.macs, params=cost.params,
        num_groups=len(problem.graph.groups), num_frozen=len(problem.graph.frozen),
        num_samples={"train": len(data.train), "search": len(data.search), "test": len(data.test)},
        top1=before.top1 if before else None, floor=goal.floor if before else None,
        budget=study.budget, device=str(problem.device), rounds=tuple(rounds),
    )  # fmt: skip


def check_location(out: Path | RunLocation, name: str, *, resume: bool) -> None:
    """Check that a run may be kept in a place: an empty or new folder or, to resume, that of a run.

    Raises:
        UsageError: the run may not be kept there.
    """
    location = out if isinstance(out, RunLocation) else RunLocation(folder=out)
    folder, exists = location.folder, has_run(location, name)
    if exists and not resume:
        hint = f"continue the run {name!r} with --resume, or choose another --out"
        raise UsageError(f"{location} exists; a run is never overwritten", hint)
    if (
        location.is_local
        and not exists
        and folder.exists()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise UsageError(f"{folder} exists; a run is never overwritten", "choose another --out")
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} cannot be written: no permission in {parent}", "choose another --out")


@contextmanager
def thread_limit(study: Study, graph: ChannelGraph) -> Iterator[None]:
    """Use one thread for networks whose batches are too small to share out, for the length of a `with` block.

    A rule decides rather than a timing, so that a seed gives the same weights each time. Measured on two
    cores at 0.2e9 MACs a batch: one thread is as fast as two, and ten times as fast where others want the
    cores. A latency is the user's with the threads that they gave, so with such a target the number stays.
    """
    before = torch.get_num_threads()
    batch_macs = graph.cost().macs * study.finetune.batch_size
    is_small = batch_macs < study.heuristics.small_batch_macs
    if is_small and Target.parse(study.target).metric != "latency":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def plain_settings(study: Study) -> dict[str, Any]:
    """Return the resolved study as plain values; functions, networks and data by their names."""
    values = {f.name: getattr(study, f.name) for f in fields(study)}
    return {name: _plain(value) for name, value in values.items()}


def environment(device: torch.device) -> dict[str, str]:
    """Return what the numbers of a run depend on: versions and machine."""
    return {
        "device": f"{device.type} ({device_name(device)}, {_threads()})",
        "platform": platform.platform(),
        "python": platform.python_version(),
        **{name: version(name) for name in PACKAGES},
    }


def _check_choices(study: Study) -> None:
    allowed_in = (
        ("criteria", study.search.criteria, CRITERIA),
        ("strategies", study.search.strategies, STRATEGIES),
    )
    problems = [
        UsageError(f"search.{name}={chosen} is not allowed", f"choose from {', '.join(allowed)}")
        for name, chosen, allowed in allowed_in
        if not chosen or set(chosen) - set(allowed)
    ]
    table_file = study.analysis.known
    if table_file is not None and not Path(table_file).is_file():
        hint = "name the analysis.json that `autoprune analyze` wrote"
        problems.append(UsageError(f"analysis.known={table_file} is no file", hint))
    if problems:
        raise ConfigError(problems)


def _copy_model(study: Study) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(study.seed)  # a network that is built untrained starts from the study's seed
        is_network = isinstance(study.model, nn.Module) or not callable(study.model)
        built = study.model if is_network else study.model()
    if not isinstance(built, nn.Module):
        raise UsageError(
            f"the study's model is a {type(built).__name__}",
            "give a torch.nn.Module or a function that builds one",
        )
    return copy.deepcopy(built).cpu()


def _build_data(study: Study) -> Data:
    data = study.data() if callable(study.data) else study.data
    if not isinstance(data, Data):
        raise UsageError(
            f"the study's data is a {type(data).__name__}",
            "give what load_data or from_datasets returns, or a function that returns it",
        )
    return data


def _first_input(data: Data) -> tuple[Tensor, ...]:
    inputs, _ = next(iter(data.search.take(np.zeros(1, dtype=np.int64)).batches(1)))
    return tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)


def _costs(target: Target, graph: ChannelGraph) -> tuple[float, float]:
    """Return the original's cost and the allowed cost, in the target's metric.

    Raises:
        UsageError: the target is met already, or no plan can meet it.
    """
    metric = target.metric
    original = graph.cost().of(metric)
    allowed = target.absolute(original)
    if allowed >= original:
        allowed_text, original_text = (
            milliseconds(1000 * c) if metric == "latency" else f"{int(c):,}" for c in (allowed, original)
        )
        raise UsageError(
            f"target {target} asks for {allowed_text}, and the network costs only {original_text}",
            "ask for less than it costs, or for a fraction as in macs=0.5",
        )
    nearest = graph.cost_of_counts({g.name: int(g.allowed_counts[-1]) for g in graph.groups}).of(metric)
    if nearest > allowed:
        raise UnreachableError(
            f"target {target} cannot be reached: with as few units as may be in each of {len(graph.groups)} "
            f"groups (min_keep, max_ratio), {metric} is still {nearest / original:.3f} of the original",
            "ask for more, or see with autoprune groups which parameters are frozen, and why",
            nearest_cost=nearest,
        )
    return original, allowed


def _plain(value: Any) -> Any:
    if isinstance(value, nn.Module | Data):
        return type(value).__qualname__
    if isinstance(value, Callable):  # type: ignore[arg-type]  # any callable
        return getattr(value, "__qualname__", type(value).__qualname__)
    return to_plain(value)


def _threads() -> str:
    number = torch.get_num_threads()
    return f"{number} thread" if number == 1 else f"{number} threads"
