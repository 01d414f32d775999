"""Rooms are described once all of them stand."""

from autoprune.training.evaluation import (
    EVAL_BATCH,
    Loss,
    Score,
    borrowed,
    classification_loss,
    evaluate,
    logits_of,
    recalibrate_,
    resolve_device,
)
from autoprune.training.finetune import EpochRecord, finetune_, train_baseline_, uses_bf16
from autoprune.training.schedule import Schedule

finetune = finetune_  # the public name

__all__ = [
    "EVAL_BATCH",
    "EpochRecord",
    "Loss",
    "Schedule",
    "Score",
    "borrowed",
    "classification_loss",
    "evaluate",
    "finetune",
    "finetune_",
    "logits_of",
    "recalibrate_",
    "resolve_device",
    "train_baseline_",
    "uses_bf16",
]
