from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from autoprune.errors import UsageError
from autoprune.plan import PruningPlan
from autoprune.pruning.allocation import allocate
from autoprune.structure.densify import densify
from autoprune.structure.graph import ChannelGraph
from autoprune.structure.latency import (
    LatencyModel,
    kernel_of,
    measure_latency_share,
    time_products,
    with_latency_model,
)
from autoprune.structure.timings import Timings, time_interleaved
from autoprune.structure.tracing import trace
from tests.clock import Clock
from tests.patterns import PATTERNS
from tests.tiny import tiny_net

CPU = torch.device("cpu")
KNOTS = [0.25, 0.5, 0.75, 1.0]


def hand_made(seconds: list[list[float]]) -> LatencyModel:
    """One operator over two axes of 40 channels each, the first with 10 more that stay."""
    return LatencyModel(
        rows=np.array([[0, 1]]), fixed=np.array([[10, 0]]), span=np.array([[40, 40]]),
        knots=np.array([[KNOTS, KNOTS]]), seconds=np.array([seconds]),
    )  # fmt: skip


TABLE = [[0.1, 0.2, 0.2, 0.4], [0.2, 0.3, 0.4, 0.8], [0.3, 0.6, 0.8, 0.9], [0.4, 0.8, 1.0, 1.6]]
FULL = np.array([50, 40, 1])


@given(measured=st.floats(1e-5, 10), smaller=st.floats(1e-5, 10))
@settings(deadline=None)
def test_the_whole_network_is_predicted_as_it_was_measured(measured: float, smaller: float) -> None:
    half = (np.array([30, 20, 1]), 400, smaller)
    for points in ([(FULL, 1000, measured)], [(FULL, 1000, measured), half]):
        model = hand_made(TABLE).fitted(points)
        assert model(FULL, 1000) == pytest.approx(measured)
        assert model(np.array([30, 20, 1]), 400) <= measured * (1 + 1e-9)


@given(
    first=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    second=st.tuples(st.integers(1, 40), st.integers(1, 40)),
)
@settings(deadline=None)
def test_fewer_channels_never_take_longer_on_a_rising_table(
    first: tuple[int, int], second: tuple[int, int]
) -> None:
    model = hand_made(TABLE).fitted([(FULL, 1000, 2.0)])
    low, high = np.minimum(first, second), np.maximum(first, second)
    predicted = [model(np.array([10 + n, m, 1]), 10 * int(n)) for n, m in (low, high)]
    assert 0 <= predicted[0] <= predicted[1] * (1 + 1e-9)


def test_timings_are_met_at_the_knots_and_lines_lie_between() -> None:
    model = hand_made(TABLE)
    for i, a in enumerate(KNOTS):
        for j, b in enumerate(KNOTS):
            assert model(np.array([10 + 40 * a, 40 * b, 1]), 0) == pytest.approx(TABLE[i][j])
    assert model(np.array([10 + 25, 40, 1]), 0) == pytest.approx((0.8 + 0.9) / 2)
    assert model(np.array([10 + 5, 40, 1]), 0) == pytest.approx(0.4 - (0.8 - 0.4) / 2)
    assert model(np.array([10, 40, 1]), 0) == 0, "the lowest line would end below zero"
    assert model(np.array([10 + 5, 20, 1]), 0) == pytest.approx(0.2 / 2), (
        "as steep as where the other is whole"
    )


def test_what_is_not_timed_scales_by_the_volume_written() -> None:
    nothing = LatencyModel(
        rows=np.zeros((0, 1), np.int64), fixed=np.zeros((0, 1), np.int64), span=np.zeros((0, 1), np.int64),
        knots=np.zeros((0, 1, 4)), seconds=np.zeros((0, 4)),
    )  # fmt: skip
    lengths = np.array([1])
    assert nothing.fitted([(lengths, 1000, 0.5)])(lengths, 250) == pytest.approx(0.125)
    line = nothing.fitted([(lengths, 1000, 0.5), (lengths, 500, 0.4)])
    assert line(lengths, 500) == pytest.approx(0.4)
    assert line(lengths, 0) == pytest.approx(0.3), "the interpreter's share stays"


def test_operators_slower_alone_than_in_the_network_are_scaled() -> None:
    model = hand_made(TABLE).fitted([(FULL, 1000, 0.8), (np.array([30, 20, 1]), 400, 0.1)])
    assert model.scale == pytest.approx(0.5)
    assert model(np.array([30, 20, 1]), 400) == pytest.approx(0.15)


def test_timings_come_back_from_disk_and_are_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def measure() -> float:
        calls.append(1)
        return 0.25

    timings = Timings.of(CPU)
    assert [timings.get("conv", measure), timings.get("conv", measure)] == [0.25, 0.25]
    timings.save()
    again = Timings.of(CPU)
    assert again.get("conv", measure) == 0.25
    assert len(calls) == 1
    assert [p.suffix for p in (tmp_path / "autoprune").iterdir()] == [".json"]
    assert f"{torch.get_num_threads()}-threads" in str(again.path)


def test_two_processes_keep_each_others_timings(tmp_path: Path) -> None:
    first, second = (Timings(path=tmp_path / "t.json") for _ in range(2))
    first.get("a", lambda: 1.0)
    second.get("b", lambda: 2.0)
    first.save()
    second.save()
    assert json.loads((tmp_path / "t.json").read_text())["seconds"] == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", "null", '{"version": 99, "seconds": {"conv": 1}}', '{"version": 1, "seconds": [1]}',
     '{"version": 1, "seconds": {"conv": "soon"}}', '{"version": 1, "seconds": {"conv": -1}}',
     '{"version": 1, "seconds": {"conv": NaN}}', "\xff"],
)  # fmt: skip
def test_a_damaged_table_is_ignored_and_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = Timings.of(CPU).path
    assert path is not None
    path.parent.mkdir()
    path.write_bytes(damage.encode("latin-1"))
    timings = Timings.of(CPU)
    assert timings.seconds == {}
    timings.get("conv", lambda: 0.5)
    timings.save()
    assert Timings.of(CPU).seconds == {"conv": 0.5}


def test_a_folder_that_cannot_be_written_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    timings = Timings(path=tmp_path / "file" / "t.json")
    timings.get("conv", lambda: 0.5)
    timings.save()
    assert timings.seconds == {"conv": 0.5}


REPLAYED = [
    "concatenation", "conv1d", "conv3d", "conv_transpose", "conv_transpose_depthwise",
    "conv_transpose_grouped", "depthwise_multiplier", "few_groups", "fused_attention", "many_groups",
    "residual", "sequential", "squeeze_excite", "token_mixer",
]  # fmt: skip


@pytest.mark.parametrize("name", REPLAYED)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6])
def test_an_operator_is_replayed_as_the_pruned_network_runs_it(name: str, ratio: float) -> None:
    torch.manual_seed(0)
    model, inputs = PATTERNS[name].build().eval(), PATTERNS[name].inputs()
    graph = trace(model, inputs)
    plan = PruningPlan.random(graph, ratio, 0)
    pruned = trace(densify(model, graph, plan), inputs)
    assert keys(graph, {n: len(k) for n, k in plan.keep.items()}) == keys(pruned, {})
    for kernel in (kernel_of(graph.recording, p, lengths_of(graph, {})) for p in graph.products):  # type: ignore[arg-type]
        assert isinstance(kernel.call(CPU)(), torch.Tensor | tuple)


def lengths_of(graph: ChannelGraph, counts: dict[str, int]) -> np.ndarray:
    return graph.cost_model.lengths(np.array([counts.get(g.name, g.num_units) for g in graph.groups]))


def keys(graph: ChannelGraph, counts: dict[str, int]) -> list[str]:
    assert graph.recording is not None
    return [kernel_of(graph.recording, p, lengths_of(graph, counts)).key for p in graph.products]


def test_every_shape_is_timed_once() -> None:
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), *(nn.Conv2d(8, 8, 3, padding=1) for _ in range(3)))
    graph = trace(nn.Sequential(model, nn.Flatten(), nn.Linear(8 * 16, 2)), torch.zeros(1, 8, 4, 4))
    timings = Timings(path=None)
    found = time_products(graph, CPU, timings)
    assert len(found.rows) == 5
    # The first convolution reads the input, 4 shapes; the three after it share 16, of which 4 are those; the
    # linear layer has 4.
    assert len(timings.seconds) == 4 + 16 - 4 + 4


def test_activations_are_what_the_layers_make() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 16, 3), nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 5),
    ).eval()  # fmt: skip
    x = torch.zeros(2, 3, 12, 12)
    graph = trace(model, x)
    for ratio in (0.0, 0.5):
        plan = PruningPlan.random(graph, ratio, 0)
        dense, made = densify(model, graph, plan), 0
        value = x
        for layer in dense:
            value = layer(value)
            is_new = not isinstance(layer, nn.Flatten) and not getattr(layer, "inplace", False)
            made += value.nbytes if is_new else 0
        assert graph.cost(plan).activation_bytes == made


def test_a_graph_with_latency_predicts_plans_and_can_be_allocated(tmp_path: Path, clock: Clock) -> None:
    """Whatever is timed takes a millisecond, but for the whole network, which takes ten."""
    model, x = tiny_net().train(), (torch.zeros(1, 1, 8, 8),)
    clock.tick = 1e-3
    graph = trace(model, x)
    scores = {g.name: np.arange(1.0, g.num_units + 1) for g in graph.groups}
    with pytest.raises(UsageError, match="knows no latency"):
        allocate(graph, scores, metric="latency", limit=1.0, strategy="uniform")
    assert graph.cost().latency_s is None
    table = tmp_path / "t.json"
    model.register_forward_pre_hook(lambda net, _: clock.advance(9e-3 if net.conv1.out_channels == 12 else 0))
    timed = with_latency_model(graph, model, x, CPU, timings=Timings(path=table))
    assert model.training
    assert table.is_file()
    full = timed.cost().of("latency")
    assert full == pytest.approx(10e-3), "as it was measured"
    assert timed.cost().macs == graph.cost().macs
    least = timed.cost_of_counts({g.name: 1 for g in graph.groups}).of("latency")
    assert least < full
    limit = (full + least) / 2
    plan = allocate(timed, scores, metric="latency", limit=limit, strategy="uniform")
    assert limit - 0.01 * full <= timed.cost(plan).of("latency") <= limit


def test_seconds_are_told_on_the_scale_of_a_network_measured_before(clock: Clock) -> None:
    """The network took 1000 s when it was measured first; the machine has become faster since."""
    model, x = clock.slow_(tiny_net(), 2e-3), (torch.zeros(1, 1, 8, 8),)
    before = clock.slow_(tiny_net(), 4e-3)
    graph = trace(model, x)
    clock.tick = 1e-6
    timed = with_latency_model(graph, model, x, CPU, beside=(before, 1000.0), timings=Timings(path=None))
    assert timed.cost().of("latency") == pytest.approx(500, rel=1e-3)


def test_a_share_is_measured_in_turns(clock: Clock) -> None:
    slow, fast = clock.slow_(nn.Flatten(), 0.012), clock.slow_(nn.Flatten(), 0.003)
    assert measure_latency_share(slow, fast, (torch.zeros(1, 4),), CPU) == pytest.approx((0.25, 0.0))
    order: list[int] = []
    clock.tick = 1e-3
    times = time_interleaved([lambda: order.append(0), lambda: order.append(1)], CPU, runs=6, seconds=0.1)
    assert times.shape[1] == 2
    assert order[:6] == [0, 1] * 3
