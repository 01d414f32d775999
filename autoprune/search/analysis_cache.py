"""The measured points of an analysis, kept with the run as they come: an analysis that is stopped goes on.

Points belong to the network that they were measured on, named by its checkpoint. They lie as attributes of
the original's study, one a point, because the round's own study begins when its analysis is done.
"""

from __future__ import annotations

import math

import optuna

from autoprune.metrics import Evaluation
from autoprune.pruning import SensitivityPoint, SensitivityTable, point_from_values, point_values

KIND = "point"


def keep_point(study: optuna.Study, checkpoint: str, point: SensitivityPoint) -> None:
    """Keep one point of the network in this checkpoint."""
    study.set_user_attr(f"{KIND} {checkpoint} {point.group} {point.ratio!r}", point_values(point))


def kept_points(study: optuna.Study, checkpoint: str) -> SensitivityTable | None:
    """The points kept of this network, for `sensitivity` to go on from; None where there are none."""
    start = f"{KIND} {checkpoint} "
    points = tuple(point_from_values(v) for key, v in study.user_attrs.items() if key.startswith(start))
    nothing = Evaluation(top1=math.nan, loss=math.nan, num_samples=0)
    return SensitivityTable(points=points, baseline=nothing) if points else None
