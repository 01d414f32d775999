"""Labels: one integer for every position of every parameter dimension, and which of them must go together.

A *slot* is one dimension of one parameter (or one padded edge of an activation). It owns a contiguous range
of labels, so that a label identifies a parameter, a dimension and a position. Operators *tie* labels that
must stay or go together and *freeze* those that must stay. Ties are only collected during a propagation.
The classes of tied labels are the connected components of the graph of ties, computed once at the end.

`FIXED` (-1) stands for a position that has no label and therefore always stays.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

LabelArray = NDArray[np.int64]
Role = Literal["out", "in", "affine"]
FIXED = -1
BEHIND_LAYER_NORM = "layer norm over the channels"


@dataclass(slots=True)
class Slot:
    """One parameter dimension, or one padded edge of an activation.

    Attributes:
        name: the name of the parameter or buffer, or of the module that pads.
        start: its first label; the slot owns `size` of them.
        role: what it does with channels, see `graph.Member`; None where no operator marked it.
        pad_op: position of the padding operator in the recording; None for a parameter.
        side: the padded edge.
        is_open: whether it is an axis along which a tensor has the same value everywhere, such as one that
            was expanded: no parameter owns it, and it is as long as what it meets.
    """

    name: str
    dim: int
    start: int
    size: int
    role: Role | None = None
    pad_op: int | None = None
    side: Literal["left", "right"] = "left"
    is_open: bool = False


@dataclass(frozen=True, slots=True)
class Freeze:
    """Labels that must stay, and the reason.

    `is_structural` marks axes that never held channels, such as a kernel's width.
    """

    reason: str
    labels: LabelArray
    is_structural: bool = False


class Labels:
    """The ties and freezes of one network, as a propagation collects them."""

    def __init__(self) -> None:
        self.slots: list[Slot] = []
        self.size = 0
        self.freezes: list[Freeze] = []
        self.ignores_fixed = False  # a lookahead follows one axis; positions of others are unknown, not fixed
        self.is_muted = False  # set for operators whose results reach no output
        self.has_open = False
        self._starts: list[int] = []
        self._ties: list[tuple[LabelArray, LabelArray]] = []
        self._classes: tuple[tuple[int, int], NDArray[np.int32]] | None = None

    def new(self, name: str, dim: int, size: int, *, is_open: bool = False) -> LabelArray:
        """Add a slot of `size` fresh labels and return them, int64 (size,)."""
        self.slots.append(Slot(name, dim, self.size, size, is_open=is_open))
        self.has_open = self.has_open or is_open
        self._starts.append(self.size)
        self.size += size
        return np.arange(self.size - size, self.size, dtype=np.int64)

    def tie(self, left: LabelArray, right: LabelArray, reason: str) -> LabelArray:
        """Tie two arrays position by position and return the merged array.

        Labels that meet `FIXED` freeze for `reason`.
        """
        if left is right or self.is_muted:
            return left
        both = (left >= 0) & (right >= 0)
        if both.all():
            self._ties.append((left, right))
            return left
        self._ties.append((left[both], right[both]))
        if self.ignores_fixed:
            return np.where(left >= 0, left, right)
        self.freeze(np.where(left >= 0, left, right)[~both], reason)
        return np.where(both, left, FIXED)

    def freeze(self, labels: LabelArray | None, reason: str, *, is_structural: bool = False) -> None:
        """Freeze these labels, for a reason that a person can read."""
        if labels is None or self.is_muted:
            return
        labels = labels[labels >= 0]
        if labels.size:
            self.freezes.append(Freeze(reason, labels, is_structural))

    def mark(self, labels: LabelArray | None, role: Role) -> None:
        """Note the role of the slots of these labels; a role once noted stays."""
        if labels is None:
            return
        labels = labels[labels >= 0]
        if not labels.size:
            return
        first, last = (bisect_right(self._starts, int(n)) - 1 for n in (labels.min(), labels.max()))
        numbers = [first] if first == last else np.unique(np.searchsorted(self._starts, labels, "right") - 1)
        for number in numbers:
            slot = self.slots[int(number)]
            slot.role = slot.role or role

    def open_labels(self) -> NDArray[np.bool_]:
        """Return which labels lie in open slots, bool (size,)."""
        is_open = np.zeros(self.size, bool)
        for slot in self.slots:
            if slot.is_open:
                is_open[slot.start : slot.start + slot.size] = True
        return is_open

    def is_open(self, labels: LabelArray) -> bool:
        """Return whether all labels of an axis lie in open slots."""
        if not self.has_open or not (labels >= 0).any():
            return False
        numbers = np.unique(np.searchsorted(self._starts, labels[labels >= 0], "right") - 1)
        return all(self.slots[n].is_open for n in numbers.tolist())

    def classes(self) -> NDArray[np.int32]:
        """Return the class number of every label, int32 (size,); labels with the same number are tied."""
        state = (self.size, len(self._ties))
        if self._classes is None or self._classes[0] != state:
            self._classes = (state, self._find_classes())
        return self._classes[1]

    def _find_classes(self) -> NDArray[np.int32]:
        if not self._ties:
            return np.arange(self.size, dtype=np.int32)
        left = np.concatenate([a for a, _ in self._ties])
        right = np.concatenate([b for _, b in self._ties])
        edges = coo_array((np.ones(len(left), np.int8), (left, right)), shape=(self.size, self.size))
        _, classes = connected_components(edges, directed=False)
        return np.asarray(classes, dtype=np.int32)
