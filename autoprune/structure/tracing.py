"""The way into this room: `trace` makes the graph of a network.

It records one forward pass (`recorder`), propagates labels over it (`propagate`, `rules`), sorts the
classes of tied labels into groups (`grouping`), and returns the graph once its pruned network has run
(`verification`).

The coupling of layers into groups is that of Fang et al., "DepGraph", CVPR 2023, section 3; labels that
travel over operators are ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn

from autoprune.config import Norms
from autoprune.errors import UsageError
from autoprune.structure.graph import ChannelGraph
from autoprune.structure.grouping import TraceOptions
from autoprune.structure.recorder import record
from autoprune.structure.verification import verify_graph


def trace(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    *,
    exclude: Sequence[str] = (),
    only: Sequence[str] = (),
    round_to: int = 1,
    norms: Norms = "keep",
) -> ChannelGraph:
    """Trace a network: record it, tie its channels, verify that the program does what the labels say.

    It takes a few passes without arithmetic where the forward runs without values, and in some cases a
    comparison in numbers (`verification`).

    Args:
        model: any module; left as it was.
        example_inputs: a tensor or the tuple of forward's arguments, of the shape that the network will
            see.
        exclude: module names or globs whose channels stay.
        only: module names or globs; where given, channels of all other modules stay.
        norms: `rescale` lets channels behind a layer norm go too, where they are zero in the masked
            network; the layer norm then counts the original width. `keep` leaves such widths alone.
        round_to: kept counts should be multiples of this.

    Raises:
        TraceError: the forward pass fails on these inputs.
        UsageError: a pattern matches no module.
    """
    inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
    options = TraceOptions(
        exclusions=_excluded(model, exclude, only), round_to=round_to, rescales_norms=norms == "rescale"
    )
    return verify_graph(model, inputs, record(model, inputs), options)


def _suggestion(pattern: str, names: Sequence[str]) -> str:
    near = difflib.get_close_matches(pattern, names, n=1)
    return f"did you mean {near[0]!r}?" if near else f"modules are named like {', '.join(names[:3])}"


def _excluded(model: nn.Module, exclude: Sequence[str], only: Sequence[str]) -> dict[str, str]:
    """Return the modules whose channels the user wants to stay, each with the option that says so."""
    names = [name for name, _ in model.named_modules() if name]
    matched: dict[str, set[str]] = {}
    for pattern in (*exclude, *only):
        hits = {n for n in names if fnmatchcase(n, pattern) or n.startswith(pattern + ".") or n == pattern}
        matched[pattern] = hits | {n for n in names for h in hits if n.startswith(h + ".")}
        if not hits:
            raise UsageError(
                f"the pattern {pattern!r} matches no module of the network",
                f"{_suggestion(pattern, names)}; see `autoprune groups`",
            )
    options = {name: f"excluded by {p!r}" for p in exclude for name in matched[p]}
    if only:
        chosen = set().union(*(matched[p] for p in only))
        options |= {n: f"not among only={list(only)}" for n in names if n not in chosen and n not in options}
    return options
