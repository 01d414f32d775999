"""How fast this machine works on a study: half a minute of its own training and evaluation, thrown away."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

from autoprune.config import Study
from autoprune.data import Split
from autoprune.pipeline.preflight import Understood, understand
from autoprune.search import seconds_of_training
from autoprune.tasks import task_of
from autoprune.training import evaluate, resolve_device

FEW_BATCHES = 2
PART = 0.4  # of the seconds, for training and for evaluating each


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Images in a second, and what follows for a run.

    Attributes:
        epoch_s: of fine-tuning, on the share of the data that trials see.
        evaluation_s: of the search split.
    """

    network: str
    device: str
    train_images_per_s: float
    evaluate_images_per_s: float
    epoch_s: float
    evaluation_s: float


def throughput(study: Study, seconds: float = 30.0) -> Throughput:
    """Measure a study's own training and evaluation for about `seconds`; the network is left as it was.

    Raises:
        UsageError: the study cannot be used here.
    """
    known, device = understand(study), resolve_device(study.device)
    trained = known.data.train.subset(study.finetune.share, seed=0)
    images = _train_speed(study, known, trained, PART * seconds)
    seen = _evaluation_speed(study, known, PART * seconds)
    return Throughput(
        network=type(known.model).__qualname__, device=str(device), train_images_per_s=images,
        evaluate_images_per_s=seen, epoch_s=len(trained) / images,
        evaluation_s=len(known.data.search) / seen,
    )  # fmt: skip


def _train_speed(study: Study, known: Understood, split: Split, seconds: float) -> float:
    model, batch, device = copy.deepcopy(known.model), study.finetune.batch_size, resolve_device(study.device)
    total = split.num_batches(batch)

    def timed(count: int) -> float:
        epochs, train, teacher = count / total, known.data.train, known.model
        return seconds_of_training(model, train, study, epochs, teacher=teacher, device=device)

    timed(1)  # the first batch is slow: it warms caches and threads up
    few = min(FEW_BATCHES, total)
    count = min(total, max(few, int(seconds * few / timed(few))))
    return min(len(split), count * batch) / timed(count)


def _evaluation_speed(study: Study, known: Understood, seconds: float) -> float:
    search, device, share = known.data.search, resolve_device(study.device), 0.1
    speed = 1.0
    for _ in range(2):
        part = search.subset(share, seed=0) if share < 1 else search
        began = time.perf_counter()
        evaluate(known.model, part, device=device, task=task_of(study))
        took = time.perf_counter() - began
        speed = len(part) / took
        share = min(1.0, seconds * speed / len(search))
    return speed
