"""Rooms are described once all of them stand."""

from autoprune.pruning.allocation import STRATEGIES, allocate
from autoprune.pruning.criteria import CRITERIA, Scores, score
from autoprune.pruning.one_shot import prospects
from autoprune.pruning.prunability import COLUMNS, Cell, Probed, Prospect, answer, cells, verdicts
from autoprune.pruning.screening import bench, screen
from autoprune.pruning.sensitivity import (
    SensitivityPoint,
    SensitivityTable,
    most_points,
    point_of,
    sensitivity,
    values_of,
)

__all__ = [
    "COLUMNS",
    "CRITERIA",
    "STRATEGIES",
    "Cell",
    "Probed",
    "Prospect",
    "Scores",
    "SensitivityPoint",
    "SensitivityTable",
    "allocate",
    "answer",
    "bench",
    "cells",
    "most_points",
    "point_of",
    "prospects",
    "score",
    "screen",
    "sensitivity",
    "values_of",
    "verdicts",
]
