"""Several processes that run one trial together, as `torchrun` starts them; alone, everything is as it was.

Inside `shared_work` each rank takes its part of every batch, and what the parts give is joined so that the
result is that of one process with the same batches, but for the order in which floats are added: gradients
by DistributedDataParallel, batch-norm statistics by synchronised sums, decisions by the first rank alone.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from autoprune.errors import AutopruneError
from autoprune.torch_private import BatchNormBase

T = TypeVar("T")
WAIT = timedelta(days=2)  # the other ranks wait while the first one waits for a round to be planned
_SHARES_WORK: ContextVar[bool] = ContextVar("shared_work", default=False)


@contextmanager
def process_group() -> Iterator[int]:
    """Join the ranks that `torchrun` started, if it did; gives this process's rank."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo", timeout=WAIT)
    try:
        yield dist.get_rank()
    finally:
        # DistributedDataParallel lies in reference cycles and holds threads of the group: what outlives the
        # group aborts the process when Python ends (torch 2.14: 4 of 8 runs; 0 of 8 with this line).
        gc.collect()
        dist.destroy_process_group()


@contextmanager
def shared_work() -> Iterator[None]:
    """What is trained and evaluated in here is shared among the ranks; all of them have to come."""
    token = _SHARES_WORK.set(dist.is_available() and dist.is_initialized())
    try:
        yield
    finally:
        _SHARES_WORK.reset(token)


def world_size() -> int:
    """Return how many ranks share the work of this moment."""
    return dist.get_world_size() if _SHARES_WORK.get() else 1


def rank_and_size() -> tuple[int, int]:
    """This rank's number, and how many ranks share the work of this moment."""
    return (dist.get_rank() if _SHARES_WORK.get() else 0, world_size())


def send_job(job: object) -> None:
    """The first rank tells the others what to do next; alone it tells nobody."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list([job], src=0)


def receive_job() -> Any:
    """What the first rank announces."""
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_rank_zero(make: Callable[[], T]) -> T:
    """What the first rank makes, for all; an error meant for people is raised everywhere."""
    if world_size() == 1:
        return make()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = make()
        except AutopruneError as error:
            box[1] = (type(error), error.message, error.hint)
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        kind, message, hint = box[1]
        raise kind(message, hint)
    result: T = box[0]
    return result


def all_reduce_(tensor: Tensor) -> Tensor:
    """Add a tensor over all ranks, in place, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def mean(value: Tensor, count: int) -> Tensor:
    """Return the mean over all samples, from each rank's mean over `count` samples; without gradients."""
    if world_size() == 1:
        return value
    both = all_reduce_(
        torch.stack([value.detach().double() * count, torch.tensor(float(count)).to(value.device)])
    )
    return (both[0] / both[1]).to(value.dtype)


def scale_loss(loss: Tensor, count: int) -> Tensor:
    """Scale a rank's mean loss so that the mean of all ranks' gradients is that of the whole batch's loss."""
    if world_size() == 1:
        return loss
    total = all_reduce_(torch.tensor(float(count), device=loss.device))
    return loss * (count * world_size() / total)


@contextmanager
def parallel(model: nn.Module) -> Iterator[nn.Module]:
    """What to call in place of the model while it trains: all ranks make the same step."""
    if world_size() == 1:
        yield model
        return
    norms = [m for m in model.modules() if isinstance(m, BatchNormBase)]
    for norm in norms:
        norm.forward = partial(_synchronised, norm)  # type: ignore[method-assign]  # taken back below
    on_cuda = next(model.parameters()).is_cuda
    try:
        yield DistributedDataParallel(
            model, device_ids=[torch.cuda.current_device()] if on_cuda else None, broadcast_buffers=False,
            find_unused_parameters=True,
        )  # fmt: skip
    finally:
        for norm in norms:
            del norm.forward


def _synchronised(norm: BatchNormBase, x: Tensor) -> Tensor:
    """Batch norm with the statistics of the whole batch; torch's own SyncBatchNorm is for GPUs alone."""
    if not norm.training:
        plain: Tensor = type(norm).forward(norm, x)
        return plain
    dims, shape = [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]
    with torch.autocast(x.device.type, enabled=False):
        wide = x if x.dtype == torch.float64 else x.float()
        count = wide.new_tensor([wide.numel() / wide.shape[1]])
        dist.all_reduce(count)
        average = _Sum.apply(wide.sum(dims)) / count
        centred = wide - average.view(shape)
        variance = _Sum.apply(centred.square().sum(dims)) / count
        out = centred * (variance.view(shape) + norm.eps).rsqrt()
        if norm.affine:
            out = out * norm.weight.view(shape) + norm.bias.view(shape)
        _remember(norm, average.detach(), variance.detach() * count / (count - 1))
    joined: Tensor = out.to(x.dtype)
    return joined


class _Sum(torch.autograd.Function):
    """The sum over all ranks. Each rank's part is in the loss of all: on the way back it is the same sum."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return all_reduce_(tensor.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce_(gradient.contiguous().clone())


@torch.no_grad()
def _remember(norm: BatchNormBase, average: Tensor, variance: Tensor) -> None:
    if not norm.track_running_stats or norm.running_mean is None or norm.running_var is None:
        return
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    weight = norm.momentum if norm.momentum is not None else 1 / float(norm.num_batches_tracked)
    norm.running_mean.lerp_(average, weight)
    norm.running_var.lerp_(variance, weight)


@torch.no_grad()
def average_statistics_(norms: list[BatchNormBase], count: int) -> None:
    """Join cumulative averages over `count` batches on each rank into the average over all batches."""
    if world_size() == 1:
        return
    whole = all_reduce_(torch.tensor(float(count), dtype=torch.float64))
    for norm in norms:
        assert norm.num_batches_tracked is not None
        for buffer in (norm.running_mean, norm.running_var):
            assert buffer is not None
            buffer.copy_(
                all_reduce_(buffer.double() * count if count else torch.zeros_like(buffer.double())) / whole
            )
        norm.num_batches_tracked.fill_(int(whole))
