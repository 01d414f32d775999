"""The speed of this machine on a study, from half a minute of the study's own training and evaluation."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass

from autoprune.config import Study
from autoprune.data import Split
from autoprune.pipeline.preflight import TracedStudy, trace_study
from autoprune.search import seconds_of_training
from autoprune.tasks import task_of
from autoprune.training import evaluate, resolve_device

FEW_BATCHES = 2  # timed first, to see how many batches fit into the time; a guess
PART = 0.4  # of the seconds, for training and for evaluating each; the rest is warming up


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """The images that this machine processes in a second, and the times that follow for a run.

    Attributes:
        epoch_s: the seconds of one epoch of fine-tuning, on the share of the data that trials see.
        evaluation_s: the seconds of one evaluation of the search split.
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
    traced, device = trace_study(study), resolve_device(study.device)
    subset = traced.data.train.subset(study.finetune.share, seed=0)
    train_speed = _train_speed(study, traced, subset, PART * seconds)
    evaluation_speed = _evaluation_speed(study, traced, PART * seconds)
    return Throughput(
        network=type(traced.model).__qualname__, device=str(device), train_images_per_s=train_speed,
        evaluate_images_per_s=evaluation_speed, epoch_s=len(subset) / train_speed,
        evaluation_s=len(traced.data.search) / evaluation_speed,
    )  # fmt: skip


def _train_speed(study: Study, traced: TracedStudy, split: Split, seconds: float) -> float:
    model, batch, device = (
        copy.deepcopy(traced.model),
        study.finetune.batch_size,
        resolve_device(study.device),
    )
    total = split.num_batches(batch)

    def seconds_of(num_batches: int) -> float:
        epochs, train, teacher = num_batches / total, traced.data.train, traced.model
        return seconds_of_training(model, train, study, epochs, teacher=teacher, device=device)

    seconds_of(1)  # the first batch is slow: it warms caches and threads up
    num_first = min(FEW_BATCHES, total)
    count = min(total, max(num_first, int(seconds * num_first / seconds_of(num_first))))
    return min(len(split), count * batch) / seconds_of(count)


def _evaluation_speed(study: Study, traced: TracedStudy, seconds: float) -> float:
    search, device, share = traced.data.search, resolve_device(study.device), 0.1
    speed = 1.0
    for _ in range(2):
        part = search.subset(share, seed=0) if share < 1 else search
        began = time.perf_counter()
        evaluate(traced.model, part, device=device, task=task_of(study))
        speed = len(part) / (time.perf_counter() - began)
        share = min(1.0, seconds * speed / len(search))
    return speed
