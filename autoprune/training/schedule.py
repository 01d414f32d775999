"""The learning rate over a fine-tuning: a warm-up, then one of five decays, one step per batch.

Every part is one of `torch.optim.lr_scheduler`'s own schedulers. A low rate at the end of the given budget
matters more than the shape on the way down (Li et al. 2020, "Budgeted training"). The warm-up is that of
Zimmer et al. 2023 (section 4). One cycle brings a rise of its own (Smith and Topin 2018,
"Super-convergence", section 3), so that no warm-up comes before it; momentum stays constant.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    ExponentialLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)

from autoprune.config import DECAYS, Decay
from autoprune.errors import UsageError

WARMUP_START = 0.1  # of the rate; the warm-up rises linearly from there. A guess


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The course of the learning rate over a fine-tuning: a warm-up, then a decay.

    Attributes:
        lr: the highest rate, above 0, reached after the warm-up.
        decay: the shape of the decay after the warm-up.
        gamma: for `step` the factor of each drop, for `exponential` the last rate over the first, in
            (0, 1).
        milestones: for `step` only, the number of drops, evenly spread over the steps after the warm-up.
        final: for `cosine` and `linear` only, the last rate over the first, in [0, 1).
        peak: for `onecycle` only, the share of the steps in which the rate rises, in (0, 1).
        warmup: the share of all steps that is the warm-up, in [0, 1); `onecycle` takes its `peak` instead.

    Raises:
        UsageError: a value is out of range or missing, or cannot take effect with this decay.
    """

    lr: float
    decay: Decay
    gamma: float | None = None
    milestones: int | None = None
    final: float = 0.0
    peak: float | None = None
    warmup: float = 0.1

    def __post_init__(self) -> None:
        wants_gamma = self.decay in ("step", "exponential")
        problems = (
            (self.decay not in DECAYS, f"decay={self.decay!r}", f"one of {', '.join(DECAYS)}"),
            (not 0 < self.lr < float("inf"), f"lr={self.lr}", "a number above 0"),
            (not 0 <= self.warmup < 1, f"warmup={self.warmup}", "a share from 0, below 1"),
            (not 0 <= self.final < 1, f"final={self.final}", "a share from 0, below 1"),
            (wants_gamma and (self.gamma is None or not 0 < self.gamma < 1),
             f"gamma={self.gamma}", f"a factor between 0 and 1 with {self.decay} decay"),
            (not wants_gamma and self.gamma is not None, f"gamma={self.gamma}", "step or exponential decay"),
            (self.decay not in ("cosine", "linear") and self.final != 0,
             f"final={self.final}", "cosine or linear decay"),
            (self.decay == "step" and (self.milestones or 0) < 1,
             f"milestones={self.milestones}", "1 or more with step decay"),
            (self.decay != "step" and self.milestones is not None,
             f"milestones={self.milestones}", "step decay"),
            (self.decay == "onecycle" and (self.peak is None or not 0 < self.peak < 1),
             f"peak={self.peak}", "a share between 0 and 1 with onecycle decay"),
            (self.decay != "onecycle" and self.peak is not None, f"peak={self.peak}", "onecycle decay"),
        )  # fmt: skip
        for wrong, setting, allowed in problems:
            if wrong:
                raise UsageError(
                    f"schedule: {setting} is not allowed", f"{setting.split('=')[0]} takes {allowed}"
                )


def make_scheduler(optimizer: Optimizer, schedule: Schedule, num_steps: int) -> LRScheduler:
    """Return the scheduler to step after each of `num_steps` batches; set the optimiser's rate at once."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] = schedule.lr
    rising = schedule.warmup if schedule.peak is None else schedule.peak
    num_warmup = min(round(rising * num_steps), num_steps - 1)
    decay = _decay(optimizer, schedule, num_steps - num_warmup)
    if num_warmup == 0:
        return decay
    rise = LinearLR(optimizer, start_factor=WARMUP_START, total_iters=num_warmup)
    return SequentialLR(optimizer, [rise, decay], milestones=[num_warmup])


def _decay(optimizer: Optimizer, schedule: Schedule, num_steps: int) -> LRScheduler:
    """Return the scheduler of the part after the warm-up, over `num_steps` steps."""
    if schedule.decay in ("cosine", "onecycle"):
        return CosineAnnealingLR(optimizer, num_steps, eta_min=schedule.final * schedule.lr)
    if schedule.decay == "linear":
        return LinearLR(optimizer, start_factor=1.0, end_factor=schedule.final, total_iters=num_steps)
    assert schedule.gamma is not None  # Schedule checked it
    if schedule.decay == "exponential":
        return ExponentialLR(optimizer, schedule.gamma ** (1 / num_steps))
    assert schedule.milestones is not None
    drops = schedule.milestones + 1
    return MultiStepLR(
        optimizer, [max(1, num_steps * i // drops) for i in range(1, drops)], gamma=schedule.gamma
    )
