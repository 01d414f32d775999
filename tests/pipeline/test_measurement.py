from __future__ import annotations

import pytest
import torch

from autoprune.pipeline.measurement import measure_latency, summarise, widths, with_latency
from autoprune.structure.tracing import trace
from autoprune.training.evaluation import evaluate
from tests.clock import Clock
from tests.tiny import tiny_data, tiny_net


def test_latency_is_the_median_of_runs_in_turns(clock: Clock) -> None:
    slow, fast = clock.slow_(torch.nn.Flatten(), 0.012), clock.slow_(torch.nn.Flatten(), 0.003)
    seen: list[str] = []
    slow.register_forward_pre_hook(lambda *_: seen.append("slow"))
    fast.register_forward_pre_hook(lambda *_: clock.advance(1.0 if seen.count("fast") % 5 == 4 else 0.0))
    fast.register_forward_pre_hook(lambda *_: seen.append("fast"))
    slow.train()
    first, second = measure_latency(slow, fast, (torch.zeros(1, 4),), torch.device("cpu"))
    assert first.median_ms == pytest.approx(12)
    assert second.median_ms == pytest.approx(3), "every fifth run is disturbed, and does not count"
    assert (first.spread_ms, second.spread_ms) == pytest.approx((0, 0), abs=1e-6)
    assert len(seen) >= 2 * 15
    assert {frozenset(pair) for pair in zip(seen[::2], seen[1::2], strict=True)} == {frozenset(seen)}
    assert slow.training


def test_a_summary_holds_what_was_measured() -> None:
    model = tiny_net()
    found = evaluate(model, tiny_data().test)
    cost = trace(model, torch.zeros(1, 1, 8, 8)).cost()
    summary = summarise(model, cost, found, 0.5)
    assert (summary.macs, summary.params, summary.num_samples) == (cost.macs, cost.params, 200)
    assert summary.low <= summary.top1 <= summary.high
    assert summary.latency_ms is None
    first, _ = measure_latency(model, model, (torch.zeros(1, 1, 8, 8),), torch.device("cpu"))
    assert with_latency(summary, first).latency_ms == first.median_ms


def test_widths_name_the_layers_that_make_channels() -> None:
    assert widths(tiny_net()) == {"conv1": 12, "conv2": 16, "conv3": 12, "linear": 4}
