"""Parameter-free shortcuts that pad channels (He et al. 2015, section 4.2, option A), made smaller.

Such a module has no weight to slice: how many channels it adds is written in its code. Where a module does
nothing but take strides and pad, the dense network gets a module in its place that does the same with the
kept numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from autoprune.plan import PruningPlan
    from autoprune.structure.graph import ChannelGraph


class ChannelPadding(nn.Module):
    """A chain of slices, pools and paddings that is replayed on one tensor.

    Args:
        steps: (ATen operator, its arguments after the tensor), in order.
    """

    def __init__(self, steps: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
        super().__init__()
        self.steps = tuple(steps)

    def forward(self, x: Tensor) -> Tensor:
        """Replay the steps: (B, C, ...) -> (B, C + padded channels, ...)."""
        for name, arguments in self.steps:
            x = getattr(torch.ops.aten, name)(x, *arguments)
        return x

    def extra_repr(self) -> str:
        """Return the steps, for printing."""
        return "; ".join(f"{name}{arguments}" for name, arguments in self.steps)


def patch_paddings_(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> nn.Module:
    """Replace the padding modules in a dense copy whose padded edges shrink under the plan."""
    shrinkage: dict[tuple[int, int, str], int] = {}
    for group in graph.groups:
        num_kept = len(plan.kept(group.name, group.num_units))
        for padding in group.paddings:
            key = (padding.op, padding.dim, padding.side)
            shrinkage[key] = shrinkage.get(key, 0) + padding.index.shape[1] * (group.num_units - num_kept)
            if shrinkage[key] and not isinstance(model.get_submodule(padding.module), ChannelPadding):
                model.set_submodule(padding.module, ChannelPadding(_steps(graph, padding.module)))
    for (op, dim, side), count in shrinkage.items():
        if count:
            _shrink(model, graph, (op, dim, side), count)
    return model


def _steps(graph: ChannelGraph, module: str) -> list[tuple[str, tuple[Any, ...]]]:
    assert graph.recording is not None
    return [
        (op.name, tuple(list(op.arguments.values())[1:])) for op in graph.recording.ops if op.module == module
    ]


def _shrink(model: nn.Module, graph: ChannelGraph, edge: tuple[int, int, str], count: int) -> None:
    assert graph.recording is not None
    op, dim, side = edge
    module = graph.recording.ops[op].module
    inside = [n for n, o in enumerate(graph.recording.ops) if o.module == module]
    padded = model.get_submodule(module)
    assert isinstance(padded, ChannelPadding)
    name, (amounts, *rest) = padded.steps[inside.index(op)]
    rank = len(graph.recording.shapes[graph.recording.ops[op].inputs[0].index])
    at = 2 * (rank - 1 - dim) + (side == "right")
    changed = [n - count if i == at else n for i, n in enumerate(amounts)]
    steps = list(padded.steps)
    steps[inside.index(op)] = (name, (changed, *rest))
    padded.steps = tuple(steps)
