"""How long one forward pass takes under a plan, predicted from timings on the device at hand.

The operators that multiply (convolutions, matrix products, attention) are timed alone, at a quarter, a
half, three quarters and all of each axis that can shrink, with straight lines between. Everything else
(norms, activations, pooling, the interpreter) is a straight line in the bytes of activations made, through
two networks measured as a whole: this one and one with half of every group. So the prediction for the whole
network is its measurement.

A shape that was timed once is not timed again (`timings`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product as combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.plan import PruningPlan
from autoprune.structure.cost import CostModel, Product
from autoprune.structure.densify import densify
from autoprune.structure.graph import ChannelGraph, Group
from autoprune.structure.recorder import Op, Recording, Ref
from autoprune.structure.timings import Call, Seconds, Timings, time_interleaved
from autoprune.torch_private import tree_map_only

Lengths = NDArray[np.int64]

FRACTIONS = (0.25, 0.5, 0.75, 1.0)
TINY_S = 1e-12
KERNEL_RUNS, KERNEL_S = 15, 0.02  # runs of one operator at one shape: so many, or so long
NETWORK_RUNS, NETWORK_S = 200, 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class LatencyModel:
    """A model of the seconds of one pass: operators interpolated in their axes, the rest by bytes.

    Attributes:
        rows: (P, K), for each of P operators K axes of the cost model.
        fixed: (P, K), the part of each axis' length that stays.
        span: (P, K), the part that can go.
        knots: (P, K, 4), shares of the span at which the operator was timed, rising.
        seconds: (P, 4, ..., 4), the seconds at the knots; this array has an axis for each of the K.
        scale: the factor of the operators' seconds; below 1 where alone they took longer than in the
            network.
        base_s, per_byte_s: the straight line of everything else.
    """

    rows: Lengths
    fixed: Lengths
    span: Lengths
    knots: Seconds
    seconds: Seconds
    scale: float = 1.0
    base_s: float = 0.0
    per_byte_s: float = 0.0

    def __call__(self, lengths: Lengths, activation_bytes: int) -> float:
        """Predicted seconds, given the cost model's axis lengths; never negative."""
        return self.scale * self.products_s(lengths) + self.base_s + self.per_byte_s * activation_bytes

    def products_s(self, lengths: Lengths) -> float:
        """Return the seconds of the timed operators, as if each ran alone."""
        knots, table = self._from_zero
        shares = np.where(self.span > 0, (lengths[self.rows] - self.fixed) / np.maximum(self.span, 1), 1.0)
        at = np.clip((shares[..., None] >= knots).sum(-1) - 1, 0, knots.shape[-1] - 2)
        low, high = (np.take_along_axis(knots, (at + d)[..., None], -1)[..., 0] for d in (0, 1))
        fraction = np.where(high > low, (shares - low) / np.where(high > low, high - low, 1), 0.0)
        total = np.zeros(len(self.rows))
        for corner in combinations((0, 1), repeat=self.rows.shape[1]):
            weight = np.where(corner, fraction, 1 - fraction).prod(axis=1)
            total += weight * table[np.arange(len(at)), *(at + corner).T]
        return float(total.sum())

    @cached_property
    def _from_zero(self) -> tuple[Seconds, Seconds]:
        """The knots and seconds with a knot at zero before them, where the lowest line ends, at least zero.

        The relative slope on the edge where the other axes are whole serves for all of them, so that on a
        rising table fewer channels never take longer.
        """
        table = self.seconds
        for axis in range(self.rows.shape[1]):
            first, second = (np.take(table, [n], axis + 1) for n in (0, 1))
            whole: Any = (slice(None), *[-1] * (table.ndim - 1))
            edges = first[whole], second[whole]
            step = self.knots[:, axis, 1] - self.knots[:, axis, 0]
            rise = (edges[1] / np.maximum(edges[0], TINY_S) - 1) * self.knots[:, axis, 0]
            share = np.clip(1 - np.where(step > 0, rise / np.where(step > 0, step, 1), 0), 0, 1)
            table = np.concatenate([first * share.reshape(-1, *[1] * (table.ndim - 1)), table], axis + 1)
        return np.concatenate([np.zeros((*self.rows.shape, 1)), self.knots], -1), table

    def fitted(self, points: Sequence[tuple[Lengths, int, float]]) -> LatencyModel:
        """Return the same operators, with the line of everything else through measured networks.

        Args:
            points: axis lengths, activation bytes and measured seconds of the whole network, and of a
                smaller one where there is one.
        """
        (lengths, whole_bytes, whole_s), *smaller = points
        alone_s = self.products_s(lengths)
        if alone_s >= whole_s or not whole_bytes:
            scale = min(1.0, whole_s / alone_s) if alone_s else 1.0
            return replace(self, scale=scale, base_s=whole_s - scale * alone_s, per_byte_s=0.0)
        rest_s = whole_s - alone_s
        slope = rest_s / whole_bytes
        for fewer, few_bytes, few_s in smaller:
            if few_bytes < whole_bytes:
                fall = (rest_s - (few_s - self.products_s(fewer))) / (whole_bytes - few_bytes)
                slope = min(max(fall, 0.0), slope)
        return replace(self, scale=1.0, base_s=rest_s - slope * whole_bytes, per_byte_s=slope)


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """One call of an ATen operator that can be made again: operands by shape, type and order in memory."""

    op: Op
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    orders: tuple[tuple[int, ...], ...]
    groups: int

    @property
    def key(self) -> str:
        """The text that tells this call from others in the table."""
        arguments = {n: v for n, v in self.op.arguments.items() if not isinstance(v, Ref) and n != "groups"}
        shapes = list(zip(map(list, self.shapes), map(str, self.dtypes), map(list, self.orders), strict=True))
        return json.dumps([self.op.name, self.op.overload, shapes, self.groups, arguments], default=str)

    def call(self, device: torch.device) -> Call:
        """Return the operator with operands of this shape, ready to run."""
        operands = iter(
            _operand(*operand, device) for operand in zip(self.shapes, self.dtypes, self.orders, strict=True)
        )
        arguments = tree_map_only(Ref, lambda _: next(operands), self.op.arguments)
        if "groups" in arguments:
            arguments["groups"] = self.groups
        if "scaled_dot_product" in self.op.name:
            return partial(_attention, arguments)
        return partial(self.op.call, **arguments)


def with_latency_model(
    graph: ChannelGraph,
    model: nn.Module,
    example_inputs: tuple[Any, ...],
    device: torch.device,
    *,
    beside: tuple[nn.Module, float] | None = None,
    timings: Timings | None = None,
) -> ChannelGraph:
    """Return the graph of `model` with costs that include the predicted seconds of one pass on `device`.

    It takes some 20 ms for each shape that was not timed before, and about a second for whole networks.
    `model` and `graph` are left as they were.

    Args:
        beside: a network and its seconds as they were measured earlier. It is measured again in turns with
            this one, and predictions are scaled to the earlier measurement, so that a machine whose speed
            drifts does no harm.
        timings: the table to use; by default the user's own, on disk.
    """
    timings = timings or Timings.of(device)
    products = time_products(graph, device, timings)
    timings.save()
    half = {g.name: _half(g) for g in graph.groups}
    plan = PruningPlan(
        keep={n: np.arange(k, dtype=np.int64) for n, k in half.items()},
        num_units={g.name: g.num_units for g in graph.groups},
    )
    models = [model, densify(model, graph, plan), *([beside[0]] if beside else [])]
    measured = measure_networks_s(models, example_inputs, device)
    unit = beside[1] / measured[2] if beside else 1.0
    points = [(*_state(graph, {}), unit * measured[0]), (*_state(graph, half), unit * measured[1])]
    return replace(graph, latency=products.fitted(points))


def measure_networks_s(
    models: Sequence[nn.Module], example_inputs: tuple[Any, ...], device: torch.device
) -> list[float]:
    """Return the least seconds of one pass of each network, measured in turns on copies in evaluation mode.

    The least time counts, because other work on the machine only ever adds to it.
    """
    calls = _ready(models, example_inputs, device)
    times = time_interleaved(calls, device, runs=NETWORK_RUNS, seconds=NETWORK_S)
    return [float(s) for s in times.min(axis=0)]


def measure_latency_share(
    before: nn.Module, after: nn.Module, example_inputs: tuple[Any, ...], device: torch.device
) -> tuple[float, float]:
    """Return the share of one network's latency that is left in another, measured in turns, and its spread.

    The share is that of the least times. Its spread is how far the lower quartiles lie above them: small on
    a quiet machine, and so large on a busy one that nothing follows from the share. The networks are
    copied, not changed. This takes about a second, and longer where `timings.MIN_RUNS` runs need more.
    """
    calls = _ready([before, after], example_inputs, device)
    times = time_interleaved(calls, device, runs=NETWORK_RUNS, seconds=NETWORK_S)
    least, quartile = np.quantile(times, [0.0, 0.25], axis=0)
    share = float(least[1] / least[0])
    return share, share * float((quartile / least - 1).sum())


def time_products(graph: ChannelGraph, device: torch.device, timings: Timings) -> LatencyModel:
    """Time every operator that multiplies, alone, and return the model of these timings.

    An operator that does not run alone is left to the rest. `timings` gets the shapes that it lacked.
    """
    assert graph.recording is not None
    curves = []
    for product in graph.products:
        with suppress(RuntimeError, TypeError, AttributeError):
            curves.append(_curve(graph, product, device, timings))
    num_axes = max([1, *(len(c.rows) for c in curves)])
    return LatencyModel(
        rows=_stacked([c.rows for c in curves], num_axes, 0).astype(np.int64),
        fixed=_stacked([c.fixed for c in curves], num_axes, 0).astype(np.int64),
        span=_stacked([c.span for c in curves], num_axes, 0).astype(np.int64),
        knots=np.array(
            [c.knots + [[1.0] * len(FRACTIONS)] * (num_axes - len(c.knots)) for c in curves]
        ).reshape(-1, num_axes, len(FRACTIONS)),
        seconds=np.array([c.grid(num_axes) for c in curves]).reshape(-1, *[len(FRACTIONS)] * num_axes),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Curve:
    """One operator's timings, an axis of `seconds` for each of the operator's axes that can shrink."""

    rows: list[int]
    fixed: list[int]
    span: list[int]
    knots: list[list[float]]
    seconds: Seconds

    def grid(self, num_axes: int) -> Seconds:
        shape = [*self.seconds.shape, *[1] * (num_axes - self.seconds.ndim)]
        return np.broadcast_to(self.seconds.reshape(shape), [len(FRACTIONS)] * num_axes)


def _curve(graph: ChannelGraph, product: Product, device: torch.device, timings: Timings) -> _Curve:
    assert graph.recording is not None
    costs, full = graph.cost_model, graph.cost_model.lengths(np.array([g.num_units for g in graph.groups]))
    varying = _varying(costs, product)
    steps = [_steps(graph, costs, rows[0]) for rows in varying]
    seconds = np.zeros([len(FRACTIONS)] * len(varying))
    for index in combinations(range(len(FRACTIONS)), repeat=len(varying)):
        lengths = full.copy()
        for rows, step, at in zip(varying, steps, index, strict=True):
            for row in rows:
                fixed_length = costs.axes[row].fixed
                lengths[row] = fixed_length + round((full[row] - fixed_length) * step[at])
        kernel = kernel_of(graph.recording, product, lengths)
        seconds[index] = timings.get(kernel.key, partial(_kernel_s, kernel, device))
    first = [rows[0] for rows in varying]
    fixed = [costs.axes[r].fixed for r in first]
    return _Curve(
        rows=first, fixed=fixed, span=[int(full[r]) - f for r, f in zip(first, fixed, strict=True)],
        knots=steps, seconds=seconds,
    )  # fmt: skip


def kernel_of(recording: Recording, product: Product, lengths: Lengths) -> Kernel:
    """Return the call that an operator of the recording becomes when axes have these lengths."""
    op = recording.ops[product.op]
    refs = op.inputs
    shapes = tuple(tuple(int(lengths[r]) for r in rows) for rows in product.operands)
    groups = int(op.arg("groups", 1))
    if groups > 1:
        x, weight = (shapes[refs.index(op.arg(n))] for n in ("input", "weight"))
        before = recording.shapes[op.arg("weight").index][0]
        groups = groups * weight[0] // before if op.arg("transposed") else x[1] // weight[1]
    return Kernel(
        op=op, shapes=shapes, dtypes=tuple(recording.dtypes[r.index] for r in refs),
        orders=tuple(_order(recording.strides[r.index]) for r in refs), groups=groups,
    )  # fmt: skip


def _varying(costs: CostModel, product: Product) -> list[list[int]]:
    """Return the axes that can shrink; axes that depend on the same groups shrink together."""
    varying: dict[frozenset[int], list[int]] = {}
    for row in dict.fromkeys(r for rows in product.operands for r in rows):
        if costs.axes[row].per_unit:
            varying.setdefault(frozenset(costs.axes[row].per_unit), []).append(row)
    return list(varying.values())


def _steps(graph: ChannelGraph, costs: CostModel, row: int) -> list[float]:
    """Return the shares at which an axis is timed: whole units of the groups that it depends on."""
    units = sum(graph.groups[g].num_units for g in costs.axes[row].per_unit)
    return [max(1, round(f * units)) / units for f in FRACTIONS]


def _stacked(rows: Iterable[list[int]], width: int, filler: int) -> Lengths:
    return np.array([r + [filler] * (width - len(r)) for r in rows], dtype=np.int64).reshape(-1, width)


def _half(group: Group) -> int:
    """Return a count of about half of a group's units, as a plan may have it."""
    counts = group.allowed_counts
    return int(counts[np.argmin(np.abs(counts - group.num_units / 2))])


def _state(graph: ChannelGraph, counts: dict[str, int]) -> tuple[Lengths, int]:
    vector = np.array([counts.get(g.name, g.num_units) for g in graph.groups], dtype=np.int64)
    return graph.cost_model.lengths(vector), graph.cost_model(vector).activation_bytes


def _ready(models: Sequence[nn.Module], example_inputs: tuple[Any, ...], device: torch.device) -> list[Call]:
    inputs = tree_map_only(Tensor, lambda t: t.to(device), example_inputs)
    return [partial(copy.deepcopy(m).eval().to(device), *inputs) for m in models]


def _kernel_s(kernel: Kernel, device: torch.device) -> float:
    times = time_interleaved([kernel.call(device)], device, runs=KERNEL_RUNS, seconds=KERNEL_S)
    return float(times.min())


def _operand(
    shape: tuple[int, ...], dtype: torch.dtype, order: tuple[int, ...], device: torch.device
) -> Tensor:
    """Return a tensor whose dimensions lie in memory in this order, the outermost first."""
    tensor = torch.ones([shape[d] for d in order], device=device).to(dtype)
    return tensor.permute([order.index(d) for d in range(len(shape))])


def _order(strides: tuple[int, ...]) -> tuple[int, ...]:
    if 0 in strides:  # an expanded axis has no place in memory of its own
        return tuple(range(len(strides)))
    return tuple(sorted(range(len(strides)), key=lambda d: -strides[d]))


def _attention(arguments: dict[str, Any]) -> Tensor:
    """Run fused attention by the operator that this device has."""
    mask = arguments.get("attn_mask", arguments.get("attn_bias"))
    return F.scaled_dot_product_attention(
        arguments["query"], arguments["key"], arguments["value"], attn_mask=mask,
        is_causal=bool(arguments.get("is_causal", False)), scale=arguments.get("scale"),
    )  # fmt: skip
