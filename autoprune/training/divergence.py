"""Divergence: the difference between a training that destroyed its network and one that merely went badly.

A training has diverged if
- its loss, or a weight at its end, is not finite; or
- its loss stays far above that of an untrained network for the whole second half of the schedule, although
  the learning rate falls there. "Untrained" is the worse of two networks: the network as it came (freshly
  pruned, with the loss of the first step), and a network whose outputs are all zero (log C for C classes).

The second rule does not wait for the arithmetic to overflow: at the same rates one processor reaches
infinity and another stays finite with a loss of 1e30. A high loss at the top of the rate that comes down
again, or a score that is merely poor, is a result and no divergence.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.data import Batch
from autoprune.errors import TrialError
from autoprune.torch_private import BatchNormBase, tree_map_only
from autoprune.training import distributed

# The factor by which a loss is far above the untrained one. Measured on a pruned tiny network with both
# optimisers, in bfloat16 and float32, over rates from 1e-2 to 1e10: the losses of the worst network that
# survived end at 9 times, those of the destroyed networks at 1e9 times and more. docs/log.md, 2026-11-28.
FAR = 100.0
HINT = "lower the learning rate's range"


class LossWatch:
    """The first loss of a training and the lowest of its second half, kept on the device.

    Args:
        num_steps: the number of steps of the schedule.
        device: the device of the losses.
    """

    def __init__(self, num_steps: int, device: torch.device) -> None:
        self._num_steps = num_steps
        self._first: Tensor | None = None
        self._lowest = torch.full((), math.inf, device=device)

    def see(self, loss: Tensor, steps_left: int) -> None:
        """Record the loss of one step; `steps_left` steps of the schedule remain, this one included."""
        if self._first is None:
            self._first = loss.float().clone()
        elif 2 * steps_left <= self._num_steps:
            self._lowest = torch.minimum(self._lowest, loss.float())

    def read(self) -> tuple[float, float]:
        """Return the loss of the first step, and the lowest of the second half, infinite without a step.

        A GPU is waited for once.
        """
        assert self._first is not None
        first, lowest = torch.stack([self._first, self._lowest]).tolist()
        return first, lowest


def is_far_above(lowest: float, untrained: float) -> bool:
    """Return whether even the lowest loss is far above that of an untrained network.

    A loss may be negative, so its absolute value is compared. An infinite `lowest` is a half without a
    step.
    """
    return math.isfinite(lowest) and lowest > FAR * abs(untrained)


def check_losses(watch: LossWatch, loss_of_zeros: Callable[[], float], lr: float) -> None:
    """Judge the losses of a whole schedule; all ranks come to the same verdict.

    Args:
        watch: the losses that were recorded.
        loss_of_zeros: computes the loss of outputs that are all zero; called only where the losses are far
            above that of the first step, so that a healthy training pays nothing.
        lr: the schedule's highest rate, for the message.

    Raises:
        TrialError: the training has diverged.
    """
    first, lowest = watch.read()
    if not distributed.from_rank_zero(lambda: is_far_above(lowest, first)):
        return
    level = loss_of_zeros()
    untrained = max(abs(first), abs(level)) if math.isfinite(level) else abs(first)

    def judge() -> None:
        if is_far_above(lowest, untrained):
            raise TrialError(
                f"training diverged: at a learning rate of up to {lr:.3g} the loss stayed above {lowest:.3g} "
                f"for half of the schedule, where an untrained network has {untrained:.3g}",
                HINT,
            )

    distributed.from_rank_zero(judge)


def loss_of_zeros(
    model: nn.Module, batch: Batch, objective: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> float:
    """Return the objective on one batch for outputs that are all zero, of a copy of the model.

    The copy is in training mode, and the model is left unchanged.
    """
    inputs, targets = batch
    blank = _Blank(copy.deepcopy(model).train())
    cuda = [inputs.device] if inputs.is_cuda else []
    with torch.no_grad(), torch.random.fork_rng(devices=cuda):
        loss = objective(blank.to(inputs.device), inputs, targets)
    return float(distributed.mean(loss.detach(), len(targets)))


class _Blank(nn.Module):
    """A network whose outputs have the form of another network's and are all zero."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *inputs: Any) -> Any:
        return tree_map_only(Tensor, torch.zeros_like, self.inner(*inputs))


def check_finite(total: Tensor, lr: float) -> None:
    """Check that a sum of losses is finite; the sum is the same on all ranks.

    Raises:
        TrialError: the sum is not finite.
    """
    value = float(total)
    if not math.isfinite(value):
        raise TrialError(f"training diverged: the loss is {value} at a learning rate of {lr:.3g}", HINT)


def check_weights(model: nn.Module, lr: float) -> None:
    """Check that a training left finite values in trained parameters and batch-norm statistics.

    Other tensors may hold infinities on purpose, such as the mask of an attention.

    Raises:
        TrialError: a value in one of these tensors is not finite.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNormBase)]
    written = [p.detach() for p in model.parameters() if p.requires_grad]
    written += [b for m in norms for b in (m.running_mean, m.running_var) if b is not None]
    finite = bool(torch.stack([t.isfinite().all() for t in written]).all())

    def judge() -> None:
        if not finite:
            raise TrialError(
                f"training diverged: at a learning rate of up to {lr:.3g} the weights are no longer finite",
                HINT,
            )

    distributed.from_rank_zero(judge)
