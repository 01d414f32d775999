"""The surgery that turns a network and a plan into the dense network, and into its zeroed reference.

`densify` copies the module tree with every parameter already sliced, so the large weights are never copied
whole, and mends the numbers that go with them (`out_channels`, `groups`, `num_heads`). The result is the
user's own class. `masked` keeps the original's shapes and zeroes what a plan removes. Both compute the same
function; `verify` measures by how much they differ.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoprune.errors import UsageError, VerificationError
from autoprune.plan import PruningPlan
from autoprune.structure.graph import ChannelGraph, Group, RaggedCall, UnitReordering
from autoprune.structure.patches.attention import patch_attention_
from autoprune.structure.patches.channel_gather import PrunedCall, patch_gathers_
from autoprune.structure.patches.norm_patch import patch_norm_
from autoprune.structure.patches.padding import patch_paddings_
from autoprune.structure.patches.reshape_patch import Shape, patch_reshapes_
from autoprune.torch_private import ConvBase, NormBase, tree_leaves, tree_map_only

GATES = {"LSTM": 4, "GRU": 3, "RNN_TANH": 1, "RNN_RELU": 1}  # rows of a recurrent layer's weight a unit
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}  # relative; measured: 1e-14 and 1e-6 on torchvision
OTHER_TOLERANCE = 5e-2  # of half precision, which has two to three decimal digits; a guess


def densify(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> nn.Module:
    """Return the dense network that a plan leaves: the user's class with smaller layers, same device.

    `model` is left untouched. The memory needed is one copy of the kept tensors.

    Raises:
        UsageError: the plan was not made for this graph.
    """

    def cut(name: str, tensor: Tensor) -> Tensor:
        for dim, keep in cuts.get(name, {}).items():
            tensor = tensor.index_select(dim, torch.from_numpy(keep).to(tensor.device))
        return tensor if name in cuts else tensor.clone()

    cuts = _kept_positions(graph, plan)
    return _with_sizes_updated(copy_model(model, cut), graph, plan)


def densify_on_meta(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> nn.Module:
    """Return the dense network with parameters on the meta device, as shapes alone; no weight is read."""
    cuts = _kept_positions(graph, plan)

    def shrink(name: str, tensor: Tensor) -> Tensor:
        shape = list(tensor.shape)
        for dim, keep in cuts.get(name, {}).items():
            shape[dim] = len(keep)
        return torch.empty(shape, dtype=tensor.dtype, device="meta")

    return _with_sizes_updated(copy_model(model, shrink), graph, plan)


def masked(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> nn.Module:
    """Return the reference network, with zeros wherever a removed channel is made or read.

    It has the original's shapes. `model` is left untouched; the memory needed is one copy of its tensors.

    Raises:
        UsageError: the plan was not made for this graph.
    """
    zeros = _zeros(graph, plan, readers_only=False)

    def zero(name: str, tensor: Tensor) -> Tensor:
        return _with_zeros(tensor, zeros.get(name, []))

    return copy_model(model, zero)


def copy_model(model: nn.Module, change: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Return a copy of a module tree in which `change(name, tensor)` stands for each parameter and buffer.

    A tensor that has several names is changed once and stays one tensor. Memory: only what `change` makes, as
    `copy.deepcopy` finds these tensors copied already.
    """
    memo: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        data = change(name, parameter.detach())
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for name, buffer in model.named_buffers():
        memo.setdefault(id(buffer), change(name, buffer.detach()))
    for module in model.modules():
        # Deepcopy refuses what a forward left on a module: such tensors are no leaves of autograd's graph.
        for value in vars(module).values():
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = value.detach().clone()
    return copy.deepcopy(model, memo)


def masked_tensors(
    graph: ChannelGraph, plan: PruningPlan, tensors: Mapping[str, Tensor], *, readers_only: bool
) -> dict[str, Tensor]:
    """Return the parameters and buffers that `masked` changes, as it changes them, and no others.

    Args:
        graph, plan: as for `masked`.
        tensors: parameters and buffers by qualified name; they are not changed.
        readers_only: zero only the weights that read a removed channel. That is the same function, as long
            as no layer norm is rescaled.

    Raises:
        UsageError: the plan was not made for this graph.
    """
    zeros = _zeros(graph, plan, readers_only=readers_only)
    return {
        name: _with_zeros(tensors[name], positions) for name, positions in zeros.items() if name in tensors
    }


def _zeros(
    graph: ChannelGraph, plan: PruningPlan, *, readers_only: bool
) -> dict[str, list[tuple[int, NDArray[np.int64]]]]:
    """Return for each parameter name the pairs (dimension, positions that a plan zeroes)."""
    zeros: dict[str, list[tuple[int, NDArray[np.int64]]]] = {}
    for group, removed in _removals(graph, plan):
        for member in group.members:
            if member.role == "in" or (not readers_only and member.name in graph.maskable):
                zeros.setdefault(member.name, []).append((member.dim, member.index[removed].ravel()))
    return zeros


def _with_zeros(tensor: Tensor, zeros: Sequence[tuple[int, NDArray[np.int64]]]) -> Tensor:
    tensor = tensor.clone()
    for dim, positions in zeros:
        tensor.index_fill_(dim, torch.from_numpy(positions).to(tensor.device), 0)
    return tensor


def verify(model: nn.Module, graph: ChannelGraph, plan: PruningPlan, example_inputs: Any) -> float:
    """Return the largest difference between the dense and the masked network's outputs, over their size.

    Args:
        example_inputs: a tensor or the tuple of forward's arguments.

    Raises:
        UsageError: the plan was not made for this graph.
        VerificationError: the difference is above the tolerance of the network's number format.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    error = difference(densify(model, graph, plan), masked(model, graph, plan), inputs)
    allowed = TOLERANCE.get(dtype, OTHER_TOLERANCE)
    if not error <= allowed:
        raise VerificationError(
            f"the dense network differs from the masked one by {error:.1e} (allowed {allowed:.0e})",
            "exclude the layers that `autoprune groups` shows last, and report the network",
        )
    return error


def difference(dense: nn.Module, reference: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Return the largest absolute difference of two networks' outputs over the reference's largest output."""
    return largest_gap(outputs(dense, inputs), outputs(reference, inputs))


def largest_gap(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Return the largest absolute difference over the largest absolute entry of `expected`.

    The result is infinite where shapes differ, and NaN where an entry is NaN.
    """
    if [t.shape for t in actual] != [t.shape for t in expected]:
        return float("inf")
    largest = max((float(t.abs().max()) for t in expected if t.numel()), default=0.0)
    gaps = [float((a - b).abs().max()) for a, b in zip(actual, expected, strict=True) if a.numel()]
    worst = float("nan") if any(math.isnan(gap) for gap in gaps) else max(gaps, default=0.0)
    return worst / largest if largest > 0 else worst


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """Return the tensors that a network outputs in evaluation mode from a fixed seed, in float64."""
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = model.eval()(*tree_map_only(Tensor, torch.clone, inputs))
    return [t.double() for t in tree_leaves(result) if isinstance(t, Tensor) and not t.is_complex()]


def _removals(graph: ChannelGraph, plan: PruningPlan) -> Iterator[tuple[Group, NDArray[np.int64]]]:
    groups = {g.name: g for g in graph.groups}
    for name, keep in plan.keep.items():
        group = groups.get(name)
        if group is None or group.num_units != plan.num_units[name]:
            was = "no such group" if group is None else f"{group.num_units} units there"
            raise UsageError(
                f"the plan speaks of {plan.num_units[name]} units of {name!r}, but the network has {was}",
                "make the plan from a graph of this very network",
            )
        if len(keep) < group.num_units:
            is_gone = np.ones(group.num_units, bool)
            is_gone[keep] = False
            yield group, np.flatnonzero(is_gone)


def _kept_positions(graph: ChannelGraph, plan: PruningPlan) -> dict[str, dict[int, NDArray[np.int64]]]:
    """Return for each parameter name and dimension that shrinks the positions that stay."""
    masks: dict[tuple[str, int], NDArray[np.bool_]] = {}
    for group, removed in _removals(graph, plan):
        for member in group.members:
            key = member.name, member.dim
            if key not in masks:
                masks[key] = np.ones(graph.width(*key), bool)
            masks[key][member.index[removed]] = False
    positions: dict[str, dict[int, NDArray[np.int64]]] = {}
    for (name, dim), mask in masks.items():
        positions.setdefault(name, {})[dim] = np.flatnonzero(mask)
    return positions


def _with_sizes_updated(model: nn.Module, graph: ChannelGraph, plan: PruningPlan) -> nn.Module:
    counts = {name: len(units) for name, units in plan.keep.items()}
    modules = dict(model.named_modules())
    changed = {m.name.rpartition(".")[0] for g, _ in _removals(graph, plan) for m in g.members}
    for counter in graph.count_attributes:
        value = graph.length(counter.axis, counts) // counter.per
        if getattr(modules[counter.module], counter.attribute) != value:
            setattr(modules[counter.module], counter.attribute, value)
    for name, policy in graph.conv_group_policies.items():
        modules[name].autoprune_conv_groups = policy
    for name, axes in graph.split_axes.items():
        modules[name].autoprune_split_axes = dict(axes)
    for name, width in sorted(graph.norm_widths.items()):
        if width and (name in changed or not isinstance(modules[name], nn.LayerNorm)):
            # A module may take a mean over channels that it has no parameter for, so `changed` is not enough.
            patch_norm_(modules[name], width)
    for name in changed:
        _update_sizes_(modules[name.removesuffix(".parametrizations.weight")])
    patch_attention_(model, changed)
    for name in sorted(graph.reshape_corrections):
        patch_reshapes_(
            modules[name],
            _pruned_shapes(graph, name, counts),
            graph.reshape_corrections[name],
            _pruned_pieces(graph, name, counts),
        )
    _gather_where_ragged(modules, graph, plan, counts)
    return patch_paddings_(model, graph, plan)


def _gather_where_ragged(
    modules: Mapping[str, Any], graph: ChannelGraph, plan: PruningPlan, counts: dict[str, int]
) -> None:
    for name, calls in graph.ragged.items():
        by_line: dict[str, list[PrunedCall | None]] = {}
        for call in calls:
            by_line.setdefault(call.line, []).append(_pruned_call(graph, call, plan, counts))
        patch_gathers_(modules[name], by_line, graph.gather_sites.get(name))


def _pruned_call(
    graph: ChannelGraph, call: RaggedCall, plan: PruningPlan, counts: dict[str, int]
) -> PrunedCall | None:
    if call.order is None and not call.labelled_axes:
        return None
    sizes = tuple(graph.length(a, counts) for a in call.axes)
    if call.order is None:
        return PrunedCall(sizes, labelled_axes=call.labelled_axes)
    return PrunedCall(sizes, call.order.labelled_axes, call.order.dim, _index(graph, call.order, plan))


def _index(graph: ChannelGraph, order: UnitReordering, plan: PruningPlan) -> Tensor:
    """Return the positions to read, in their order, once the plan's channels are removed."""
    is_kept = order.group < 0
    for number in np.unique(order.group[~is_kept]):
        group, in_group = graph.groups[number], order.group == number
        is_kept[in_group] = np.isin(order.unit[in_group], plan.kept(group.name, group.num_units))
    new_positions = np.cumsum(is_kept) - 1
    return torch.from_numpy(new_positions[order.index[is_kept[order.index]]])


def _pruned_shapes(graph: ChannelGraph, module: str, counts: dict[str, int]) -> dict[str, list[Shape]]:
    """Return for each line the shapes that the module's reshapes on it make under a plan."""
    shapes: dict[str, list[Shape]] = {}
    for reshape in graph.reshapes.get(module, ()):
        shape = tuple(graph.length(a, counts) for a in reshape.axes)
        shapes.setdefault(reshape.line, []).append(shape)
    return shapes


def _pruned_pieces(graph: ChannelGraph, module: str, counts: dict[str, int]) -> dict[Shape, Shape]:
    """Return the lengths of the pieces of the module's splits, old -> new, where they change."""
    pieces = {
        tuple(graph.length(a, {}) for a in axes): tuple(graph.length(a, counts) for a in axes)
        for axes in graph.split.get(module, ())
    }
    return {old: new for old, new in pieces.items() if old != new}


def _update_sizes_(module: nn.Module) -> None:
    """Set the sizes that torch's own layers store to those of their tensors."""
    weight = getattr(module, "weight", None)
    if isinstance(module, ConvBase):
        outs, ins = (1, 0) if module.transposed else (0, 1)
        shared = {outs: 1, ins: module.groups} if not module.transposed else {outs: module.groups, ins: 1}
        module.out_channels = module.weight.shape[outs] * shared[outs]
        module.in_channels = module.weight.shape[ins] * shared[ins]
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, NormBase):
        tensor = weight if weight is not None else module.running_mean
        if tensor is not None:
            module.num_features = len(tensor)
    elif isinstance(module, nn.GroupNorm) and weight is not None:
        module.num_channels = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(module.weight)
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.embedding_dim = module.weight.shape[1]
    elif isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        _update_recurrent_sizes_(module)
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = module.weight.shape


def _update_recurrent_sizes_(module: nn.RNNBase | nn.RNNCellBase) -> None:
    if isinstance(module, nn.RNNCellBase):
        module.hidden_size, module.input_size = module.weight_hh.shape[1], module.weight_ih.shape[1]
        return
    rows, module.input_size = getattr(module, "weight_ih_l0").shape  # noqa: B009 (untyped attribute)
    if not module.proj_size:  # pruning could make the widths equal by which torch recognises one
        module.hidden_size = rows // GATES[module.mode]
