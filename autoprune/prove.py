"""Does the program agree? A graph is given out only after its pruned network has run.

Sizes can be written into `forward` where no label sees them: a reshape to 64 channels, a slice of the first
half, a width taken from an attribute. So a pruned copy runs once without values, and networks that are
cheap to run are compared with the masked original in numbers. Groups that fail are found by bisection. Each
is tried with another axis where a reshape left the choice, and frozen with its reason otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import nn

from autoprune.densify import densify, densify_on_meta, difference, masked
from autoprune.graph import ChannelGraph, Group
from autoprune.grouping import build
from autoprune.labels import LabelArray
from autoprune.plan import PruningPlan
from autoprune.tape import Tape, forward_shapes
from autoprune.walk import Walk

CHEAP_MACS = 1_000_000_000  # a network below this is always compared in numbers: about 0.1 s on two cores
RISKY_MACS = 6_000_000_000  # one with reshapes, splits or slices of channels up to this
NOISE = 1e-3  # relative; float32 summation order, far below any real difference
ROUNDS = 12

Check = Callable[[Sequence[Group]], str | None]


def proven(
    model: nn.Module, inputs: tuple[Any, ...], tape: Tape, kept: Mapping[str, str], round_to: int
) -> ChannelGraph:
    """The graph of a recorded network, without the groups that its program does not allow to shrink."""
    choices: dict[int, int] = {}
    refused: list[tuple[LabelArray, str]] = []
    for _ in range(ROUNDS):
        graph, walk = build(model, tape, choices=choices, kept=kept, refused=refused, round_to=round_to)
        failing = _failing(model, inputs, graph, walk)
        if not failing:
            return graph
        for group, reason in failing:
            if not _choose_again(graph, walk, group, choices):
                refused.append((_labels(walk, group), reason))
    everything = np.arange(walk.labels.size)
    refused.append((everything, "the network's program agrees with no pruned sizes that were tried"))
    return build(model, tape, choices=choices, kept=kept, refused=refused, round_to=round_to)[0]


def _failing(
    model: nn.Module, inputs: tuple[Any, ...], graph: ChannelGraph, walk: Walk
) -> list[tuple[Group, str]]:
    groups = graph.groups
    if not groups:
        return []
    expected = [walk.shape(r) for r in walk.tape.outputs]

    def shapes(chosen: Sequence[Group]) -> str | None:
        try:
            got = forward_shapes(densify_on_meta(model, graph, _probe_plan(chosen)), inputs)
        except Exception as error:
            return f"its forward has the size written in: {_first_line(error)}"
        return None if got == expected else f"its output becomes {got}"

    def numbers(chosen: Sequence[Group]) -> str | None:
        plan = _probe_plan(chosen)
        try:
            error = difference(densify(model, graph, plan), masked(model, graph, plan), inputs)
        except Exception as failure:
            return f"its forward has the size written in: {_first_line(failure)}"
        return None if error < NOISE else f"the pruned network computes something else ({error:.1e} apart)"

    failing = _bisect(groups, shapes) if walk.can_run_on_meta else []
    if failing:
        return failing
    macs = graph.cost().macs
    limit = RISKY_MACS if walk.is_risky else CHEAP_MACS
    return _bisect(groups, numbers) if macs <= limit or not walk.can_run_on_meta else []


def _bisect(groups: Sequence[Group], check: Check) -> list[tuple[Group, str]]:
    reason = check(groups)
    if reason is None:
        return []
    if len(groups) == 1:
        return [(groups[0], reason)]
    half = len(groups) // 2
    found = [*_bisect(groups[:half], check), *_bisect(groups[half:], check)]
    return found or [(g, reason) for g in groups]  # they fail only together


def _probe_plan(groups: Sequence[Group]) -> PruningPlan:
    """About a third of every group's units removed, at least one, from all over it."""
    keep = {}
    for group in groups:
        units = np.arange(group.num_units)
        kept = units[units % 3 != 1]
        keep[group.name] = kept.astype(np.int64)
    return PruningPlan(keep=keep, num_units={g.name: g.num_units for g in groups})


def _labels(walk: Walk, group: Group) -> LabelArray:
    starts = {(s.name, s.dim): s.start for s in walk.labels.slots}
    return np.concatenate([starts[m.name, m.dim] + m.index.ravel() for m in group.members])


def _choose_again(graph: ChannelGraph, walk: Walk, group: Group, choices: dict[int, int]) -> bool:
    """Let the reshapes that this group passes shrink along their next axis; False where none has one."""
    mine = set(_labels(walk, group).tolist())
    changed = False
    for site in walk.sites:
        later = site.options[site.options.index(site.chosen) + 1 :] if site.chosen in site.options else ()
        if later and site.op not in choices and mine.intersection(site.labels.tolist()):
            choices[site.op] = later[0]
            changed = True
    return changed


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:120] if str(error) else type(error).__name__
