"""How long one example takes: two models measured in turns, so that both see the same machine.

Single runs of a network vary far more upwards than downwards (other work, clock changes), hence the median
and the quartiles. Interleaving takes slow drifts of the machine out of the comparison.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.evaluation import borrowed

WARM_UP = 5
MIN_RUNS, MAX_RUNS = 15, 200
SECONDS = 2.0  # for both models together


@dataclass(frozen=True, kw_only=True)
class Latency:
    """Median milliseconds of one forward pass; the spread is half the distance between the quartiles."""

    median_ms: float
    spread_ms: float


def measure_latency(
    before: nn.Module, after: nn.Module, example: tuple[Tensor, ...], device: torch.device
) -> tuple[Latency, Latency]:
    """Both models on the same example, in turns, in evaluation mode and float32."""
    inputs = tuple(t.to(device) for t in example)
    models = (before, after)
    with borrowed(before, device, training=False), borrowed(after, device, training=False):
        for model in models * WARM_UP:
            _run_ms(model, inputs, device)
        began, times = time.perf_counter(), []
        while len(times) < MIN_RUNS or (len(times) < MAX_RUNS and time.perf_counter() - began < SECONDS):
            times.append([_run_ms(model, inputs, device) for model in models])
    columns = np.array(times).T
    first, second = (_summary(column) for column in columns)
    return first, second


def _run_ms(model: nn.Module, inputs: tuple[Tensor, ...], device: torch.device) -> float:
    began = time.perf_counter()
    with torch.inference_mode():
        model(*inputs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - began)


def _summary(times_ms: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> Latency:
    low, median, high = np.quantile(times_ms, [0.25, 0.5, 0.75])
    return Latency(median_ms=float(median), spread_ms=float(high - low) / 2)
