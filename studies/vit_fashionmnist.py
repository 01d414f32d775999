"""A small vision transformer on Fashion-MNIST, trained here and pruned to 60 % of its MACs.

Set AUTOPRUNE_DATA as for resnet8_fashionmnist. The network is torchvision's `VisionTransformer` with 49
patches, four layers of four heads, and a width of 64.
"""

from __future__ import annotations

from resnet8_fashionmnist import data
from torch import nn
from torchvision.models import VisionTransformer

from autoprune import Baseline, Study


def model() -> VisionTransformer:
    """0.14 million parameters; the patches are cut from one channel, not three."""
    network = VisionTransformer(
        image_size=28, patch_size=4, num_layers=4, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    network.conv_proj = nn.Conv2d(1, 64, kernel_size=4, stride=4)
    return network


study = Study(
    name="vit-fashionmnist",
    model=model,
    data=data,
    target="macs=0.6",
    max_drop=1.0,
    budget="20m",
    baseline=Baseline(epochs=8, lr=0.1, optimizer="muon"),
    round_to=1,
)
