"""A hand-made `RunRecord` with everything that a report has to show: no run is needed to look at one."""

from __future__ import annotations

import dataclasses
import math

from autoprune.metrics import wilson_interval
from autoprune.record import (
    Action,
    Difference,
    EpochPoint,
    FrozenPart,
    ModelSummary,
    Outcome,
    RoundRecord,
    RunRecord,
    SensitivityCell,
    SplitSummary,
    StageTime,
    TrialRecord,
    Tuning,
)

LAYERS = [f"layer{s}.{b}.conv{c}" for s in (1, 2, 3) for b in (0, 1, 2) for c in (1, 2)]


def model(top1: float, scale: float, latency_ms: float | None, num_samples: int = 5000) -> ModelSummary:
    band = wilson_interval(top1, num_samples)
    wide = {name: 16 * 2 ** (i // 6) for i, name in enumerate(LAYERS)}
    widths = {"conv1": 16} | {n: max(2, round(w * (1 - (1 - scale) * (0.4 + 0.1 * (i % 5)))))
                              for i, (n, w) in enumerate(wide.items())}  # fmt: skip
    return ModelSummary(
        top1=top1, low=band.low, high=band.high, num_samples=num_samples, loss=0.31, search_top1=top1 + 0.002,
        macs=round(40.8e6 * scale), params=round(269_722 * scale**0.8),
        size_bytes=round(1_085_000 * scale**0.8),
        latency_ms=latency_ms, latency_spread_ms=None if latency_ms is None else 0.06, widths=widths,
    )  # fmt: skip


def curve(lr: float, loss: float) -> tuple[EpochPoint, ...]:
    steps = [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    return tuple(
        EpochPoint(epoch=e, lr=lr * (1 + math.cos(math.pi * e / 3)) / 2 + 1e-5,
                   train_loss=loss * (1 + 0.8 * math.exp(-1.3 * e)), images_per_s=612.0)
        for e in steps
    )  # fmt: skip


def trial(number: int, rate: float, top1: float | None, share: float, **more: object) -> TrialRecord:
    band = wilson_interval(top1, 5000) if top1 is not None else None
    lr = (0.05, 0.012, 0.18, 0.004)[number % 4]
    fields = {
        "number": number, "state": "complete" if top1 is not None else "failed",
        "params": {"prune_rate": rate, "lr": lr, "decay": ("linear", "cosine", "step")[number % 3],
                   "criterion": ("l2", "taylor", "bn_scale")[number % 3], "strategy": "sensitivity"},
        "prune_rate": rate - 0.004, "cost_share": share, "macs": round(share * 40.8e6), "num_params": 200_000,
        "top1": top1, "low": band.low if band else None, "high": band.high if band else None, "loss": 0.3,
        "before_tuning": top1 - 0.06 - 0.1 * rate if top1 else None, "epochs": curve(lr, 0.2 + rate / 4),
        "seconds": 61.0 + 7 * number,
        "failure": "" if top1 is not None else "the loss became infinite at step 41",
    } | more  # fmt: skip
    return TrialRecord(**fields)  # type: ignore[arg-type]


def cells(round_number: int) -> tuple[SensitivityCell, ...]:
    groups = [f"layer{s}.{b}.conv1" for s in (1, 2, 3) for b in (0, 1, 2)] + ["conv1", "layer2", "layer3"]
    return tuple(
        SensitivityCell(group=g, ratio=r, drop_pp=drop, low_pp=drop - 0.3, high_pp=drop + 0.3,
                        macs_share_removed=0.02 * r)
        for i, g in enumerate(groups) for r in (0.25, 0.5, 0.75)
        for drop in [round_number * 0.3 + (1 + i % 4) ** 1.6 * r**2 * (8 if i > 8 else 2) - 0.2]
    )  # fmt: skip


def one_round(number: int, started_from: int, ceiling: float, share: float, action: Action, reason: str,
              trials: tuple[TrialRecord, ...], floor: float = 0.911) -> RoundRecord:  # fmt: skip
    return RoundRecord(
        number=number, started_from=started_from, ceiling=ceiling, floor=floor, planned_trials=4, epochs=3.0,
        cost_share=share, trials=trials, sensitivity=cells(number), action=action, reason=reason,
        seconds=310.0,
    )  # fmt: skip


ROUNDS = (
    one_round(1, 0, 0.35, 1.0, "promote", "3 of 4 trials recovered; trial 2 removed most (31.0 % of the "
              "MACs) at 91.62 %, above the floor of 91.45 %. The ceiling rises to 43.8 %.",
              (trial(0, 0.175, 0.9171, 0.829), trial(1, 0.35, 0.9102, 0.654),
               trial(2, 0.31, 0.9162, 0.69, promoted=True, recovered=True),
               trial(3, 0.22, None, 0.79)), 0.9145),
    one_round(2, 1, 0.4375, 0.69, "lower", "none of 4 trials recovered; the best fell 0.41 pp short of the "
              "floor of 91.10 %. The ceiling falls to 21.9 %.",
              (trial(0, 0.33, 0.9069, 0.462), trial(1, 0.4375, 0.8962, 0.39), trial(2, 0.4, 0.9034, 0.414),
               trial(3, 0.38, 0.9013, 0.43)), 0.911),
    one_round(3, 1, 0.219, 0.69, "promote", "2 of 4 trials recovered; trial 1 removed most (20.8 %) at "
              "91.24 %. The ceiling rises to 27.3 %.",
              (trial(0, 0.18, 0.9138, 0.566, recovered=True),
               trial(1, 0.212, 0.9124, 0.5465, promoted=True, recovered=True),
               trial(2, 0.219, 0.9108, 0.539), trial(3, 0.1, 0.9141, 0.621, recovered=True)), 0.9118),
    one_round(4, 3, 0.273, 0.5465, "finish", "trial 0 reaches the target: 49.8 % of the original's MACs "
              "remain, at 91.19 %, above the floor of 90.93 %.",
              (trial(0, 0.09, 0.9119, 0.498, promoted=True, recovered=True), trial(1, 0.2, 0.9049, 0.437),
               trial(2, 0.1, 0.9111, 0.493, recovered=True), trial(3, 0.15, 0.9083, 0.466)), 0.9093),
)  # fmt: skip

REACHED = RunRecord(
    name="resnet20-cifar10",
    command="autoprune run studies/resnet20_cifar10.py --target macs=0.5 --max-drop 1.0 --seed 0",
    started="2026-11-22T19:03:11+00:00",
    seconds=1712.4,
    study={"name": "resnet20-cifar10", "target": "macs=0.5", "max_drop": 1.0, "budget": "30m", "seed": 0,
           "finetune": {"share": 0.2, "batch_size": 128, "distill": 0.5}, "analysis": {"share": 1.0},
           "search": {"lr": [0.001, 0.2], "sampler": "tpe"}},
    target="macs=0.5",
    target_metric="macs",
    target_share=0.5,
    max_drop_pp=1.0,
    floor=0.9093,
    before=model(0.9173, 1.0, 4.187),
    after=model(0.9121, 0.498, 2.71),
    difference=Difference(delta_pp=-0.52, low_pp=-1.04, high_pp=0.02),
    rounds=ROUNDS,
    outcome=Outcome(reached=True, stopped_by="target", message="The target was reached: 49.8 % of the "
                    "original's MACs remain and top-1 on the search split is 91.4 %, above the 90.9 %."),
    timings=(StageTime(stage="baseline", seconds=14.2), StageTime(stage="analysis", seconds=301.0),
             StageTime(stage="search", seconds=1130.0), StageTime(stage="finish", seconds=241.0)),
    data=(SplitSummary(name="train", num_samples=10_000, digest="3f" * 32),
          SplitSummary(name="search", num_samples=5000, digest="a9" * 32),
          SplitSummary(name="test", num_samples=5000, digest="07" * 32)),
    frozen=(FrozenPart(parameter="linear.weight", dim=0, reason="it makes the model's output"),),
    environment={"python": "3.11.7", "torch": "2.15.0", "optuna": "5.0.0", "autoprune": "0.1.0",
                 "device": "Intel Xeon, 2 cores"},
    tuning=Tuning(epochs=curve(0.02, 0.25), before=0.9119, search_top1=0.9134, kept=True),
)  # fmt: skip

FELL_SHORT = dataclasses.replace(
    REACHED,
    outcome=Outcome(reached=False, stopped_by="floor", message="The target of 30 % was not reached: at "
                    "49.8 % of the MACs nothing more recovers to the floor; allow a larger --max-drop."),
    target="macs=0.3", target_share=0.3,
)  # fmt: skip

UNFINISHED = dataclasses.replace(
    REACHED, after=None, difference=None, outcome=None, tuning=None, timings=REACHED.timings[:3],
    rounds=(*ROUNDS[:2], dataclasses.replace(
        ROUNDS[2], action=None, reason="",
        trials=(ROUNDS[2].trials[0], TrialRecord(number=1, state="running", params={"prune_rate": 0.2})))),
)  # fmt: skip
