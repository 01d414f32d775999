"""The importance of units: one function per ranking criterion, where a higher score is more important.

A score judges a whole unit: all parameters that would go with it, in every layer of its group (Fang et al.
2023, "DepGraph", section 3.3). Scores are divided by their group's mean, so that groups compare.

`bn_scale` cannot rank a group without batch norm; such groups are ranked by `l2` instead, and
`fallback_groups` names them.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.data import Split
from autoprune.errors import UsageError
from autoprune.structure import ChannelGraph, Group, Member
from autoprune.tasks import CLASSIFICATION, Loss, Task
from autoprune.torch_private import BatchNormBase
from autoprune.training import model_mode

Values = NDArray[np.float64]
Scores = dict[str, Values]

TAYLOR_BATCHES, TAYLOR_BATCH = 16, 64  # about a thousand samples rank as ten thousand do (a guess)
FISHER_BATCHES, FISHER_BATCH = (
    32,
    32,
)  # few a batch are near the definition, batch norm wants many: a guess


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoringContext:
    """The network, the data and the settings that a criterion may use."""

    model: nn.Module
    graph: ChannelGraph
    split: Split | None
    device: torch.device
    loss: Loss
    seed: int

    def weights(self, group: Group, *roles: str) -> Iterator[tuple[Member, Tensor]]:
        """Give the group's parameters in these roles, on the CPU in float64, without biases.

        Biases are left out because a bias makes no feature.
        """
        named = dict(self.model.named_parameters(remove_duplicate=False))
        for member in group.members:
            parameter = named.get(member.name)
            if parameter is not None and member.role in roles and not member.name.endswith("bias"):
                yield member, parameter.detach().to("cpu", torch.float64)


def score(  # noqa: PLR0913 - where and on what to compute are the caller's to say
    model: nn.Module, graph: ChannelGraph, criterion: str, *, split: Split | None = None,
    device: torch.device | str = "cpu", task: Task = CLASSIFICATION, seed: int = 0,
) -> Scores:  # fmt: skip
    """Score every unit of every group; the units with the highest scores are to be kept.

    Args:
        model: the network that `graph` was traced from; it is left unchanged.
        graph: the groups of the network.
        criterion: one of `CRITERIA`.
        split: the samples for `taylor`, `fisher` and `jacobian`, which use a small fixed part of them.
        device: the device on which these three run.
        task: the task whose loss `taylor`, `fisher` and `jacobian` differentiate.
        seed: the seed that chooses the samples, and the scores of `random`.

    Returns:
        Group name -> scores (num_units,) in float64, with mean 1 in each group.

    Raises:
        UsageError: the criterion is not known, or needs a split that is not given.
    """
    check_criterion(criterion)
    if criterion in NEEDS_SPLIT and split is None:
        raise UsageError(f"criterion {criterion} needs data", "give it a split, for example data.train")
    context = ScoringContext(
        model=model, graph=graph, split=split, device=torch.device(device),
        loss=task.loss, seed=seed,
    )  # fmt: skip
    return {name: _relative(values) for name, values in _CRITERIA[criterion](context).items()}


def check_criterion(criterion: str) -> None:
    """Check that a criterion exists.

    Raises:
        UsageError: the criterion does not exist; the hint names the nearest.
    """
    if criterion not in _CRITERIA:
        near = difflib.get_close_matches(criterion, CRITERIA, n=1)
        names = f"known are {', '.join(CRITERIA)}"
        raise UsageError(
            f"there is no criterion {criterion!r}",
            f"did you mean {near[0]}? {names}" if near else names,
        )


def fallback_groups(model: nn.Module, graph: ChannelGraph, criterion: str) -> tuple[str, ...]:
    """Return the names of the groups that `criterion` cannot rank, so that `l2` ranks them."""
    if criterion != "bn_scale":
        return ()
    scales = _batch_norm_scales(model)
    return tuple(g.name for g in graph.groups if not any(m.name in scales for m in g.members))


def l1(context: ScoringContext) -> Scores:
    """Sum the absolute weights of each unit, over the whole group.

    Li et al. 2017, "Pruning Filters", section 3.1.
    """
    return _each_group(context, lambda g: _sum_of(context, g, torch.abs))


def l2(context: ScoringContext) -> Scores:
    """Return the root of the sum of squared weights of each unit, over the whole group.

    Fang et al. 2023, "DepGraph", equation 4.
    """
    return _each_group(context, lambda g: np.sqrt(_sum_of(context, g, torch.square)))


def fpgm(context: ScoringContext) -> Scores:
    """Sum the distances of each filter to the group's others: filters near the middle are replaceable.

    He et al. 2019, "Filter Pruning via Geometric Median", equation 8. A filter is the weights that make a
    channel; in a group that no layer of the network makes, it is the weights that read the channel.
    """
    return _each_group(context, lambda g: _distances(context, g))


def bn_scale(context: ScoringContext) -> Scores:
    """Return the absolute batch-norm scale of each unit; see `fallback_groups`.

    Liu et al. 2017, "Network Slimming", section 3.
    """
    scales = _batch_norm_scales(context.model)
    missing = fallback_groups(context.model, context.graph, "bn_scale")

    def of_group(group: Group) -> Values:
        if group.name in missing:
            return np.asarray(np.sqrt(_sum_of(context, group, torch.square)))
        sums = [_per_unit(w.abs(), m) for m, w in context.weights(group, "affine") if m.name in scales]
        return np.asarray(np.sum(sums, axis=0))

    return _each_group(context, of_group)


def taylor(context: ScoringContext) -> Scores:
    """Return |sum of gradient x weight| over the parameters that read each unit, the mean over batches.

    The score is the first order of the loss change when the unit goes (Molchanov et al. 2017, equation 7,
    on parameters as in Molchanov et al. 2019, equation 8). The absolute value is taken per batch: at the
    end of a training the gradient of all the data together is nearly zero.
    """
    return _mean_over_batches(context, TAYLOR_BATCHES, TAYLOR_BATCH, np.abs, _readers)


def fisher(context: ScoringContext) -> Scores:
    """Return (sum of gradient x weight)² over the parameters that read each unit, the mean over batches.

    Liu et al. 2021, "Group Fisher Pruning", equation 5, without its division by memory; the batches are
    small.
    """
    return _mean_over_batches(context, FISHER_BATCHES, FISHER_BATCH, np.square, _readers)


def jacobian(context: ScoringContext) -> Scores:
    """Return (sum of gradient x weight)² over all parameters of each unit, the mean over batches.

    The score is wᵀJᵀJw, where a row of J is a batch's gradient by all parameters of the unit, so that their
    joint effect counts (Chen et al. 2025, "Optimal Brain Connection"). Biases are left out.
    """
    return _mean_over_batches(context, TAYLOR_BATCHES, TAYLOR_BATCH, np.square, _coupled)


def random(context: ScoringContext) -> Scores:
    """Return random scores, the control: any criterion worth its name does better."""
    rng = np.random.default_rng(context.seed)
    return _each_group(context, lambda g: rng.uniform(0.5, 1.5, g.num_units))


_CRITERIA: dict[str, Callable[[ScoringContext], Scores]] = {
    "l1": l1, "l2": l2, "fpgm": fpgm, "bn_scale": bn_scale, "taylor": taylor, "fisher": fisher,
    "jacobian": jacobian, "random": random,
}  # fmt: skip
CRITERIA = tuple(_CRITERIA)
NEEDS_SPLIT = ("taylor", "fisher", "jacobian")


def _relative(values: Values) -> Values:
    """Divide the scores of a group by their mean; return ones where the mean is zero."""
    mean = float(values.mean())
    return values / mean if mean > 0 else np.ones_like(values)


def _each_group(context: ScoringContext, of_group: Callable[[Group], Values]) -> Scores:
    return {group.name: of_group(group) for group in context.graph.groups}


def _per_unit(values: Tensor, member: Member) -> Values:
    """Sum a tensor of the parameter's shape over everything that each unit owns: (num_units,)."""
    by_position = values.transpose(0, member.dim).flatten(1).sum(1) if values.ndim > 1 else values
    return np.asarray(by_position.numpy()[member.index].sum(axis=1), dtype=np.float64)


def _sum_of(context: ScoringContext, group: Group, function: Callable[[Tensor], Tensor]) -> Values:
    sums = [_per_unit(function(w), m) for m, w in context.weights(group, "out", "in", "affine")]
    return np.sum(sums, axis=0) if sums else np.ones(group.num_units)


def _distances(context: ScoringContext, group: Group) -> Values:
    total = np.zeros(group.num_units)
    members = list(context.weights(group, "out")) or list(context.weights(group, "in"))
    for member, weight in members:
        rows = weight.transpose(0, member.dim)[torch.from_numpy(member.index)].flatten(1)
        total += torch.cdist(rows, rows).sum(1).numpy()
    return total


def _batch_norm_scales(model: nn.Module) -> set[str]:
    norms = (n for n, m in model.named_modules() if isinstance(m, BatchNormBase) and m.affine)
    return {f"{name}.weight" if name else "weight" for name in norms}


def _mean_over_batches(
    context: ScoringContext, num_batches: int, batch_size: int, function: Callable[[Values], Values],
    members_of: Callable[[Group, Mapping[str, nn.Parameter]], list[Member]],
) -> Scores:  # fmt: skip
    """Return the mean over batches of function(sum of gradient x weight over each unit).

    The network is in evaluation mode, but batch norms use their batch's statistics: a pruned network has
    them estimated anew, which undoes the effect of a channel on a mean and a variance, and the gradient
    should reflect this (figures: docs/analysis.md).
    """
    assert context.split is not None  # `score` checked it
    named = dict(context.model.named_parameters(remove_duplicate=False))
    members_by_group = {g.name: members_of(g, named) for g in context.graph.groups}
    weights = {m.name: named[m.name] for members in members_by_group.values() for m in members}
    totals = {g.name: np.zeros(g.num_units) for g in context.graph.groups}
    with (
        model_mode(context.model, context.device, training=False), _batch_statistics(context.model),
        _differentiable(list(weights.values())),
    ):  # fmt: skip
        batches = context.split.batches(batch_size, device=context.device, seed=context.seed, augment=True)
        for _, (inputs, targets) in zip(range(num_batches), batches, strict=False):
            loss = context.loss(context.model(inputs), targets)
            gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
            products = {
                name: (weight.detach() * gradient).to("cpu", torch.float64)
                for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
            }
            for group in context.graph.groups:
                parts = [_per_unit(products[m.name], m) for m in members_by_group[group.name]]
                totals[group.name] += function(np.sum(parts, axis=0))
    return totals


def _coupled(group: Group, named: Mapping[str, nn.Parameter]) -> list[Member]:
    """Return all parameters of a group but its biases."""
    return [m for m in group.members if m.name in named and not m.name.endswith("bias")]


def _readers(group: Group, named: Mapping[str, nn.Parameter]) -> list[Member]:
    """Return the parameters that read a group; where none reads it, return all its parameters.

    The sum over the readers is the derivative by a factor on the channel. The parameters that make the
    channel go with it and would count the same effect again.
    """
    members = [m for m in group.members if m.name in named]
    return [m for m in members if m.role == "in"] or members


@contextmanager
def _batch_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norms use their batch's statistics inside the context, and keep the running ones."""
    norms = [m for m in model.modules() if isinstance(m, BatchNormBase) and m.track_running_stats]
    try:
        for norm in norms:
            norm.training, norm.track_running_stats = True, False
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True


@contextmanager
def _differentiable(parameters: list[nn.Parameter]) -> Iterator[None]:
    """Let gradients flow to these parameters, frozen ones too, inside the context."""
    before = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
