"""The decision what to remove: the worth of each group, the order of its units, and how many of them go.

The room has three concepts. A *criterion* scores every unit of a group, and the lowest scores go first.
The *sensitivity* of a group is the accuracy that is lost when that group alone is pruned by a ratio. An
*allocation* decides from both how many units each group keeps, so that the network has a requested cost.

Modules, in reading order:

- `criteria`: defines one function per ranking criterion, and `score`, which applies a criterion to all
  groups.
- `partial_forward`: makes a recorded pass a program that runs again only the steps that changed weights
  reach.
- `variants`: evaluates many pruned variants of one network on the same samples.
- `sensitivity`: measures the sensitivity table, at ratios that bisection chooses.
- `allocation`: makes a pruning plan of a given cost, from scores and a sensitivity table.
- `screening`: compares plans of one cost by evaluating them, and searches for better ones.
- `prunability`: says how far a network can be pruned in one step, and which groups are fragile.
"""

from autoprune.pruning.allocation import STRATEGIES, allocate
from autoprune.pruning.criteria import CRITERIA, Scores, score
from autoprune.pruning.prunability import (
    COLUMNS,
    Cell,
    MeasuredPoint,
    Prospect,
    cells,
    free_and_fragile,
    one_shot_prospects,
    prunability_sentence,
)
from autoprune.pruning.screening import make_setup, rank_plans
from autoprune.pruning.sensitivity import (
    SensitivityPoint,
    SensitivityTable,
    max_num_points,
    point_from_values,
    point_values,
    sensitivity,
)

__all__ = [
    "COLUMNS",
    "CRITERIA",
    "STRATEGIES",
    "Cell",
    "MeasuredPoint",
    "Prospect",
    "Scores",
    "SensitivityPoint",
    "SensitivityTable",
    "allocate",
    "cells",
    "free_and_fragile",
    "make_setup",
    "max_num_points",
    "one_shot_prospects",
    "point_from_values",
    "point_values",
    "prunability_sentence",
    "rank_plans",
    "score",
    "sensitivity",
]
