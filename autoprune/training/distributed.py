"""Several processes that run one trial together, as `torchrun` starts them; one alone is unaffected.

Inside `shared_work` each rank takes its part of every batch, and the results of the parts are joined so
that the whole is that of one process with the same batches, but for the order in which floats are added.
DistributedDataParallel joins the gradients, synchronised sums join the batch-norm statistics, and the first
rank alone decides.
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
WAIT = timedelta(days=2)  # the other ranks wait while the first rank waits for the plan of a round
_SHARES_WORK: ContextVar[bool] = ContextVar("shared_work", default=False)


@contextmanager
def process_group() -> Iterator[int]:
    """Join the ranks that `torchrun` started, if it did, and give this process's rank."""
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
    """Share among the ranks the training and evaluation inside this context; every rank has to enter it."""
    token = _SHARES_WORK.set(dist.is_available() and dist.is_initialized())
    try:
        yield
    finally:
        _SHARES_WORK.reset(token)


def world_size() -> int:
    """Return the number of ranks that share the present work; it is 1 outside `shared_work`."""
    return dist.get_world_size() if _SHARES_WORK.get() else 1


def rank_and_size() -> tuple[int, int]:
    """Return this rank's number, and the number of ranks that share the present work."""
    return (dist.get_rank() if _SHARES_WORK.get() else 0, world_size())


def send_job(job: object) -> None:
    """Send a job from the first rank to the others; do nothing where there are no others."""
    if dist.is_available() and dist.is_initialized():
        dist.broadcast_object_list([job], src=0)


def receive_job() -> Any:
    """Receive the job that the first rank sends; wait until it does."""
    box: list[Any] = [None]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def from_rank_zero(make: Callable[[], T]) -> T:
    """Call `make` on the first rank and return its result on all; an `AutopruneError` is raised on all."""
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
    """Sum a tensor over all ranks, in place, and return it."""
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
    """Scale a rank's mean loss so that the ranks' mean gradient is that of the whole batch's mean loss."""
    if world_size() == 1:
        return loss
    total = all_reduce_(torch.tensor(float(count), device=loss.device))
    return loss * (count * world_size() / total)


@contextmanager
def parallel(model: nn.Module) -> Iterator[nn.Module]:
    """Give the module to call in the training model's place, so that all ranks make the same step."""
    if world_size() == 1:
        yield model
        return
    norms = [m for m in model.modules() if isinstance(m, BatchNormBase)]
    for norm in norms:
        norm.forward = partial(_synchronised, norm)  # type: ignore[method-assign]  # undone below
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
    """Apply batch norm with the statistics of the whole batch; torch's SyncBatchNorm is for GPUs alone."""
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
    """The sum over all ranks; its gradient is the same sum, as each rank's part is in every loss."""

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
