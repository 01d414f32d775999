"""What a network costs under a plan: multiply-adds, parameters and bytes, exactly, without building it.

Every operator's multiply-adds are a constant times the lengths of the axes that may shrink, and a parameter's
size is the product of its own; a length is a fixed part plus, per group, the units kept times the positions
that one unit has there. So the cost is a polynomial in the kept counts alone, evaluated in microseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Multiply-adds of one pass of the example input, parameters, and bytes of parameters and buffers."""

    macs: int
    params: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class Axis:
    """An axis length: `fixed` positions, and `per_unit[group]` positions for every unit kept."""

    fixed: int
    per_unit: Mapping[int, int]


@dataclass(frozen=True, kw_only=True)
class Term:
    """`constant` times the lengths of some axes; `axes` are positions in the model's list of axes."""

    constant: int
    axes: tuple[int, ...]


class CostModel:
    """The three polynomials of one network."""

    def __init__(
        self,
        *,
        axes: Sequence[Axis],
        macs: Sequence[Term],
        params: Sequence[Term],
        size_bytes: Sequence[Term],
        num_groups: int,
    ) -> None:
        self._fixed = np.array([*(a.fixed for a in axes), 1], dtype=np.int64)
        self._per_unit = np.zeros((len(axes) + 1, num_groups), dtype=np.int64)
        for row, axis in enumerate(axes):
            for group, positions in axis.per_unit.items():
                self._per_unit[row, group] = positions
        self._macs, self._params, self._bytes = (self._packed(t) for t in (macs, params, size_bytes))

    def _packed(self, terms: Sequence[Term]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Constants (T,) and axis rows (T, most axes), padded with the row whose length is 1."""
        width = max((len(t.axes) for t in terms), default=0)
        one = len(self._fixed) - 1
        rows = np.full((len(terms), width), one, dtype=np.int64)
        for index, term in enumerate(terms):
            rows[index, : len(term.axes)] = term.axes
        return np.array([t.constant for t in terms], dtype=np.int64), rows

    def __call__(self, counts: NDArray[np.int64]) -> Cost:
        """The cost when group g keeps `counts[g]` units, int64 (groups,)."""
        lengths = self._fixed + self._per_unit @ counts
        macs, params, size = (
            int((constant * lengths[rows].prod(axis=1)).sum())
            for constant, rows in (self._macs, self._params, self._bytes)
        )
        return Cost(macs=macs, params=params, size_bytes=size)

    def macs_touched(self, counts: NDArray[np.int64]) -> tuple[NDArray[np.int64], int]:
        """Per group the multiply-adds of the operators that shrink with it, (groups,); those of any group."""
        lengths = self._fixed + self._per_unit @ counts
        constant, rows = self._macs
        cost = constant * lengths[rows].prod(axis=1)
        touches = np.any(self._per_unit[rows] > 0, axis=1)
        return (cost[:, None] * touches).sum(axis=0), int(cost[touches.any(axis=1)].sum())
