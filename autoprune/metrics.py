"""The score of a model, with its uncertainty.

A top-1 is a count of correct samples out of `num_samples`; its interval is Wilson's score interval
(Wilson 1927; Brown, Cai & DasGupta 2001, section 3.1.1). The difference of two models on the *same*
samples is far less uncertain than the two intervals suggest, so it is computed on the pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Z95 = 1.959963984540054  # the 97.5 % quantile of the standard normal distribution


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A two-sided 95 % interval, in the unit of its value."""

    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """The result of one model on one split.

    Attributes:
        top1: the share of correct samples in [0, 1], or the study's own score in [0, 1], higher is better.
        loss: the mean loss over the samples.
        num_samples: the number of samples that were evaluated.
        correct: whether each sample is correct, bool (num_samples,) in the split's order; None for a
            study's own score.
    """

    top1: float
    loss: float
    num_samples: int
    correct: NDArray[np.bool_] | None = None

    @property
    def interval(self) -> Interval:
        """The 95 % score interval of `top1`, by Wilson (1927)."""
        return wilson_interval(self.top1, self.num_samples)


def wilson_interval(top1: float, num_samples: int) -> Interval:
    """Return Wilson's 95 % score interval of a proportion measured on `num_samples` samples.

    Brown, Cai and DasGupta 2001, section 3.1.1. Without samples the interval is [0, 1].
    """
    if num_samples <= 0:
        return Interval(low=0.0, high=1.0)
    square = Z95 * Z95 / num_samples
    centre = (top1 + square / 2) / (1 + square)
    half = Z95 / (1 + square) * math.sqrt(top1 * (1 - top1) / num_samples + square / (4 * num_samples))
    return Interval(low=max(0.0, centre - half), high=min(1.0, centre + half))


def difference_pp(after: Evaluation, before: Evaluation) -> tuple[float, Interval]:
    """Return `after.top1 - before.top1` in percentage points, with its 95 % interval.

    With per-sample results of the same samples the interval is that of the mean of the paired
    differences; otherwise the two results are taken as independent.
    """
    delta = after.top1 - before.top1
    if after.correct is not None and before.correct is not None and len(after.correct) == len(before.correct):
        pairs = after.correct.astype(np.float64) - before.correct.astype(np.float64)
        half = Z95 * float(pairs.std(ddof=1)) / math.sqrt(len(pairs)) if len(pairs) > 1 else 1.0
    else:
        variance = sum(e.top1 * (1 - e.top1) / max(e.num_samples, 1) for e in (after, before))
        half = Z95 * math.sqrt(variance)
    return 100 * delta, Interval(low=100 * (delta - half), high=100 * (delta + half))
