"""A channel graph for people and for machines: groups as a tree of layers, what stays by reason."""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.console import Group as Stacked
from rich.console import RenderableType
from rich.text import Text
from rich.tree import Tree

from autoprune.formatting import count, percent
from autoprune.serialization import to_plain

if TYPE_CHECKING:
    from autoprune.structure import ChannelGraph, Frozen, Group, Member

ROLES = {"out": "made by", "affine": "scaled by", "in": "read by"}
SHOWN = 4  # parameters named for one reason; the rest is counted


def groups_tree(graph: ChannelGraph) -> RenderableType:
    """One branch for every group, then one for every reason to stay."""
    from autoprune.structure import BEHIND_LAYER_NORM

    cost = graph.cost()
    title = f"{count(cost.macs)} MACs, {count(cost.params)} parameters, {len(graph.groups)} groups"
    tree = Tree(Text(f"{title}; {percent(graph.reach)} of the MACs within reach", "bold"), guide_style="dim")
    for group in graph.groups:
        branch = tree.add(_heading(group, cost.macs))
        for role, words in ROLES.items():
            layers = dict.fromkeys(_layer(m) for m in group.members if m.role == role)
            if layers:
                branch.add(Text.assemble((f"{words} ", "dim"), ", ".join(layers)))
        if group.paddings:
            branch.add(Text.assemble(("padded by ", "dim"), ", ".join(p.module for p in group.paddings)))
    if not graph.frozen:
        return tree
    is_behind = any(f.reason.startswith(BEHIND_LAYER_NORM) for f in graph.frozen)
    hint = [Text("Channels behind layer norms may go with --norms rescale.", "dim")] if is_behind else []
    return Stacked(tree, Text(), _frozen_tree(graph.frozen), *hint)


def _heading(group: Group, macs: int) -> Text:
    width = f"{group.num_units} units"
    positions = max((m.index.shape[1] for m in group.members if m.role == "out"), default=1)
    if positions > 1:
        width += f" of {positions} channels"
    share = f"{count(group.macs)} MACs at stake ({percent(group.macs / macs if macs else 0.0)})"
    return Text.assemble((group.name, "bold cyan"), f"  {width}, {share}")


def _layer(member: Member) -> str:
    return member.name.rpartition(".")[0] or member.name


def _frozen_tree(frozen: tuple[Frozen, ...]) -> Tree:
    tree = Tree(Text("These stay:", "bold"), guide_style="dim")
    ordered = sorted(frozen, key=lambda f: f.reason)
    for reason, same in groupby(ordered, key=lambda f: f.reason):
        parts = [f"{f.name} [dim {f.dim}]" for f in same]
        more = f" and {len(parts) - SHOWN} more" if len(parts) > SHOWN else ""
        tree.add(Text(reason)).add(Text(", ".join(parts[:SHOWN]) + more, "dim"))
    return tree


def graph_document(graph: ChannelGraph) -> dict[str, Any]:
    """Everything that the tree shows, and every member, as plain values."""
    groups = [
        {
            "name": g.name, "num_units": g.num_units, "macs": g.macs, "layers": list(g.layers),
            "members": [
                {"name": m.name, "dim": m.dim, "role": m.role, "positions_per_unit": m.index.shape[1]}
                for m in g.members
            ],
        }
        for g in graph.groups
    ]  # fmt: skip
    return {
        "groups": groups, "frozen": to_plain(graph.frozen),
        "cost": to_plain(graph.cost()), "reach": graph.reach,
    }  # fmt: skip
