from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch

from autoprune import events as ev
from autoprune.config import Lock
from autoprune.pipeline import run
from autoprune.points import keep_point, kept_points
from autoprune.sensitivity import SensitivityPoint, sensitivity
from autoprune.tracing import trace
from tests.tiny import tiny_net, tiny_split, tiny_study

RATIOS = (0.25, 0.5, 0.75)
PLAIN = Lock(plain=True)


def test_a_stopped_analysis_goes_on_where_it_was() -> None:
    net, split, study = tiny_net().eval(), tiny_split(200, 2), optuna.create_study()
    graph = trace(net, torch.zeros(1, 1, 8, 8))
    whole = sensitivity(net, graph, split, ratios=RATIOS)

    def stop_at(count: int) -> Callable[[SensitivityPoint], None]:
        def on_point(point: SensitivityPoint) -> None:
            keep_point(study, "first", point)
            fresh.append(point)
            if len(fresh) == count:
                raise KeyboardInterrupt

        return on_point

    fresh: list[SensitivityPoint] = []
    with pytest.raises(KeyboardInterrupt):
        sensitivity(net, graph, split, ratios=RATIOS, on_point=stop_at(2))
    assert kept_points(study, "second") is None
    fresh.clear()
    known = kept_points(study, "first")
    assert known is not None
    table = sensitivity(net, graph, split, ratios=RATIOS, known=known, on_point=stop_at(99))
    assert len(fresh) == len(whole.points) - 2
    assert table.points == whole.points
    assert table.baseline.top1 == whole.baseline.top1
    again = sensitivity(net, graph, split, ratios=RATIOS, known=kept_points(study, "first"))
    assert again.points == whole.points
    assert np.isfinite(again.baseline.loss)


def test_a_killed_run_measures_no_point_twice(tmp_path: Path) -> None:
    seen: list[int] = []

    def stop_at(count: int) -> Callable[[ev.Event], None]:
        def on_event(event: ev.Event) -> None:
            if isinstance(event, ev.StageProgress) and event.stage == "analysis" and event.round == 1:
                seen.append(event.done)
                if len(seen) == count:
                    raise KeyboardInterrupt

        return on_event

    with pytest.raises(KeyboardInterrupt):
        run(tiny_study(), out=tmp_path / "run", lock=PLAIN, on_event=stop_at(1))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_study(), out=tmp_path / "run", lock=PLAIN, resume=True, on_event=stop_at(2))
    assert seen == [1, 2]
