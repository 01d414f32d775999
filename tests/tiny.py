"""A network and data small enough to train in a second: which quadrant of a noisy 8 x 8 image is bright."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.config import Analysis, Baseline, Control, Finetune, Search, Study
from autoprune.data.sources import Data
from autoprune.data.splits import Normalization, Split, TensorSplit
from autoprune.training.finetune import train_baseline_

NORMALIZATION = Normalization(mean=(0.5,), std=(0.25,))


class TinyNet(nn.Module):
    """Two convolutions with batch norm, the second in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 12, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 16, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(16)
        self.conv3 = nn.Conv2d(16, 12, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(12)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.linear = nn.Linear(12 * 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(x + self.bn3(self.conv3(torch.relu(self.bn2(self.conv2(x))))))
        return self.linear(self.pool(x).flatten(1))


def tiny_net() -> TinyNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TinyNet()


def trained_net() -> TinyNet:
    """The tiny network after six epochs, the same in every process."""
    model = tiny_net()
    train_baseline_(model, tiny_data().train, Baseline(epochs=6, batch_size=64), seed=0)
    return model


def tiny_split(count: int, seed: int) -> TensorSplit:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 4
    images = torch.randint(0, 160, (count, 1, 8, 8), generator=generator)
    for index, label in enumerate(labels.tolist()):
        row, column = 4 * (label // 2), 4 * (label % 2)
        images[index, 0, row : row + 4, column : column + 4] += 30
    return TensorSplit(images.to(torch.uint8), labels, normalization=NORMALIZATION)


def tiny_data() -> Data:
    return Data(
        train=tiny_split(384, 1), search=tiny_split(200, 2), test=tiny_split(200, 3), num_classes=4,
        class_names=("a", "b", "c", "d"), input_shape=(1, 8, 8), normalization=NORMALIZATION,
    )  # fmt: skip


class Scripted:
    """A study's loss and score by numbers alone, for what must not hang on an arithmetic or a lucky sample.

    Args:
        score: (share of the parameters that are left, steps of the last training) -> score.
    """

    def __init__(self, score: Callable[[float, int], float]) -> None:
        self._score, self._steps, self._is_over = score, 0, True
        self._whole = sum(p.numel() for p in tiny_net().parameters())

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        if output.requires_grad:
            self._steps, self._is_over = 1 if self._is_over else self._steps + 1, False
        return nn.functional.cross_entropy(output, target)

    def score(self, model: nn.Module, split: Split, device: str) -> float:
        self._is_over = True
        return self._score(sum(p.numel() for p in model.parameters()) / self._whole, self._steps)


def tiny_study(**changes: Any) -> Study:
    """Floors lie far below what the trials reach: 8 points are 16 of the 200 samples."""
    settings: dict[str, Any] = {
        "name": "tiny", "model": tiny_net, "data": tiny_data, "target": "macs=0.5", "max_drop": 8.0,
        "budget": "epochs=40", "baseline": Baseline(epochs=6, lr=0.1, batch_size=64),
        "finetune": Finetune(batch_size=64, recalibrate_batches=4), "analysis": Analysis(ratios=(0.5,)),
        "search": Search(trials=2, epochs=2), "device": "cpu", "control": Control(first_ceiling=0.35),
    }  # fmt: skip
    return Study(**(settings | changes))
