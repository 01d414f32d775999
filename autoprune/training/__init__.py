"""Rooms are described once all of them stand."""

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
