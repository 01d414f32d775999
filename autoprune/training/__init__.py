"""Training and measuring one network: fine-tuning, and evaluation without training.

A *schedule* is the course of the learning rate over a fine-tuning. The *teacher* is the original network,
whose logits are distilled into a pruned network. Batch-norm statistics are *recalibrated*: they are
estimated anew after pruning and after fine-tuning, because the running statistics lag behind the weights.

Modules, in reading order:

- `evaluation`: measures the score and loss of a network on a split; recalibrates batch norms.
- `schedule`: defines the learning rate over a fine-tuning.
- `optimizer`: steps the weights inside a network by Muon, and the rest by SGD.
- `divergence`: judges whether a training has diverged, by its losses and weights.
- `finetune`: holds the training loop of every trial, and of a baseline.
- `distributed`: lets several processes run one trial together.
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
