"""The optimisers of a fine-tuning: Muon for the weights inside a network, SGD for everything else.

Muon (Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks") turns the momentum of a
weight matrix into the nearest matrix with orthonormal rows or columns, so that all directions of the weight
move equally far in a step. With Muon pruned networks recovered as much or more in the same samples
(measured: docs/log.md). The optimiser is `torch.optim.Muon`, on views of the convolutions' weights.

The step is relative: at a learning rate of `lr` a weight moves by `RELATIVE * lr` of its own norm, so that
the rate means the same for every layer and network, and one rate drives both optimisers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.config import Finetune
from autoprune.errors import UsageError
from autoprune.torch_private import ConvBase

RELATIVE = 0.25  # of the learning rate, as a share of the weight's norm; measured: docs/log.md
MATCHED_RMS = 0.2  # of an update by torch's Muon at a rate of 1, with `match_rms_adamw`
NORMS_EVERY = 16  # steps between readings of the weights' norms: each reading makes a GPU wait
WIDEST = 4096  # orthogonalising grows with the third power of a matrix's shorter side; the bound is a guess


class Stepper:
    """The optimisers of one training.

    Attributes:
        sgd: the optimiser of all parameters that Muon does not have; its first group's rate is the
            schedule's.
        muon: the optimiser of the weights inside the network; None where there are none.

    Raises:
        UsageError: no parameter of the model requires a gradient.
    """

    def __init__(self, model: nn.Module, settings: Finetune) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        if not trained:
            raise UsageError(
                "no parameter of the model requires a gradient", "call model.requires_grad_() first"
            )
        self._weights = list(inner_weights(model)) if settings.optimizer == "muon" else []
        inner = {id(w) for w in self._weights}
        rest = [p for p in trained if id(p) not in inner]
        self.sgd = _sgd(rest, settings)
        self._matrices = [nn.Parameter(_rows(w.detach(), w)) for w in self._weights]
        self.muon = _muon(self._matrices, settings.momentum) if self._matrices else None
        self._norms: list[float] = []
        self._steps = 0

    def zero_grad(self) -> None:
        """Set all gradients to None."""
        self.sgd.zero_grad(set_to_none=True)
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            weight.grad = matrix.grad = None

    def step(self) -> None:
        """Make one step of both optimisers, at the rate that the scheduler gave to SGD."""
        if self.muon is not None:
            self._step_muon(self.muon)
        self.sgd.step()

    def _step_muon(self, muon: torch.optim.Optimizer) -> None:
        rate = RELATIVE * float(self.sgd.param_groups[0]["lr"]) / MATCHED_RMS
        for weight, matrix in zip(self._weights, self._matrices, strict=True):
            matrix.data = _rows(weight.data, weight)
            matrix.grad = None if weight.grad is None else _rows(weight.grad, weight)
        if self._steps % NORMS_EVERY == 0:
            norms = torch.stack([m.detach().square().mean().sqrt() for m in self._matrices])
            self._norms = norms.tolist()
        for group, norm in zip(muon.param_groups, self._norms, strict=True):
            group["lr"] = rate * norm
        muon.step()
        self._steps += 1


def inner_weights(model: nn.Module) -> Iterator[nn.Parameter]:
    """Give the weights for Muon: of linear layers, attention's projections, and ungrouped convolutions.

    The first layer reads pixels and the last layer makes the outputs: for these a step by the gradient's
    size serves better (Jordan et al. 2024). Parametrised and very wide weights are left to SGD.
    """
    layers = [m for m in model.modules() if isinstance(m, nn.Linear | ConvBase | nn.MultiheadAttention)]
    excluded_ids = {id(w) for m in (*layers[:1], *layers[-1:]) for w in _weights_of(m)}
    for weight in (w for layer in layers[1:-1] for w in _weights_of(layer)):
        if isinstance(weight, nn.Parameter) and weight.requires_grad and id(weight) not in excluded_ids:
            excluded_ids.add(id(weight))
            if min(len(weight), weight[0].numel()) <= WIDEST and _is_in_rows(weight):
                yield weight


def _weights_of(layer: nn.Module) -> list[Any]:
    """Return the weights of a layer that mix channels, without those of its children."""
    if isinstance(layer, nn.MultiheadAttention):
        names = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
        return [getattr(layer, name) for name in names]
    mixes = getattr(layer, "groups", 1) == 1 and not getattr(layer, "transposed", False)
    return [layer.weight] if mixes else []


def _is_in_rows(weight: Tensor) -> bool:
    """Return whether the memory layout of a weight lets `_rows` copy nothing."""
    return _rows(weight.detach(), weight).data_ptr() == weight.data_ptr()


def _rows(tensor: Tensor, weight: Tensor) -> Tensor:
    """Return a tensor as a matrix, in the memory order of the weight; the weight is never copied."""
    if weight.is_contiguous():
        return tensor.reshape(len(tensor), -1)
    return tensor.movedim(1, -1).reshape(len(tensor), -1)


def _sgd(parameters: list[nn.Parameter], settings: Finetune) -> torch.optim.SGD:
    """Return an SGD under which weights of more than one dimension decay, and norms and biases do not."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    momentum = settings.momentum
    return torch.optim.SGD(
        [g for g in groups if g["params"]], lr=0.1, momentum=momentum, nesterov=momentum > 0
    )


def _muon(matrices: list[nn.Parameter], momentum: float) -> torch.optim.Optimizer:
    """Return a Muon with one group for each matrix, since each matrix has a rate of its own."""
    return torch.optim.Muon(
        [{"params": [m]} for m in matrices], momentum=momentum, weight_decay=0.0,
        adjust_lr_fn="match_rms_adamw",
    )  # fmt: skip
