"""The numbers of a model: accuracy, cost, widths, and how long one example takes.

Latency is measured for two models in turns (`time_interleaved`). Single runs vary far more upwards than
downwards (other work, clock changes), hence median and quartiles.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.metrics import Evaluation
from autoprune.record import ModelSummary
from autoprune.structure import Cost, time_interleaved
from autoprune.torch_private import ConvBase
from autoprune.training import model_mode

MIN_RUNS, MAX_RUNS = 15, 200  # guesses: fewer make no quartiles, more gain little
SECONDS = 2.0  # for both models together; a guess


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The median milliseconds of one forward pass; the spread is half the distance between the quartiles."""

    median_ms: float
    spread_ms: float


def measure_latency(
    before: nn.Module, after: nn.Module, example: tuple[Tensor, ...], device: torch.device
) -> tuple[Latency, Latency]:
    """Time both models on the same example, in turns, in evaluation mode and float32."""
    inputs = tuple(t.to(device) for t in example)
    calls = [partial(model, *inputs) for model in (before, after)]
    with model_mode(before, device, training=False), model_mode(after, device, training=False):
        times = time_interleaved(calls, device, runs=MAX_RUNS, seconds=SECONDS, min_runs=MIN_RUNS)
    first, second = (_summary(1000 * column) for column in times.T)
    return first, second


def summarise(model: nn.Module, cost: Cost, test: Evaluation, search_top1: float) -> ModelSummary:
    """Return a model's numbers; its latency is measured later, beside another model's."""
    return ModelSummary(
        top1=test.top1, low=test.interval.low, high=test.interval.high, num_samples=test.num_samples,
        loss=test.loss if math.isfinite(test.loss) else None, search_top1=search_top1,
        macs=cost.macs, params=cost.params, size_bytes=cost.size_bytes,
        latency_ms=None, latency_spread_ms=None, widths=widths(model),
    )  # fmt: skip


def with_latency(summary: ModelSummary, latency: Latency) -> ModelSummary:
    """Return a summary with the latency filled in."""
    return replace(summary, latency_ms=latency.median_ms, latency_spread_ms=latency.spread_ms)


def widths(model: nn.Module) -> dict[str, int]:
    """Return the output channels of each convolution and linear layer, by layer name."""
    return {
        name: module.out_features if isinstance(module, nn.Linear) else module.out_channels
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | ConvBase)
    }


def _summary(times_ms: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Latency:
    low, median, high = np.quantile(times_ms, [0.25, 0.5, 0.75])
    return Latency(median_ms=float(median), spread_ms=float(high - low) / 2)
