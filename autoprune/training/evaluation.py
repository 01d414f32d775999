"""Running a network without training it: top-1 and loss on a split, and batch-norm recalibration.

Everything runs in float32, so that numbers compare. The model's mode (every module's own), device, memory
layout and the global random state are left as they were.

Recalibration is that of Li et al. 2020, "EagleEye", section 3.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from autoprune.data import Batch, Split
from autoprune.errors import UsageError
from autoprune.metrics import Evaluation
from autoprune.tasks import CLASSIFICATION, Loss, Task, logits_of
from autoprune.torch_private import BatchNormBase
from autoprune.training import distributed

EVAL_BATCH = 512  # a guess: large enough for a GPU, small enough for any memory


def resolve_device(name: str) -> torch.device:
    """Return the device of this name; `auto` is the GPU where there is one, otherwise the CPU.

    Raises:
        UsageError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"there is no device {name!r} here ({reason})", "write auto, cpu or cuda") from error
    return device


@contextmanager
def model_mode(
    model: nn.Module, device: torch.device, *, training: bool, channels_last: bool = False
) -> Iterator[None]:
    """Put the model into a mode and on a device, and at the end restore modes, device and layout.

    Args:
        model: the network; its first tensor says which device it returns to.
        device: the device inside the context.
        training: whether the mode is that of training.
        channels_last: whether four-dimensional parameters lie channels last inside the context.
    """
    modes = [(module, module.training) for module in model.modules()]
    tensors = [*model.parameters(), *model.buffers()]
    home = tensors[0].device if tensors else device
    turned = [p for p in model.parameters() if channels_last and p.ndim == 4 and p.is_contiguous()]
    try:
        model.to(device).train(training)
        for parameter in turned:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for parameter in turned:
            parameter.data = parameter.data.contiguous()
        model.to(home)
        for module, mode in modes:
            module.training = mode


def evaluate(
    model: nn.Module, split: Split, *, device: torch.device | str = "cpu", batch_size: int = EVAL_BATCH,
    task: Task = CLASSIFICATION,
) -> Evaluation:  # fmt: skip
    """Measure the score and the mean loss of a network on a split, in float32.

    Top-1 comes with per-sample results; a task's own score does not.

    Args:
        model: the network; its mode and device are left as they were.
        split: the samples, read in order and without augmentation.
        device: the device to run on.
        batch_size: the number of samples in a forward pass.
        task: the loss and the score; with a score of its own and the loss of classification, the loss is
            NaN.

    Raises:
        UsageError: top-1 is measured and the output is no table of logits, or the task's own score is
            outside [0, 1].
    """
    with model_mode(model, torch.device(device), training=False), torch.no_grad():
        score = task.score
        if score is None:
            return _evaluate_top1(model, split, device, batch_size, task.loss)
        value = distributed.from_rank_zero(lambda: float(score(model, split, str(device))))
        if not 0 <= value <= 1:
            raise UsageError(
                f"the study's evaluate returned {value}", "return a score from 0 to 1, higher is better"
            )
        mean = math.nan if task.has_logits else _mean_loss(model, split, device, batch_size, task.loss)
    return Evaluation(top1=value, loss=mean, num_samples=len(split))


def _evaluate_top1(
    model: nn.Module, split: Split, device: torch.device | str, batch_size: int, loss: Loss
) -> Evaluation:
    (rank, num_ranks), count = distributed.rank_and_size(), -(-len(split) // batch_size)
    hits, losses = torch.zeros(len(split), dtype=torch.int32), torch.zeros(count, dtype=torch.float64)
    for number, (inputs, targets) in zip(
        range(rank, count, num_ranks), _own_batches(split, batch_size, device), strict=True
    ):
        output, start = model(inputs), number * batch_size
        losses[number] = float(loss(output, targets)) * len(inputs)
        hits[start : start + len(inputs)] = (logits_of(output).argmax(1) == targets).cpu()
    correct, total = (distributed.all_reduce_(t.to(device)).cpu().numpy() for t in (hits, losses))
    return Evaluation(
        top1=float(correct.mean()), loss=float(total.sum()) / len(split), num_samples=len(split),
        correct=correct.astype(np.bool_),
    )  # fmt: skip


def _own_batches(split: Split, batch_size: int, device: torch.device | str) -> Iterator[Batch]:
    """Give every n-th batch, where n ranks evaluate together; the last batch may be smaller."""
    rank, size = distributed.rank_and_size()
    if size > 1:
        batch = np.arange(len(split)) // batch_size
        indices = np.flatnonzero(batch % size == rank).astype(np.int64)
        if not len(indices):
            return
        split = split.take(indices)
    yield from split.batches(batch_size, device=device)


def _mean_loss(
    model: nn.Module, split: Split, device: torch.device | str, batch_size: int, loss: Loss
) -> float:
    batches = split.batches(batch_size, device=device)
    return sum(float(loss(model(x), y)) * len(x) for x, y in batches) / len(split)


def recalibrate_(
    model: nn.Module, split: Split, *, num_batches: int, batch_size: int = 128,
    device: torch.device | str = "cpu", seed: int = 0,
) -> None:  # fmt: skip
    """Estimate all batch-norm statistics anew, in place, as the mean over `num_batches` shuffled batches.

    Only the running statistics change: there are no gradients and no dropout. The batches are augmented as
    in training, because the weights were fitted to those statistics: with plain images an intact ResNet-20
    falls from 92.1 to 89.5 % on CIFAR-10, with augmented images it stays (5,000 images, 20 to 100 batches
    of 128). A model without batch norms, and `num_batches` of 0, change nothing. The method is that of Li
    et al. 2020, "EagleEye", section 3.3.
    """
    norms = [m for m in model.modules() if isinstance(m, BatchNormBase) and m.track_running_stats]
    if not norms or num_batches <= 0:
        return
    momenta = [norm.momentum for norm in norms]
    with model_mode(model, torch.device(device), training=False), torch.no_grad():
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # torch's sign for a cumulative average
            norm.training = True
        try:
            batches = split.batches(batch_size, device=device, seed=seed, augment=True)
            rank, size = distributed.rank_and_size()
            num_own = 0
            for number, (inputs, _) in zip(range(num_batches), batches, strict=False):
                if number % size == rank:
                    model(inputs)
                    num_own += 1
            distributed.average_statistics_(norms, num_own)
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
