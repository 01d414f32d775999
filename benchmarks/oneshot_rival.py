"""Torch-Pruning's side of bench_oneshot.py: one network, one variant, as many multiply-adds as asked for.

A variant is a scope (one threshold for all layers, or one ratio in each) and an importance. The tool takes
a ratio and no cost, so the ratio is bisected until the network costs what it may; it never removes more
than the other side did. The tool is used as in its examples: the classifier's outputs are left alone, and
the importances that need gradients get them from training images.

Two things are done in its favour. The option-A shortcuts of a ResNet-20 break it (it pads to a fixed number
of channels), so it gets them as convolutions that pick, whose multiply-adds do not count, and once more
with only the channels inside the blocks to prune. And its `GroupHessianImportance.accumulate_grad` keeps
the last sample alone (it looks up by name what it keeps by parameter), so the mean over all samples is
filled in here.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from oneshot_models import FixedShortcut, with_fixed_shortcuts_
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from autoprune.data.splits import Split

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch_pruning as tp

IMPORTANCES: dict[str, Callable[[], object]] = {
    "L2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
    "L1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
    "Taylor": tp.importance.GroupTaylorImportance,
    "Hessian": tp.importance.GroupHessianImportance,
}
TAYLOR_IMAGES, TAYLOR_BATCH = 1024, 64  # as many as autoprune's own criterion looks at
HESSIAN_IMAGES = 256  # one backward pass each
BISECTIONS = 12


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way to use the tool; `inside` leaves the channels alone that shortcuts join."""

    scope: str
    importance: str
    inside: bool = False

    def __str__(self) -> str:
        return f"{self.scope} {self.importance}{' inside blocks' if self.inside else ''}"


def variants(model: nn.Module) -> list[Variant]:
    """All of them; `inside` where there is something to leave alone."""
    kinds = (False, True) if _joined(model) else (False,)
    return [
        Variant(scope=s, importance=i, inside=k)
        for s, i, k in product(("global", "local"), IMPORTANCES, kinds)
    ]


def prunable(model: nn.Module) -> nn.Module:
    """A copy that the tool can prune."""
    mine = copy.deepcopy(model)
    with_fixed_shortcuts_(mine)
    return mine


def _joined(model: nn.Module) -> list[nn.Module]:
    """The convolutions before a padding shortcut's sum, if there are any."""
    blocks = [m for m in model.modules() if hasattr(m, "shortcut") and hasattr(m, "conv2")]
    has_pads = any(isinstance(m, FixedShortcut) or type(m).__name__ == "PadShortcut" for m in model.modules())
    return [model.conv1, *(b.conv2 for b in blocks), *_fixed(model)] if has_pads else []


def _fixed(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, FixedShortcut)]


def fill_gradients_(model: nn.Module, variant: Variant, train: Split, seed: int) -> None:
    """What the importance wants to find in `.grad`: nothing, the mean gradient, or the mean of its square."""
    model.zero_grad(set_to_none=True)
    if variant.importance not in ("Taylor", "Hessian"):
        return
    is_taylor = variant.importance == "Taylor"
    size, num = (TAYLOR_BATCH, TAYLOR_IMAGES // TAYLOR_BATCH) if is_taylor else (1, HESSIAN_IMAGES)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    sums = [torch.zeros_like(p) for p in model.parameters()]
    model.eval()
    for _, (inputs, targets) in zip(range(num), train.batches(size, seed=seed), strict=False):
        loss = F.cross_entropy(model(inputs), targets)
        found = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        for total, gradient in zip(sums, found, strict=True):
            total += (gradient if is_taylor else gradient.square()) / num
    for parameter, total in zip(model.parameters(), sums, strict=True):
        parameter.grad = total


def prune(model: nn.Module, example: Tensor, variant: Variant, limit: float) -> tuple[nn.Module, float]:
    """The smallest network that costs at least `limit`, and its multiply-adds."""
    low, high, best = 0.0, 0.99, (model, macs(model, example))
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        made = _pruned(model, example, variant, middle)
        cost = macs(made, example) if made is not None else 0.0
        if made is not None and cost >= limit:
            low, best = middle, ((made, cost) if cost < best[1] else best)
        else:
            high = middle
    return best


def _pruned(model: nn.Module, example: Tensor, variant: Variant, ratio: float) -> nn.Module | None:
    """One step of the tool; None where the network that it leaves does not run."""
    mine = copy.deepcopy(model)
    for before, after in zip(model.parameters(), mine.parameters(), strict=True):
        after.grad = None if before.grad is None else before.grad.clone()
    last = [m for m in mine.modules() if isinstance(m, nn.Linear)][-1]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tp.pruner.BasePruner(
                mine, example, importance=IMPORTANCES[variant.importance](), pruning_ratio=ratio,
                global_pruning=variant.scope == "global",
                ignored_layers=[last, *(_joined(mine) if variant.inside else [])],
            ).step()  # fmt: skip
        with torch.no_grad():
            mine.eval()(example)
    except (RuntimeError, ValueError, IndexError):
        return None
    mine.zero_grad(set_to_none=True)
    return mine


def macs(model: nn.Module, example: Tensor) -> float:
    """Multiply-adds of one pass, but for the shortcuts that only pick."""
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(example)
    for parameter in trained:
        parameter.requires_grad_(True)
    return counter.get_total_flops() / 2 - sum(_picked(model, example))


def _picked(model: nn.Module, example: Tensor) -> Iterator[float]:
    sizes: list[float] = []
    hooks = [
        m.register_forward_hook(lambda m, _, y: sizes.append(float(y.numel() * m.in_channels)))
        for m in _fixed(model)
    ]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    yield from sizes
