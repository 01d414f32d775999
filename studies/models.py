"""The small residual networks of the built-in studies.

`resnet20` and `resnet56` are the CIFAR networks of He et al. 2016 (section 4.2): a 3x3 stem, three stages
of 16, 32 and 64 channels, and shortcuts without parameters ("option A": every second pixel, new channels
padded with zeros). Module names follow the checkpoints that circulate for them (`conv1`, `bn1`,
`layer1.0.conv1`, ..., `linear`). `resnet8` is their little sister with one block a stage and projection
shortcuts ("option B"), for images of one channel.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.data.weights import load_weights_

WIDTHS = (16, 32, 64)


class PadShortcut(nn.Module):
    """Option A: every `stride`-th pixel, then `before` and `after` channels of zeros around the others."""

    def __init__(self, stride: int, before: int, after: int) -> None:
        super().__init__()
        self.stride, self.before, self.after = stride, before, after

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Shrink the picture, widen the channels."""
        picked = x_BCHW[:, :, :: self.stride, :: self.stride]
        return F.pad(picked, (0, 0, 0, 0, self.before, self.after))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut."""

    def __init__(self, in_width: int, width: int, stride: int, *, projection: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_width, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if (stride != 1 or in_width != width) and projection:
            conv = nn.Conv2d(in_width, width, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))
        elif stride != 1 or in_width != width:
            extra = width - in_width
            self.shortcut = nn.Sequential(PadShortcut(stride, extra // 2, extra - extra // 2))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Add the shortcut to what two convolutions make of the input."""
        out = F.relu(self.bn1(self.conv1(x_BCHW)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x_BCHW))


class ResNet(nn.Module):
    """Three stages of `num_blocks` blocks, each stage at half the resolution of the one before."""

    def __init__(
        self, num_blocks: int, *, in_channels: int = 3, num_classes: int = 10, projection: bool = False
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(WIDTHS[0])
        stages = []
        for stage, (in_width, width) in enumerate(zip((WIDTHS[0], *WIDTHS), WIDTHS, strict=False)):
            first = BasicBlock(in_width, width, 1 if stage == 0 else 2, projection=projection)
            rest = [BasicBlock(width, width, 1, projection=projection) for _ in range(num_blocks - 1)]
            stages.append(nn.Sequential(first, *rest))
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(WIDTHS[-1], num_classes)
        self.apply(_init_)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Images to logits (B, num_classes)."""
        out = F.relu(self.bn1(self.conv1(x_BCHW)))
        out = self.layer3(self.layer2(self.layer1(out)))
        return self.linear(F.adaptive_avg_pool2d(out, 1).flatten(1))


def _init_(module: nn.Module) -> None:
    """He et al. 2015: keep the variance of the activations through rectifiers."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        nn.init.kaiming_normal_(module.weight)


def resnet8() -> ResNet:
    """78 thousand parameters, images of one channel, 3 million multiply-adds at 16 x 16."""
    return ResNet(1, in_channels=1, projection=True)


def resnet20(weights: Path | None = None) -> ResNet:
    """0.27 million parameters, 41 million multiply-adds at 32 x 32."""
    return _loaded(ResNet(3), weights)


def resnet56(weights: Path | None = None) -> ResNet:
    """0.85 million parameters, 126 million multiply-adds at 32 x 32."""
    return _loaded(ResNet(9), weights)


def _loaded(model: ResNet, weights: Path | None) -> ResNet:
    if weights is not None:
        load_weights_(model, weights)
    return model.eval()
