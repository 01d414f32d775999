"""How far apart two results may lie that differ in nothing but the order of their arithmetic.

A tolerance that was measured on one processor holds on that processor. These follow from the arithmetic: a
sum of n terms in a format with the unit roundoff u is off by at most n u of the sum of its terms' sizes
(Higham 2002, "Accuracy and Stability of Numerical Algorithms", section 4.2), and a training carries the error
of each of its steps along.
"""

from __future__ import annotations

import torch


def rounding(dtype: torch.dtype, *, terms: int, steps: int = 1) -> float:
    """The relative difference that `steps` results in a row, each a sum of `terms` terms, may have."""
    return torch.finfo(dtype).eps * terms * steps
