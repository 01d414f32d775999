"""Your own fine-tuned ViT-B/16 on a folder of photographs, pruned to 70 % of its MACs.

Set AUTOPRUNE_PHOTOS and AUTOPRUNE_WEIGHTS as for mobilenetv2_photos; the weights are a state dict of
torchvision's `vit_b_16` with as many classes.

What to expect: whole attention heads, the hidden layers of the MLPs and the trunk's width can shrink
(`autoprune groups studies/vit_photos.py` lists them). The learning rates searched are lower than for
convolutional networks, and the target is milder; both are guesses. A run has not been measured, neither its
time nor its top-1; `autoprune doctor studies/vit_photos.py` says what an epoch takes on your machine.
"""

from __future__ import annotations

import os

from mobilenetv2_photos import data
from torch import nn
from torchvision.models import vit_b_16

from autoprune import Finetune, Search, Study, load_weights_


def model() -> nn.Module:
    """With your weights; without them the run refuses to prune what is no better than guessing."""
    network = vit_b_16(num_classes=data().num_classes)
    if weights := os.environ.get("AUTOPRUNE_WEIGHTS"):
        load_weights_(network, weights)
    return network


study = Study(
    name="vit-photos",
    model=model,
    data=data,
    target="macs=0.7",
    max_drop=1.0,
    budget="8h",
    finetune=Finetune(batch_size=32, weight_decay=1e-4, distill=0.5),
    search=Search(lr=(1e-5, 1e-2)),
)
