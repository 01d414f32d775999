"""What only a GPU can show; the default run leaves these out (`pytest -m gpu`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoprune.config import Analysis, Protection, Search
from autoprune.pipeline.run import run
from autoprune.plan import PruningPlan
from autoprune.pruning.sensitivity import sensitivity
from autoprune.structure.densify import densify, masked
from autoprune.structure.tracing import trace
from autoprune.training.evaluation import evaluate
from autoprune.training.finetune import finetune_, uses_bf16
from autoprune.training.schedule import Schedule
from tests.tiny import tiny_data, tiny_net, tiny_study

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device on this machine"),
]
CUDA = torch.device("cuda")


def test_a_network_on_the_gpu_is_pruned_where_it_is() -> None:
    model, x = tiny_net().double().to(CUDA).eval(), torch.randn(4, 1, 8, 8, dtype=torch.float64, device=CUDA)
    graph = trace(model, x)
    plan = PruningPlan.random(graph, 0.4, 0)
    dense, zeroed = densify(model, graph, plan), masked(model, graph, plan)
    assert all(p.is_cuda for p in dense.parameters())
    with torch.no_grad():
        assert torch.allclose(dense(x), zeroed(x), rtol=1e-9, atol=1e-9)


def test_both_devices_evaluate_alike() -> None:
    model, split = tiny_net(), tiny_data().search
    there, here = (evaluate(model, split, device=d) for d in (CUDA, "cpu"))
    assert there.loss == pytest.approx(here.loss, rel=1e-3)
    assert not any(p.is_cuda for p in model.parameters()), "the model goes back to where it was"


def test_both_devices_see_the_same_batches() -> None:
    split = tiny_data().train
    pairs = zip(
        split.batches(64, device=CUDA, seed=3, augment=True),
        split.batches(64, seed=3, augment=True),
        strict=True,
    )
    for (x_there, y_there), (x_here, y_here) in pairs:
        assert torch.allclose(x_there.cpu(), x_here, atol=1e-6)
        assert torch.equal(y_there.cpu(), y_here)


def test_training_on_the_gpu_learns() -> None:
    model, data = tiny_net(), tiny_data()
    before = evaluate(model, data.search, device=CUDA).top1
    settings = tiny_study().finetune
    finetune_(
        model, data.train, schedule=Schedule(lr=0.05, decay="cosine"), settings=settings, epochs=6, seed=0,
        device=CUDA, teacher=tiny_net(),
    )  # fmt: skip
    assert evaluate(model, data.search, device=CUDA).top1 > before + 0.2
    assert uses_bf16(CUDA) == torch.cuda.is_bf16_supported(including_emulation=False)


def test_sensitivity_on_the_gpu_is_that_of_the_cpu() -> None:
    model, data = tiny_net(), tiny_data()
    graph = trace(model, torch.zeros(1, 1, 8, 8))
    there, here = (
        sensitivity(
            model, graph, data.search, settings=Analysis(ratios=(0.3, 0.6)), calibration=data.train, device=d
        )
        for d in (CUDA, torch.device("cpu"))
    )
    for a, b in zip(there.points, here.points, strict=True):
        assert (a.group, a.ratio) == (b.group, b.ratio)
        assert a.drop_pp == pytest.approx(b.drop_pp, abs=2.0)


def test_a_whole_run_on_the_gpu(tmp_path: Path) -> None:
    study = tiny_study(device="cuda", search=Search(trials=2, epochs=2))
    result = run(study, out=tmp_path / "run", protection=Protection(plain=True))
    assert result.reached
    assert result.after.macs <= result.before.macs / 2
    assert result.after.latency_ms is not None
