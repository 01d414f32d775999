"""The four other ways of bench_quality.py to spend the same training samples on a smaller network.

1. `one-shot`: Torch-Pruning, global group magnitude, in one step, then one fine-tuning of all samples: SGD,
   learning rate 0.01, cosine. What a good engineer writes by hand.
2. `five steps`: the same in five steps of equal factors, each with a fifth of the samples.
3. `optuna`: the network of the first; Optuna's default sampler searches learning rate and decay.
4. `nncf`: the accuracy-aware loop of NNCF up to 2.19 (its constants: steps of 0.1, halved with the learning
   rate when the direction flips, at least 0.025; at most 5 epochs first and 3 later), on autoprune's engine.

All train with autoprune's own loop (bfloat16, channels last), without its distillation and its search. Torch-
Pruning gets shortcuts that it can prune, and the better of pruning all or only inside the blocks (by the
search split).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import optuna
import torch
from oneshot_rival import Variant, macs, prunable, prune, variants
from torch import nn

from autoprune.config import DECAYS, Decay, Finetune
from autoprune.data.sources import Data
from autoprune.pruning.allocation import allocate
from autoprune.pruning.criteria import score
from autoprune.structure.densify import densify
from autoprune.structure.tracing import trace
from autoprune.training.evaluation import evaluate, recalibrate_
from autoprune.training.finetune import finetune_
from autoprune.training.schedule import Schedule

TRIALS = 8  # of `optuna`: as many as leave each its eighth of the samples
STEPS = 5
LR = 0.01


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """A trained network, its data, and what may be spent.

    Attributes:
        share: of the multiply-adds that may be left.
        epochs: in all, over the whole train split.
        max_drop: in percentage points, for those who ask.
    """

    model: nn.Module
    data: Data
    share: float
    epochs: float
    seed: int
    weight_decay: float
    max_drop: float

    @property
    def example(self) -> torch.Tensor:
        """One input."""
        return torch.zeros(1, *self.data.input_shape)


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """A network, the share of the multiply-adds that it has, and the epochs that went into it."""

    model: nn.Module
    share: float
    epochs: float


def one_shot(task: Task) -> Made:
    """Prune at once, train once."""
    model, share = _pruned(prunable(task.model), task, task.share)
    _tune_(model, task, task.epochs, Schedule(lr=LR, decay="cosine", warmup=0.0), task.seed)
    return Made(model=model, share=share, epochs=task.epochs)


def five_steps(task: Task) -> Made:
    """Prune a little, train a little."""
    model, share = prunable(task.model), 1.0
    for step in range(1, STEPS + 1):
        model, share = _pruned(model, task, task.share ** (step / STEPS))
        schedule = Schedule(lr=LR, decay="cosine", warmup=0.0)
        _tune_(model, task, task.epochs / STEPS, schedule, task.seed + 100 * step)
    return Made(model=model, share=share, epochs=task.epochs)


def plain_optuna(task: Task) -> Made:
    """One pruned network, many learning rates."""
    pruned, share = _pruned(prunable(task.model), task, task.share)
    made: dict[int, nn.Module] = {}

    def objective(trial: optuna.Trial) -> float:
        decay: Decay = trial.suggest_categorical("decay", DECAYS)
        lr = trial.suggest_float("lr", 1e-3, 0.2, log=True)
        extra = {"step": {"gamma": 0.1, "milestones": 2}, "exponential": {"gamma": 0.01},
                 "onecycle": {"peak": 0.3}}.get(decay, {})  # fmt: skip
        model = copy.deepcopy(pruned)
        schedule = Schedule(lr=lr, decay=decay, warmup=0.0, **extra)
        _tune_(model, task, task.epochs / TRIALS, schedule, task.seed + trial.number)
        made[trial.number] = model
        return evaluate(model, task.data.search).top1

    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=task.seed))
    study.optimize(objective, n_trials=TRIALS)
    return Made(model=made[study.best_trial.number], share=share, epochs=task.epochs)


def nncf_loop(task: Task) -> Made:
    """Up by a step when the accuracy holds, down by half of it when it does not; never above the target."""
    floor = evaluate(task.model, task.data.search).top1 - task.max_drop / 100
    best = Made(model=task.model, share=1.0, epochs=0.0)
    rate, step, rising, lr, spent = 0.1, 0.1, True, LR, 0.0
    goal = 1 - task.share
    while spent < task.epochs - 1e-9 and step >= 0.025 and 0 <= rate <= 0.95:
        rate = min(rate, goal)
        model, share = _by_engine(best.model if rising else task.model, task, rate)
        held = False
        for _ in range(5 if spent == 0 else 3):
            part = min(1.0, task.epochs - spent)
            if part <= 1e-9:
                break
            schedule = Schedule(lr=lr, decay="linear", final=0.99, warmup=0.0)
            _tune_(model, task, part, schedule, 1000 * task.seed + int(spent) + 7)
            spent += part
            held = evaluate(model, task.data.search).top1 >= floor
            if held and rate < goal:
                break
        if held and share < best.share:
            best = Made(model=model, share=share, epochs=spent)
        if held and rate >= goal:
            left = task.epochs - spent
            if left > 1e-9:
                schedule = Schedule(lr=lr, decay="linear", final=0.99, warmup=0.0)
                _tune_(model, task, left, schedule, 1000 * task.seed + 999)
            return Made(model=model, share=share, epochs=task.epochs)
        if held != rising:
            step, lr, rising = step / 2, lr / 2, held
        rate += step if held else -step
    return Made(model=best.model, share=best.share, epochs=spent)


RIVALS: dict[str, Callable[[Task], Made]] = {
    "one-shot": one_shot, "five steps": five_steps, "optuna": plain_optuna, "nncf": nncf_loop,
}  # fmt: skip


def _pruned(model: nn.Module, task: Task, share: float) -> tuple[nn.Module, float]:
    """By Torch-Pruning's global group magnitude, to a share of the original's multiply-adds or just above."""
    whole, found = macs(prunable(task.model), task.example), []
    for variant in (v for v in variants(model) if (v.scope, v.importance) == ("global", "L2")):
        made, cost = prune(model, task.example, Variant(**vars(variant)), share * whole)
        ready = copy.deepcopy(made)
        recalibrate_(ready, task.data.train, num_batches=20, seed=task.seed)
        found.append((evaluate(ready, task.data.search).top1, cost / whole, made))
    # where one variant cannot reach the target, the one that can is taken
    near = [f for f in found if f[1] <= 1.02 * share] or found
    _, reached, best = max(near, key=lambda f: f[0])
    return best, reached


def _by_engine(model: nn.Module, task: Task, rate: float) -> tuple[nn.Module, float]:
    """Global L2, by autoprune's engine: this rate of the original's multiply-adds is gone."""
    whole = trace(task.model, task.example).cost().macs
    graph = trace(model, task.example)
    limit = min(graph.cost().macs, (1 - rate) * whole)
    scores = score(model, graph, "l2", split=task.data.train)
    plan = allocate(graph, scores, metric="macs", limit=limit, strategy="global", table=None)
    return densify(model, graph, plan), graph.cost(plan).macs / whole


def _tune_(model: nn.Module, task: Task, epochs: float, schedule: Schedule, seed: int) -> None:
    settings = Finetune(optimizer="sgd", distill=0.0, weight_decay=task.weight_decay)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    finetune_(model, task.data.train, schedule=schedule, settings=settings, epochs=epochs, seed=seed)
    assert all(p.grad is None for p in frozen)
