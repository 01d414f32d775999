from __future__ import annotations

import torch

from autoprune.pipeline.measurement import measure_latency, summarise, widths, with_latency
from autoprune.structure.tracing import trace
from autoprune.training.evaluation import evaluate
from tests.tiny import tiny_data, tiny_net


def test_latency_is_positive_and_the_bigger_network_is_slower() -> None:
    slow = torch.nn.Sequential(*(torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(12)))
    fast = torch.nn.Conv2d(16, 16, 3, padding=1)
    slow.train()
    first, second = measure_latency(slow, fast, (torch.zeros(1, 16, 32, 32),), torch.device("cpu"))
    assert first.median_ms > second.median_ms > 0
    assert first.spread_ms >= 0
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
