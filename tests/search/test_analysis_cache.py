from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch

from autoprune import events as ev
from autoprune.config import Analysis, Baseline, Protection
from autoprune.errors import ConfigError, UsageError
from autoprune.pipeline.run import run
from autoprune.pruning.sensitivity import SensitivityPoint, sensitivity
from autoprune.search.analysis_cache import load_points, store_point
from autoprune.structure.tracing import trace
from autoprune.training.finetune import train_baseline_
from tests.tiny import TinyNet, tiny_data, tiny_net, tiny_split, tiny_study

RATIOS = (0.25, 0.5, 0.75)
PLAIN = Protection(plain=True)


def test_a_stopped_analysis_goes_on_where_it_was() -> None:
    net, split, study = tiny_net().eval(), tiny_split(200, 2), optuna.create_study()
    graph = trace(net, torch.zeros(1, 1, 8, 8))
    whole = sensitivity(net, graph, split, settings=Analysis(ratios=RATIOS))

    def stop_at(count: int) -> Callable[[SensitivityPoint], None]:
        def on_point(point: SensitivityPoint) -> None:
            store_point(study, "first", point)
            fresh.append(point)
            if len(fresh) == count:
                raise KeyboardInterrupt

        return on_point

    fresh: list[SensitivityPoint] = []
    with pytest.raises(KeyboardInterrupt):
        sensitivity(net, graph, split, settings=Analysis(ratios=RATIOS), on_point=stop_at(2))
    assert load_points(study, "second") is None
    fresh.clear()
    known = load_points(study, "first")
    assert known is not None
    table = sensitivity(
        net, graph, split, settings=Analysis(ratios=RATIOS), known=known, on_point=stop_at(99)
    )
    assert len(fresh) == len(whole.points) - 2
    assert table.points == whole.points
    assert table.baseline.top1 == whole.baseline.top1
    again = sensitivity(
        net, graph, split, settings=Analysis(ratios=RATIOS), known=load_points(study, "first")
    )
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
        run(tiny_study(), out=tmp_path / "run", protection=PLAIN, on_event=stop_at(1))
    with pytest.raises(KeyboardInterrupt):
        run(tiny_study(), out=tmp_path / "run", protection=PLAIN, resume=True, on_event=stop_at(2))
    assert seen == [1, 2]


def test_an_analysis_is_used_by_a_run_of_the_same_network_and_refused_by_another(tmp_path: Path) -> None:
    def network() -> TinyNet:
        net = tiny_net()
        train_baseline_(net, tiny_data().train, Baseline(epochs=2, lr=0.1, batch_size=64), seed=0)
        return net

    graph = trace(network(), torch.zeros(1, 1, 8, 8))
    data = tiny_data()
    table = sensitivity(
        network().eval(), graph, data.search, settings=Analysis(ratios=(0.5,)), calibration=data.train
    )
    file = tmp_path / "analysis.json"
    file.write_text(table.to_json())
    given = Analysis(ratios=(0.5,), known=str(file))
    seen: list[ev.Event] = []

    def stop(event: ev.Event) -> None:
        seen.append(event)
        if isinstance(event, ev.RoundStarted):
            raise KeyboardInterrupt

    study = tiny_study(model=network, baseline=None, analysis=given, target="macs=0.7")
    with pytest.raises(KeyboardInterrupt):
        run(study, out=tmp_path / "run", protection=PLAIN, on_event=stop)
    assert not [e for e in seen if isinstance(e, ev.StageProgress) and e.stage == "analysis"]
    with pytest.raises(UsageError, match="another network"):
        run(replace(study, model=tiny_net), out=tmp_path / "other", protection=PLAIN)
    nothing = replace(study, analysis=replace(given, known=str(tmp_path / "nothing.json")))
    with pytest.raises(ConfigError, match="is no file"):
        run(nothing, out=tmp_path / "third", protection=PLAIN)
