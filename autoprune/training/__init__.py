"""Training and measuring one network: fine-tuning, and evaluation without training.

A *schedule* is how the learning rate moves over a fine-tuning. The *teacher* is the original network, whose
logits a pruned network is distilled from. Batch-norm statistics are *recalibrated*: estimated anew after
pruning and after fine-tuning, because the running ones lag behind the weights.

Modules, in reading order:

- `evaluation`: score and loss of a network on a split; recalibration of batch norms.
- `schedule`: the learning rate over a fine-tuning.
- `optimizer`: Muon for the weights inside a network, SGD for the rest.
- `divergence`: whether a training has diverged, by its losses and weights.
- `finetune`: the training loop of every trial, and of a baseline.
- `distributed`: several processes that run one trial together.
"""

from autoprune.training.evaluation import (
    EVAL_BATCH,
    evaluate,
    model_mode,
    recalibrate_,
    resolve_device,
)
from autoprune.training.finetune import EpochRecord, finetune_, train_baseline_, uses_bf16
from autoprune.training.schedule import Schedule

finetune = finetune_  # the public name

__all__ = [
    "EVAL_BATCH",
    "EpochRecord",
    "Schedule",
    "evaluate",
    "finetune",
    "finetune_",
    "model_mode",
    "recalibrate_",
    "resolve_device",
    "train_baseline_",
    "uses_bf16",
]
