from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from autoprune.config import Finetune
from autoprune.errors import UsageError
from autoprune.training.optimizer import RELATIVE, Stepper, inner_weights

MUON, SGD = Finetune(optimizer="muon"), Finetune(optimizer="sgd")
LR = 0.02


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 12, 3, bias=False),
        nn.BatchNorm2d(12),
        nn.Flatten(),
        nn.Linear(12 * 4 * 4, 6),
        nn.Linear(6, 4),
    )


def step_(model: nn.Module, stepper: Stepper, x: torch.Tensor) -> None:
    stepper.sgd.param_groups[0]["lr"] = LR
    stepper.zero_grad()
    torch.nn.functional.cross_entropy(model(x), torch.arange(len(x)) % 2).backward()
    stepper.step()


def pictures() -> torch.Tensor:
    return torch.randn(16, 3, 10, 10, generator=torch.Generator().manual_seed(1))


def names_of(model: nn.Module) -> list[str]:
    inner = {id(w) for w in inner_weights(model)}
    return [name for name, p in model.named_parameters() if id(p) in inner]


def test_muon_has_the_weights_inside_and_sgd_all_others() -> None:
    model = net()
    assert names_of(model) == ["2.weight", "5.weight"]
    stepper = Stepper(model, MUON)
    by_sgd = {id(p) for g in stepper.sgd.param_groups for p in g["params"]}
    inner = {id(w) for w in inner_weights(model)}
    assert not by_sgd & inner
    assert by_sgd | inner == {id(p) for p in model.parameters()}
    assert Stepper(model, SGD).muon is None


@pytest.mark.parametrize(
    "model",
    [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)), nn.BatchNorm1d(3)],
    ids=["one layer", "first and last", "no layer"],
)
def test_a_network_without_inner_layers_is_trained_by_sgd(model: nn.Module) -> None:
    stepper = Stepper(model, MUON)
    assert stepper.muon is None
    step_(model, stepper, torch.randn(4, 3))


def test_shared_frozen_parametrised_and_transposed_weights_are_left_alone() -> None:
    model = net()
    shared = nn.Linear(6, 6)
    model.add_module("a", shared)
    model.add_module("b", nn.Sequential(shared, parametrizations.weight_norm(nn.Linear(6, 6))))
    model.add_module("c", nn.ConvTranspose1d(6, 6, 1))
    model.add_module("last", nn.Linear(6, 6))
    model[5].weight.requires_grad_(False)
    assert names_of(model) == ["2.weight", "6.weight", "a.weight"]


def test_the_projections_of_attention_are_inner_weights() -> None:
    layers = [nn.Linear(4, 8), nn.MultiheadAttention(8, 2), nn.MultiheadAttention(8, 2, kdim=6, vdim=4)]
    model = nn.Sequential(*layers, nn.Linear(8, 2))
    projections = [f"2.{name}_proj_weight" for name in "qkv"]
    assert names_of(model) == ["1.in_proj_weight", "1.out_proj.weight", *projections, "2.out_proj.weight"]


def test_a_step_moves_each_inner_weight_by_a_share_of_its_norm() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(50)
    before = copy.deepcopy(model)
    step_(model, Stepper(model, MUON), pictures())
    for index in (2, 5):
        old, new = before[index].weight, model[index].weight
        moved = float((new - old).detach().norm() / old.detach().norm())
        assert 0.6 * RELATIVE * LR < moved < 1.3 * RELATIVE * LR  # its iteration ends near 1, not at it
    pairs = zip(before.parameters(), model.parameters(), strict=True)
    assert all(not torch.equal(old, new) for old, new in pairs if old.ndim > 1)


def test_the_directions_of_a_step_are_equally_long() -> None:
    model = net()
    before = model[5].weight.detach().clone()
    step_(model, Stepper(model, MUON), pictures())
    lengths = torch.linalg.svdvals(model[5].weight.detach() - before)
    assert model[5].weight.grad is not None
    gradient = torch.linalg.svdvals(model[5].weight.grad)
    assert 4 * float(lengths.max() / lengths.min()) < float(gradient.max() / gradient.min())


def test_the_layout_in_memory_does_not_matter() -> None:
    before, steps = net(), list[torch.Tensor]()
    for model in (net(), net().to(memory_format=torch.channels_last)):
        step_(model, Stepper(model, MUON), pictures())
        steps.append((model[2].weight - before[2].weight).detach().flatten())
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.cosine_similarity(steps[0], steps[1], dim=0) > 0.99  # it computes in bfloat16


def test_a_layout_that_changes_on_the_way_is_followed() -> None:
    model = net()
    stepper = Stepper(model, MUON)
    model[2].weight.data = model[2].weight.data.contiguous(memory_format=torch.channels_last)
    before = model[2].weight.detach().clone()
    step_(model, stepper, pictures())
    assert not torch.equal(before, model[2].weight)


def test_only_weights_decay() -> None:
    groups = Stepper(net(), Finetune(optimizer="sgd", weight_decay=1e-3)).sgd.param_groups
    assert [g["weight_decay"] for g in groups] == [1e-3, 0.0]
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert all(p.ndim == 1 for p in groups[1]["params"])


def test_nothing_to_train_is_told() -> None:
    with pytest.raises(UsageError, match="no parameter of the model requires a gradient"):
        Stepper(net().requires_grad_(False), MUON)
