"""Training: the fine-tuning of every trial, and a baseline for studies that bring no weights.

Training runs in bfloat16 where the processor multiplies it natively, and in channels-last memory. The
model's mode, device, memory layout and the global random state are left as they were. For a seed, two
trainings on one machine's CPU are bit-identical.

Distillation is that of Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from autoprune.config import Baseline, Finetune
from autoprune.data import Split, derive_seed
from autoprune.errors import UsageError
from autoprune.tasks import CLASSIFICATION, Task, classification_loss, logits_of
from autoprune.training import distributed
from autoprune.training.divergence import LossWatch, check_finite, check_losses, check_weights, loss_of_zeros
from autoprune.training.evaluation import (
    evaluate,
    model_mode,
    recalibrate_,
    resolve_device,
)
from autoprune.training.optimizer import Stepper
from autoprune.training.schedule import Schedule, make_scheduler

__all__ = [
    "EpochRecord", "evaluate", "finetune_", "recalibrate_", "resolve_device",
    "train_baseline_", "uses_bf16",
]  # fmt: skip

OnEpoch = Callable[["EpochRecord"], None]
Objective = Callable[[nn.Module, Tensor, Tensor], Tensor]

CHECK_EVERY = 16  # steps between checks of the loss: each check makes a GPU wait
BASELINE_WARMUP = 0.2  # share of the steps that the one cycle goes up; a guess
SUBSET_SEED = 0  # every trial sees the same share of the train split, or trials would not compare


@dataclass(frozen=True, kw_only=True)
class EpochRecord:
    """The record of one pass over the training data, or of a part of a pass at the end.

    Attributes:
        epoch: the number of passes so far, this one included; a fraction counts a part of a pass.
        lr: the learning rate of the last step.
        train_loss: the mean loss over the steps.
        images_per_s: the number of samples over wall-clock time.
    """

    epoch: float
    lr: float
    train_loss: float
    images_per_s: float


def uses_bf16(device: torch.device) -> bool:
    """Return whether training runs in bfloat16, which it does where the processor has instructions for it.

    This is a rule about the machine rather than a timing, so that equal machines give equal weights.
    Measured on two cores, ResNet-20 trains 1.5 times as fast with AVX-512 BF16 (EPYC), twice with AMX
    (Xeon).
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    has_bf16 = bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))
    return device.type == "cpu" and has_bf16


def finetune_(  # noqa: PLR0913 - one whole stage: each argument is a decision of its caller
    model: nn.Module, split: Split, *, schedule: Schedule, settings: Finetune, epochs: float, seed: int,
    device: torch.device | str = "cpu", teacher: nn.Module | None = None, task: Task = CLASSIFICATION,
    seconds: float = math.inf, on_epoch: OnEpoch | None = None,
) -> list[EpochRecord]:  # fmt: skip
    """Train a network in place with `settings.optimizer`, on `settings.share` of the split, augmented.

    After the last step batch-norm statistics are estimated anew: the running statistics lag behind the
    weights. The mode and device of the model, and the global random state, are left as they were.

    Args:
        model: the network; parameters that need no gradient stay as they are.
        split: the training data.
        schedule: the learning rate; its `warmup` counts, not that of `settings`.
        settings: the settings that do not change from trial to trial.
        epochs: the number of passes over the share; a fraction is a part of a pass. At least one step is
            made.
        seed: the seed of order, augmentation and dropout.
        device: the device to run on.
        teacher: the network whose logits are learned beside the labels, with weight `settings.distill`;
            None learns from labels only.
        task: the task whose loss is minimised. Where the loss is the study's own, the outputs may not be
            logits, and the teacher is ignored.
        seconds: the time allowed. Where it is too short for all steps, each batch takes several steps of
            the schedule, so that the learning rate still comes to its end.
        on_epoch: called with every record as it is made.

    Returns:
        One record for each pass over the share.

    Raises:
        TrialError: the training diverged (see `autoprune.training.divergence`).
        UsageError: nothing in the model can be trained, or a setting cannot take effect.
    """
    device = torch.device(device)
    share_split = split.subset(settings.share, seed=SUBSET_SEED)
    if settings.label_smoothing and not task.has_logits:
        raise UsageError(
            "finetune.label_smoothing cannot take effect with the study's own loss",
            "set it to 0, or smooth inside the loss",
        )
    num_steps = max(1, round(epochs * share_split.num_batches(settings.batch_size)))
    stepper = Stepper(model, settings)
    plan = _Training(
        stepper=stepper, scheduler=make_scheduler(stepper.sgd, schedule, num_steps),
        pace=_StepPacer(num_steps, seconds), batch_size=settings.batch_size, seed=seed, device=device,
        on_epoch=on_epoch, ema_steps=settings.ema * num_steps, watch=LossWatch(num_steps, device),
    )  # fmt: skip
    if settings.distill == 0 or not task.has_logits:
        teacher = None
    with ExitStack() as stack:
        if teacher is not None:
            stack.enter_context(model_mode(teacher, device, training=False, channels_last=True))
        objective = _objective(settings, teacher, task)
        records = _fit_(model, share_split, plan, objective)
        check_losses(plan.watch, lambda: _loss_of_zeros(model, share_split, plan, objective), schedule.lr)
    recalibrate_(
        model, share_split, num_batches=settings.recalibrate_batches, batch_size=settings.batch_size,
        device=device, seed=seed,
    )  # fmt: skip
    check_weights(model, schedule.lr)
    return records


def train_baseline_(  # noqa: PLR0913 - as finetune_
    model: nn.Module, split: Split, baseline: Baseline, *, seed: int, device: torch.device | str = "cpu",
    task: Task = CLASSIFICATION, on_epoch: OnEpoch | None = None,
) -> list[EpochRecord]:  # fmt: skip
    """Train a network from scratch, in place, by one cycle of the learning rate, up and down.

    The records and the arguments are those of `finetune_`.

    Raises:
        TrialError: the training diverged.
        UsageError: nothing in the model can be trained.
    """
    schedule = Schedule(lr=baseline.lr, decay="linear", warmup=BASELINE_WARMUP)
    settings = Finetune(
        batch_size=baseline.batch_size, weight_decay=baseline.weight_decay, distill=0.0,
        optimizer=baseline.optimizer,
    )  # fmt: skip
    return finetune_(
        model, split, schedule=schedule, settings=settings, epochs=baseline.epochs, seed=seed,
        device=device, task=task, on_epoch=on_epoch,
    )  # fmt: skip


def distillation_weight(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the factor of `settings.distill` for one batch, in [0, 1]; both losses are scalars.

    The factor is the distance of the teacher's loss on the labels below the student's, as a share of the
    student's. A teacher that was trained for long has learned the training labels, and the factor stays
    high. A teacher that the student has caught up with has nothing more to teach, and would hold the
    student back. Measured: docs/log.md.
    """
    with torch.no_grad():
        return (1 - teacher / student.clamp_min(1e-12)).clamp(0, 1)


def distillation_loss(student_BC: Tensor, teacher_BC: Tensor, temperature: float) -> Tensor:
    """Return T² KL(softmax(teacher/T) || softmax(student/T)), the mean over the batch, in float32.

    Hinton et al. 2015, "Distilling the Knowledge in a Neural Network", section 2.
    """
    student = F.log_softmax(student_BC.float() / temperature, dim=1)
    teacher = F.log_softmax(teacher_BC.float() / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class _StepPacer:
    """The pace of a training: the number of the schedule's steps in each batch, above 1 when time is short.

    Attributes:
        left: the number of steps of the schedule that remain.
    """

    def __init__(self, num_steps: int, seconds: float) -> None:
        self.left, self._end = num_steps, time.monotonic() + seconds
        self._first, self._count, self._debt = 0.0, 0, 0.0

    def advance(self) -> int:
        """Return the number of steps to take with this batch, at most all that remain."""
        steps = 1 if math.isinf(self._end) else distributed.from_rank_zero(self._steps_for_time)
        steps = min(steps, self.left)
        self.left -= steps
        return steps

    def _steps_for_time(self) -> int:
        """Return the number of steps that the remaining time requires, by the mean time of a batch."""
        steps, now = 1, time.monotonic()
        if self._count:
            batches_left = max(1.0, (self._end - now) / ((now - self._first) / self._count))
            self._debt += max(0.0, self.left / batches_left - 1)
            steps += int(self._debt)
            self._debt -= int(self._debt)
        else:
            self._first = now
        self._count += 1
        return steps


@dataclass(frozen=True, kw_only=True)
class _Training:
    """The optimiser, the schedule and the settings of one training."""

    stepper: Stepper
    scheduler: LRScheduler
    pace: _StepPacer
    batch_size: int
    seed: int
    device: torch.device
    on_epoch: OnEpoch | None
    ema_steps: float
    watch: LossWatch

    @property
    def averages(self) -> bool:
        """Whether the weights are averaged over more than one step."""
        return self.ema_steps > 1


def _objective(settings: Finetune, teacher: nn.Module | None, task: Task) -> Objective:
    """Return the function (model, inputs, targets) -> the scalar that training minimises."""

    def label_loss(output: Any, target: Tensor) -> Tensor:
        if settings.label_smoothing:  # finetune_ refuses smoothing for a loss of the study's own
            return classification_loss(output, target, label_smoothing=settings.label_smoothing)
        return task.loss(output, target)

    def objective(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        output = model(inputs)
        if teacher is None:
            return label_loss(output, targets)
        with torch.no_grad():
            teacher_output = teacher(inputs)
        own = label_loss(output, targets)
        weight = settings.distill * distillation_weight(
            *(distributed.mean(v, len(targets)) for v in (own, label_loss(teacher_output, targets)))
        )
        distilled = distillation_loss(logits_of(output), logits_of(teacher_output), settings.temperature)
        return (1 - weight) * own + weight * distilled

    return objective


def _fit_(model: nn.Module, split: Split, plan: _Training, objective: Objective) -> list[EpochRecord]:
    """Train a model in place until the schedule is at its end, and return one record for each pass."""
    per_epoch, records, done = split.num_batches(plan.batch_size), list[EpochRecord](), 0
    cuda = range(torch.cuda.device_count()) if plan.device.type == "cuda" else ()
    with (
        torch.random.fork_rng(devices=list(cuda)),
        model_mode(model, plan.device, training=True, channels_last=True),
        distributed.parallel(model) as forward,
    ):
        torch.manual_seed(plan.seed)
        average = _WeightAverage(model, plan) if plan.averages else None
        while plan.pace.left:
            shuffle = derive_seed(plan.seed, len(records))
            batches = split.batches(
                plan.batch_size,
                device=plan.device,
                seed=shuffle,
                augment=True,
                part=distributed.rank_and_size(),
            )
            began = time.perf_counter()
            result = _epoch_(batches, plan, partial(objective, forward), average)
            done += result.steps
            records.append(
                EpochRecord(
                    epoch=done / per_epoch, lr=result.lr, train_loss=result.loss,
                    images_per_s=result.samples / (time.perf_counter() - began),
                )
            )  # fmt: skip
            if plan.on_epoch is not None:
                plan.on_epoch(records[-1])
        plan.stepper.zero_grad()
        if average is not None:
            average.copy_to_model_()
    return records


class _WeightAverage:
    """An exponential moving average of a model's weights."""

    def __init__(self, model: nn.Module, plan: _Training) -> None:
        self.model = model
        decay = get_ema_multi_avg_fn(1 - 1 / plan.ema_steps)  # type: ignore[no-untyped-call]  # torch's
        self.mean = AveragedModel(model, multi_avg_fn=decay)

    def step(self) -> None:
        self.mean.update_parameters(self.model)

    @torch.no_grad()
    def copy_to_model_(self) -> None:
        """Replace the model's weights by their average."""
        for weight, mean in zip(self.model.parameters(), self.mean.module.parameters(), strict=True):
            weight.copy_(mean)


@dataclass(frozen=True, kw_only=True)
class _EpochResult:
    """The mean loss, the last learning rate, and the numbers of steps and samples of one pass."""

    loss: float
    lr: float
    steps: int
    samples: int


def _epoch_(
    batches: Iterator[tuple[Tensor, Tensor]], plan: _Training, objective: Callable[[Tensor, Tensor], Tensor],
    average: _WeightAverage | None,
) -> _EpochResult:  # fmt: skip
    """Train on the batches, in place, until they or the steps of the schedule are used up."""
    total, lr, samples, steps = torch.zeros((), device=plan.device), 0.0, 0, 0
    for inputs, targets in batches:
        if inputs.ndim == 4:
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        with torch.autocast(plan.device.type, torch.bfloat16, enabled=uses_bf16(plan.device)):
            loss = objective(inputs, targets)
        plan.stepper.zero_grad()
        distributed.scale_loss(loss, len(targets)).backward()  # type: ignore[no-untyped-call]  # torch's gap
        lr = float(plan.stepper.sgd.param_groups[0]["lr"])
        plan.stepper.step()
        value = distributed.mean(loss.detach(), len(targets))
        plan.watch.see(value, plan.pace.left)
        for _ in range(plan.pace.advance()):
            plan.scheduler.step()
        if average is not None:
            average.step()
        total += value
        samples, steps = samples + len(inputs) * distributed.world_size(), steps + 1
        if steps % CHECK_EVERY == 1:
            check_finite(total, lr)
        if not plan.pace.left:
            break
    check_finite(total, lr)
    return _EpochResult(loss=float(total) / steps, lr=lr, steps=steps, samples=samples)


def _loss_of_zeros(model: nn.Module, split: Split, plan: _Training, objective: Objective) -> float:
    """Return the loss of a network whose outputs are all zero, on the first batch."""
    part = distributed.rank_and_size()
    batches = split.batches(plan.batch_size, device=plan.device, seed=plan.seed, part=part)
    return loss_of_zeros(model, next(iter(batches)), objective)
