"""Numbers on modules that count what pruning removes: heads, groups, the width of pieces.

Where a forward computes with `self.num_heads`, the dense network needs another number there. The value of
an attribute and a word in its name say whether it is one of these; the verifier finds out whether that was
right.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from torch import nn

from autoprune.structure.cost import Axis
from autoprune.structure.graph import CountAttribute
from autoprune.structure.labels import LabelArray
from autoprune.structure.propagate import Propagation

PIECES: tuple[str, ...] = ("head", "group")
PARTS = ("width", "split", "chunk")
WIDTHS = ("attn", "inner", "all_head", "hidden", "out_dim", "dim_out", "val")


def find_count_attributes(
    propagation: Propagation, axis_of: Callable[[LabelArray], Axis]
) -> tuple[CountAttribute, ...]:
    """Return all attributes that count channels of a group."""
    rules = [(r.module, r.attribute, r.labels, r.per) for r in propagation.unit_counts]
    by_rule = [CountAttribute(module=m, attribute=a, axis=axis_of(x), per=p) for m, a, x, p in rules]
    return (*by_rule, *_where_axes_split(propagation, axis_of))


def _where_axes_split(
    propagation: Propagation, axis_of: Callable[[LabelArray], Axis]
) -> list[CountAttribute]:
    """Return the attributes of modules that split and merge a channel axis: how many pieces, how wide."""
    axes = [(s.op, np.unique(s.labels[s.labels >= 0]), PIECES) for s in propagation.reshape_splits]
    axes += [(op, labels, WIDTHS) for op, labels in propagation.reshape_merges]
    axes += [(op, pieces[0], PARTS) for op, pieces in propagation.splits]
    by_name: dict[tuple[str, str], CountAttribute] = {}
    for op, labels, words in axes:
        module, axis = propagation.recording.ops[op].module, axis_of(labels)
        if axis.per_unit:
            for name in _counting_attributes(propagation.modules[module], len(labels), words):
                by_name[module, name] = CountAttribute(module=module, attribute=name, axis=axis, per=1)
    return list(by_name.values())


def _counting_attributes(module: nn.Module, length: int, words: tuple[str, ...]) -> list[str]:
    """Return the integers of that value on a module that have one of the words in their name."""
    names = [n for n, v in vars(module).items() if type(v) is int and v == length]
    named = [n for n in names if any(w in n for w in words)]
    plain = [n for n in named if not any(w in n for w in ("dim", "size", "width", "channels"))]
    return plain or named if words is PIECES else named
