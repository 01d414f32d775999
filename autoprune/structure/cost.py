"""The cost of a network under a plan: multiply-adds, parameters and bytes, exactly, without building it.

Every operator's multiply-adds are a constant times the lengths of the axes that may shrink, and a
parameter's or an activation's size is the product of its own axis lengths. A length is a fixed part plus,
per group, the units kept times the positions that one unit has there. So the cost is a polynomial in the
kept counts alone, evaluated in microseconds. Latency is no polynomial: `latency` measures and predicts it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoprune.config import Metric


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one network.

    Attributes:
        macs: multiply-adds of one pass of the example input.
        params: number of parameter elements.
        size_bytes: bytes of parameters and buffers.
        activation_bytes: bytes of all tensors that one pass makes for others to read, together; views and
            results written in place are none. Fused attention counts as its parts.
        latency_s: predicted seconds of one pass; None where it was not asked for.
    """

    macs: int
    params: int
    size_bytes: int
    activation_bytes: int
    latency_s: float | None = None

    def of(self, metric: Metric) -> float:
        """Return the cost in the unit in which a target of this metric is given."""
        costs: dict[Metric, float | None] = {
            "macs": self.macs, "params": self.params, "size": self.size_bytes,
            "memory": self.activation_bytes, "latency": self.latency_s,
        }  # fmt: skip
        cost = costs[metric]
        assert cost is not None, f"the graph knows no {metric}"
        return cost


@dataclass(frozen=True, kw_only=True)
class Axis:
    """The length of an axis: `fixed` positions, and `per_unit[group]` positions for every unit kept."""

    fixed: int
    per_unit: Mapping[int, int]


@dataclass(frozen=True, kw_only=True)
class Term:
    """A product of `constant` and the lengths of `axes`, positions in the model's list of axes."""

    constant: int
    axes: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Product:
    """An operator that multiplies: its position in the recording, and the axes of each tensor it reads.

    Attributes:
        operands: per tensor, per dimension, a position in the model's list of axes.
    """

    op: int
    operands: tuple[tuple[int, ...], ...]


class CostModel:
    """The four polynomials of one network: multiply-adds, parameters, stored bytes and activation bytes."""

    def __init__(
        self,
        *,
        axes: Sequence[Axis],
        macs: Sequence[Term],
        params: Sequence[Term],
        size_bytes: Sequence[Term],
        num_groups: int,
        activation_bytes: Sequence[Term] = (),
    ) -> None:
        self.axes = tuple(axes)
        self._fixed = np.array([*(a.fixed for a in axes), 1], dtype=np.int64)
        self._per_unit = np.zeros((len(axes) + 1, num_groups), dtype=np.int64)
        for row, axis in enumerate(axes):
            for group, positions in axis.per_unit.items():
                self._per_unit[row, group] = positions
        self._macs, self._params, self._bytes, self._activations = (
            self._packed(t) for t in (macs, params, size_bytes, activation_bytes)
        )

    def _packed(self, terms: Sequence[Term]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return constants (T,) and axis rows (T, most axes), padded with the row whose length is 1."""
        width = max((len(t.axes) for t in terms), default=0)
        filler = len(self.axes)
        rows = np.full((len(terms), width), filler, dtype=np.int64)
        for index, term in enumerate(terms):
            rows[index, : len(term.axes)] = term.axes
        return np.array([t.constant for t in terms], dtype=np.int64), rows

    def __call__(self, counts: NDArray[np.int64]) -> Cost:
        """The cost when group g keeps `counts[g]` units, int64 (groups,)."""
        lengths = self.lengths(counts)
        macs, params, size, activations = (
            int((constant * lengths[rows].prod(axis=1)).sum())
            for constant, rows in (self._macs, self._params, self._bytes, self._activations)
        )
        return Cost(macs=macs, params=params, size_bytes=size, activation_bytes=activations)

    def lengths(self, counts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the length of every axis when group g keeps `counts[g]` units, and a last entry of 1."""
        return np.asarray(self._fixed + self._per_unit @ counts)

    def macs_touched(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Return the multiply-adds of the operators that shrink with a group.

        The first result counts those that shrink with each group, int64 (groups,); the second counts those
        that shrink with at least one group.
        """
        lengths = self.lengths(counts)
        constant, rows = self._macs
        cost = constant * lengths[rows].prod(axis=1)
        touches = np.any(self._per_unit[rows] > 0, axis=1)
        return (cost[:, None] * touches).sum(axis=0), int(cost[touches.any(axis=1)].sum())
