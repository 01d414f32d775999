"""The networks of bench_oneshot.py: a published ResNet-20, and small ones of other kinds, trained here.

`vgg` is a plain chain of convolutions (Simonyan & Zisserman 2015, at a sixteenth of the width); `mobile` has
inverted residuals, depthwise convolutions and squeeze-excite (Howard et al. 2019, MobileNetV3), made small
for images of 28 x 28. They are trained on Fashion-MNIST once, in minutes, and kept beside the data.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.config import Baseline
from autoprune.data.sources import Data, load_data
from autoprune.data.splits import IMAGENET
from autoprune.training.finetune import train_baseline_

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "studies"))
from models import PadShortcut, resnet8, resnet20  # a study's file, not a package

NETWORKS = ("resnet20", "vgg", "mobile", "resnet8", "digits")
EPOCHS = {"vgg": 5, "mobile": 6, "resnet8": 8, "digits": 30}


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A trained network and its data."""

    name: str
    model: nn.Module
    data: Data
    title: str

    @property
    def example(self) -> Tensor:
        """One input."""
        return torch.zeros(1, *self.data.input_shape)


def load(name: str, folder: Path, cache: Path) -> Case:
    """One of `NETWORKS`; those without published weights are trained at the first use."""
    if name == "resnet20":
        data = load_data(f"cifar10:{folder / 'cifar10'}", search_from="test", normalization=IMAGENET)
        model = resnet20(folder / "weights" / "resnet20-12fca82f.th")
        return Case(name=name, model=model, data=data, title="ResNet-20 / CIFAR-10")
    if name == "digits":
        data, title = load_data("digits", search_from="train"), "ResNet-8 / digits"
    else:
        data = load_data(f"fashionmnist:{folder}", search_from="train")
        title = {"vgg": "VGG-like", "mobile": "MobileNetV3-like", "resnet8": "ResNet-8"}[name]
        title = f"{title} / Fashion-MNIST"
    torch.manual_seed(0)
    model = {"vgg": vgg, "mobile": mobile, "resnet8": resnet8, "digits": resnet8}[name]()
    kept = cache / f"oneshot-{name}.pt"
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        baseline = Baseline(epochs=EPOCHS[name])
        train_baseline_(model, data.train, baseline, seed=0, device=torch.device("cpu"))
        cache.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), kept)
    return Case(name=name, model=model.eval(), data=data, title=title)


def vgg(widths: tuple[int, ...] = (16, 16, 32, 32, 64, 64)) -> nn.Sequential:
    """Three stages of two 3x3 convolutions with batch norm, then one linear layer."""
    layers: list[nn.Module] = []
    for index, (in_width, width) in enumerate(zip((1, *widths), widths, strict=False)):
        conv = nn.Conv2d(in_width, width, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
        if index % 2:
            layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))


class SqueezeExcite(nn.Module):
    """Channels weighted by what the whole picture holds (Hu et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(width, max(8, width // 4), 1)
        self.excite = nn.Conv2d(max(8, width // 4), width, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Scale each channel by a number in (0, 1)."""
        pooled = F.adaptive_avg_pool2d(x_BCHW, 1)
        return x_BCHW * torch.sigmoid(self.excite(F.relu(self.squeeze(pooled))))


class InvertedResidual(nn.Module):
    """Widen, filter each channel by itself, weight, narrow; around a shortcut where shapes allow."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        wide = 4 * in_width
        self.widen = nn.Sequential(nn.Conv2d(in_width, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.ReLU())
        depthwise = nn.Conv2d(wide, wide, 3, stride=stride, padding=1, groups=wide, bias=False)
        self.filter = nn.Sequential(depthwise, nn.BatchNorm2d(wide), nn.ReLU(), SqueezeExcite(wide))
        self.narrow = nn.Sequential(nn.Conv2d(wide, width, 1, bias=False), nn.BatchNorm2d(width))
        self.has_shortcut = stride == 1 and in_width == width

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images to images."""
        out = self.narrow(self.filter(self.widen(x_BCHW)))
        return x_BCHW + out if self.has_shortcut else out


def mobile() -> nn.Sequential:
    """Seven inverted residuals behind a stem that halves the picture."""
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    shapes = [(16, 16, 1), (16, 24, 2), (24, 24, 1), (24, 24, 1), (24, 40, 2), (40, 40, 1), (40, 40, 1)]
    head = nn.Sequential(nn.Conv2d(40, 96, 1, bias=False), nn.BatchNorm2d(96), nn.ReLU())
    blocks = (InvertedResidual(*shape) for shape in shapes)
    return nn.Sequential(stem, *blocks, head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


class FixedShortcut(nn.Conv2d):
    """An option-A shortcut as a 1x1 convolution that picks: the same values, prunable by Torch-Pruning."""

    def __init__(self, pad: PadShortcut, in_width: int) -> None:
        super().__init__(in_width, in_width + pad.before + pad.after, 1, stride=pad.stride, bias=False)
        self.requires_grad_(False)
        self.weight.zero_()
        self.weight[pad.before : pad.before + in_width, :, 0, 0] = torch.eye(in_width)


def with_fixed_shortcuts_(model: nn.Module) -> None:
    """Replace every `PadShortcut`."""
    for block in model.modules():
        shortcut = getattr(block, "shortcut", None)
        if isinstance(shortcut, nn.Sequential) and len(shortcut) and isinstance(shortcut[0], PadShortcut):
            shortcut[0] = FixedShortcut(shortcut[0], block.conv1.in_channels)
