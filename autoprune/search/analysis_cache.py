"""The measured points of an analysis, stored as they come, so that an analysis that was stopped goes on.

Points belong to the network that they were measured on, named by its checkpoint. Each is an attribute of the
baseline's study, because the round's own study is created when its analysis is complete.
"""

from __future__ import annotations

import math

import optuna

from autoprune.metrics import Evaluation
from autoprune.pruning import SensitivityPoint, SensitivityTable, point_from_values, point_values

PREFIX = "point"


def store_point(study: optuna.Study, checkpoint: str, point: SensitivityPoint) -> None:
    """Store one point of the network in this checkpoint."""
    study.set_user_attr(f"{PREFIX} {checkpoint} {point.group} {point.ratio!r}", point_values(point))


def load_points(study: optuna.Study, checkpoint: str) -> SensitivityTable | None:
    """Return the stored points of a network for `sensitivity` to go on from, None where there are none."""
    prefix = f"{PREFIX} {checkpoint} "
    points = tuple(point_from_values(v) for key, v in study.user_attrs.items() if key.startswith(prefix))
    unknown = Evaluation(top1=math.nan, loss=math.nan, num_samples=0)
    return SensitivityTable(points=points, baseline=unknown) if points else None
