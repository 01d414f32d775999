"""Does the pruned program do what the labels say? No graph is returned before its pruned network ran.

Sizes can be written into `forward` where no label sees them: a reshape to 64 channels, a slice of the first
half, a scale taken from a width. So a pruned copy runs once without values, and must do operator by
operator what the labels say (`program_match`). Where channels are split or modules corrected, cheap
networks are also compared with the masked original in numbers. Groups that fail are found by bisection.
Each is tried with another axis where a reshape left the choice, and frozen with its reason otherwise.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autoprune.plan import PruningPlan
from autoprune.structure.densify import copy_model, densify, densify_on_meta, largest_gap, masked, outputs
from autoprune.structure.graph import ChannelGraph, Group
from autoprune.structure.grouping import TraceOptions, build
from autoprune.structure.labels import LabelArray
from autoprune.structure.patches.channel_gather import GatherPatch
from autoprune.structure.patches.reshape_patch import ReshapePatch
from autoprune.structure.program_match import find_mismatch, find_replaced_modules, output_shape_mismatch
from autoprune.structure.propagate import Propagation
from autoprune.structure.recorder import Recording, record_on_meta
from autoprune.structure.rules.channel_shuffle import find_ragged_modules
from autoprune.torch_private import tree_map_only

CHEAP_MACS = 1_000_000_000  # below this the comparison in numbers takes about a tenth of a second
SMALL_MACS, SMALL_PARAMS = 20_000_000, 1_000_000  # so small that it costs nothing, neither time nor memory
NOISE_DOUBLE = 1e-5  # relative; casts to float32 inside the network leave less
NOISE_SINGLE = 1e-3
ROUNDS = 12  # a guess: attempts with fewer groups or other axes before everything is frozen
SILENT = 1e-3  # weights below this are taken to start at zero
TURNS = 5  # a guess: so many groups in a row lose different numbers of units
MODULE_AT_END = re.compile(r"\(\w+ in (\S+), [^()]*\)$")  # how a mismatch ends, see `find_mismatch`
MAX_RUNS = 64  # a guess: runs spent on finding the groups that fail; after that whole sets freeze together

Built = tuple[ChannelGraph, Propagation]
Check = Callable[[Sequence[Group]], str | None]


def verify_graph(
    model: nn.Module, inputs: tuple[Any, ...], recording: Recording, options: TraceOptions
) -> ChannelGraph:
    """Return the graph of a recorded network, without the groups that its program does not allow to shrink.

    Each round builds the graph, prunes a copy and compares it; groups that fail get another axis of a
    reshape or are frozen before the next round. After `ROUNDS` everything is frozen: no group is returned
    unverified.
    """
    choices: dict[int, int] = {}
    refused: list[tuple[LabelArray, str]] = []
    spent: list[int] = []
    ragged, built = _ragged(
        model, recording, options, build(model, recording, options, choices={}, refused=())
    )
    for turn in range(ROUNDS):
        if turn > 0:
            built = build(model, recording, options, choices=choices, refused=refused, ragged=ragged)
        graph, propagation = built
        verifier = _Verifier(model, inputs, propagation)
        graph, reason = verifier.with_corrections(graph)
        failing = verifier.failing(graph, spent, reason=reason)
        if not failing:
            return graph
        if ragged and any(_passes(propagation, ragged, group) for group, _ in failing):
            ragged = frozenset()
            continue
        for group, reason in failing:
            labels = _labels(propagation, group)
            if not _choose_again(propagation, labels, choices):
                refused.append((labels, reason))
    everything = np.arange(propagation.labels.size)
    refused.append((everything, "the network's program agrees with no pruned sizes that were tried"))
    return build(model, recording, options, choices=choices, refused=refused)[0]


def _ragged(
    model: nn.Module, recording: Recording, options: TraceOptions, built: Built
) -> tuple[frozenset[str], Built]:
    """Return the modules that should be ragged, where that gains units, and the graph with them."""
    graph, propagation = built
    modules = find_ragged_modules(propagation) if recording.is_meta and propagation.shuffles else frozenset()
    if modules:
        finer = build(model, recording, options, choices={}, refused=(), ragged=modules)
        before, after = (sum(g.num_units for g in built_graph.groups) for built_graph in (graph, finer[0]))
        if after > before:
            return modules, finer
    return frozenset(), built


class _Verifier:
    """The two checks of one network: that its pruned program agrees, and that it computes the same.

    Attributes:
        is_doubtful: whether a program ran that could not be compared, because the class of a module was
            exchanged for one of ours, behind which strides differ.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], propagation: Propagation) -> None:
        self.model, self.inputs, self.propagation = model, inputs, propagation
        self.is_doubtful = False

    def program(self, graph: ChannelGraph, groups: Sequence[Group]) -> str | None:
        """Return what goes wrong when a copy with these groups pruned runs without values, or None."""
        return self._run(graph, groups)[0]

    def _run(self, graph: ChannelGraph, groups: Sequence[Group]) -> tuple[str | None, nn.Module]:
        plan = _verification_plan(graph, groups)
        dense = densify_on_meta(self.model, graph, plan)
        try:
            pruned = record_on_meta(dense, self.inputs)
        except Exception as error:  # any failure of the user's forward is the finding
            return f"its forward has the size written in: {_first_line(error)}", dense
        names = find_replaced_modules(self.model, dense)
        reason = find_mismatch(self.propagation, pruned, plan, {g.name: g for g in groups}, names)
        if (reason or "" in names.whole) and (names.alone or names.whole):
            self.is_doubtful = True
            return output_shape_mismatch(self.propagation, pruned) or None, dense
        return reason or None, dense

    @cached_property
    def subject(self) -> tuple[nn.Module, tuple[Any, ...], float]:
        """The network on which numbers are compared, its inputs, and the difference that counts as noise.

        The weights leave no part of the network silent, such as branches that start at zero. The network
        runs in float64 where it can, and otherwise in its own type.
        """
        inputs = tree_map_only(Tensor, lambda x: x.double() if x.is_floating_point() else x, self.inputs)
        strong = copy_model(self.model, _strengthen).double().eval()
        try:
            outputs(strong, inputs)
        except Exception:  # whatever fails, fails without any pruning
            return copy_model(self.model, _strengthen), self.inputs, NOISE_SINGLE
        return strong, inputs, NOISE_DOUBLE

    def numbers(self, graph: ChannelGraph, groups: Sequence[Group]) -> str | None:
        """Return what goes wrong when the copy is compared with the masked network, or None.

        Only one of the two networks is in memory at a time.
        """
        plan = _verification_plan(graph, groups)
        network, inputs, noise = self.subject
        try:
            expected = outputs(masked(network, graph, plan), inputs)
            gap = largest_gap(outputs(densify(network, graph, plan), inputs), expected)
        except Exception as error:  # any failure of the user's forward is the finding
            return f"its forward has the size written in: {_first_line(error)}"
        return None if gap < noise else f"the pruned network computes something else ({gap:.1e} apart)"

    def with_corrections(self, graph: ChannelGraph) -> tuple[ChannelGraph, str | None]:
        """Return the graph with the reshape corrections it needs, and what goes wrong even with them."""
        if not self.propagation.recording.is_meta or not graph.groups:
            return graph, None
        reason, dense = self._run(graph, graph.groups)
        gather_modules = {n: m for n, m in dense.named_modules() if isinstance(m, GatherPatch)}
        graph = replace(graph, gather_sites={n: m.autoprune_calls.sites for n, m in gather_modules.items()})
        candidates = dict.fromkeys((graph.reshapes.keys() | graph.split.keys()) - gather_modules.keys())
        if reason is None or not candidates:
            return graph, reason
        candidate = replace(graph, reshape_corrections=candidates)
        reason, dense = self._run(candidate, graph.groups)
        sizes = {n: m.autoprune_sizes for n, m in dense.named_modules() if isinstance(m, ReshapePatch)}
        needed = {n: s.needed for n, s in sizes.items() if s.needed or s.corrects_split}
        return replace(graph, reshape_corrections=candidate.reshape_corrections if reason else needed), reason

    def failing(
        self, graph: ChannelGraph, spent: list[int], *, reason: str | None
    ) -> list[tuple[Group, str]]:
        """Return the groups whose pruning fails, with what happens.

        Args:
            spent: one entry for every run made so far.
            reason: what is known to go wrong in the program when all groups are pruned.
        """
        if not graph.groups:
            return []
        if reason is not None:
            return _bisect(graph.groups, lambda groups: self.program(graph, groups), spent, reason)
        if not self._needs_numbers(graph):
            return []
        if graph.reshape_corrections and (reason := self.numbers(graph, graph.groups)) is not None:
            corrected = [g for g in graph.groups if self._passes(g, graph.reshape_corrections)]
            if corrected:
                return [(g, reason) for g in corrected]
        return _bisect(graph.groups, lambda groups: self.numbers(graph, groups), spent)

    def _needs_numbers(self, graph: ChannelGraph) -> bool:
        """Return whether the network must be compared in numbers.

        A network that was recorded with values always must. One whose program was not compared operator by
        operator must if it is cheap, and one that splits channels if the comparison costs nothing.
        """
        cost = graph.cost()
        if not self.propagation.recording.is_meta:
            return True
        is_split = self.propagation.splits_channels or bool(graph.reshape_corrections)
        is_small = cost.macs <= SMALL_MACS and cost.params <= SMALL_PARAMS
        return (is_split and is_small) or (self.is_doubtful and cost.macs <= CHEAP_MACS)

    def _passes(self, group: Group, modules: Collection[str]) -> bool:
        """Return whether a group's channels are put together or split in one of the modules."""
        labels, ops = _labels(self.propagation, group), self.propagation.recording.ops
        axes = [
            *self.propagation.reshape_merges,
            *((s.op, s.labels) for s in self.propagation.reshape_splits),
            *((op, np.concatenate(p)) for op, p in self.propagation.splits),
        ]
        return any(ops[op].module in modules and np.isin(axis, labels).any() for op, axis in axes)


def _strengthen(name: str, tensor: Tensor) -> Tensor:
    """Return a copy of a parameter, or values between 0.5 and 1.5 in its shape where it is weak.

    A parameter other than a running mean is weak if it is one-dimensional or starts at zero.
    """
    is_weak = tensor.ndim <= 1 or not tensor.numel() or float(tensor.abs().max()) < SILENT
    if not tensor.is_floating_point() or not is_weak or "running_mean" in name:
        return tensor.clone()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    fresh = torch.rand(tensor.shape, generator=generator) + 0.5
    return fresh.to(tensor.device, tensor.dtype)


def _bisect(
    groups: Sequence[Group], check: Check, spent: list[int], reason_of_all: str | None = None
) -> list[tuple[Group, str]]:
    reason = reason_of_all or check(groups)
    spent.append(1)
    if reason is None:
        return []
    if len(groups) == 1 or len(spent) > MAX_RUNS:
        return [(g, reason) for g in groups]
    named = _named_in(reason, groups)
    if named is not None:  # saves the bisection: a mismatch mostly names the module of the group that fails
        rest = [g for g in groups if g is not named]
        return [(named, reason), *_bisect(rest, check, spent)]
    half = len(groups) // 2
    failing = [*_bisect(groups[:half], check, spent), *_bisect(groups[half:], check, spent)]
    return failing or [(g, reason) for g in groups]  # they fail only together


def _named_in(reason: str, groups: Sequence[Group]) -> Group | None:
    """Return the one group that is made in the module in which something went wrong, if there is one."""
    match = MODULE_AT_END.search(reason)
    inside = f"{match[1]}." if match else ""
    makers = [g for g in groups if any(m.role == "out" and m.name.startswith(inside) for m in g.members)]
    return makers[0] if match and len(makers) == 1 else None


def _verification_plan(graph: ChannelGraph, groups: Sequence[Group]) -> PruningPlan:
    """Return a plan that removes about a third of some groups' units, at least one, from all over them.

    Groups of one width lose different numbers, so that a program that takes one's width for another's
    fails.
    """
    turns = {g.name: turn for turn, g in enumerate(graph.groups)}
    keep = {}
    for group in groups:
        width = group.num_units
        desired = max(1, width // 3) + turns[group.name] % TURNS
        num_removed = max(1, min(width - 2, desired))  # with one unit left some programs run other operators
        removed = ((np.arange(num_removed) + 0.5) * width / num_removed).astype(np.int64)
        keep[group.name] = np.setdiff1d(np.arange(width, dtype=np.int64), removed)
    return PruningPlan(keep=keep, num_units={g.name: g.num_units for g in groups})


def _labels(propagation: Propagation, group: Group) -> LabelArray:
    starts = {(s.name, s.dim): s.start for s in propagation.labels.slots}
    return np.concatenate([starts[m.name, m.dim] + m.index.ravel() for m in group.members])


def _passes(propagation: Propagation, modules: Collection[str], group: Group) -> bool:
    """Return whether a group's channels are rearranged or split in one of the modules."""
    labels, ops = _labels(propagation, group), propagation.recording.ops
    axes = [
        *((n, o.labels) for n, o in propagation.reorderings.items()),
        *((n, np.concatenate(p)) for n, p in propagation.splits),
    ]
    return any(ops[op].module in modules and np.isin(axis, labels).any() for op, axis in axes)


def _choose_again(propagation: Propagation, labels: LabelArray, choices: dict[int, int]) -> bool:
    """Let the reshapes that these channels pass shrink along their next axis.

    Return whether any of them had a next axis.
    """
    changed = False
    for site in propagation.reshape_splits:
        later = site.options[site.options.index(site.chosen) + 1 :] if site.chosen in site.options else ()
        if later and site.op not in choices and np.isin(site.labels, labels).any():
            choices[site.op] = later[0]
            changed = True
    return changed


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
