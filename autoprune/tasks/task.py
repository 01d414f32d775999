"""A task: the loss that training minimises, and the score that a network is judged by.

Classification is the default: cross-entropy of the logits, and top-1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.config import Study
from autoprune.data import Split
from autoprune.errors import UsageError

Loss = Callable[[Any, Tensor], Tensor]
Score = Callable[[nn.Module, Split, str], float]


def logits_of(output: Any) -> Tensor:
    """Return the logits (B, C) of a classifier's output; networks with auxiliary heads return them first.

    Raises:
        UsageError: there are none.
    """
    logits = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise UsageError(
            f"the model's output is no table of logits but {type(output).__name__}",
            "give the study its own loss and evaluate",
        )
    return logits


def classification_loss(output: Any, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy of logits (B, C) and class indices (B,), in float32."""
    return F.cross_entropy(logits_of(output).float(), target, label_smoothing=label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Task:
    """How a network is used.

    Attributes:
        loss: (model output, targets) -> scalar loss, the mean over the batch; training minimises it.
        score: (model, split, device) -> score in [0, 1], higher is better; None is top-1, which is measured
            sample by sample.
    """

    loss: Loss = classification_loss
    score: Score | None = None

    @property
    def has_logits(self) -> bool:
        """Whether the outputs are known to be a classifier's logits: the loss is cross-entropy.

        Only then can labels be smoothed, and can the original network's logits be distilled.
        """
        return self.loss is classification_loss


CLASSIFICATION = Task()


def task_of(study: Study) -> Task:
    """Return the task of a study, from `loss` and `evaluate`; classification's, where these are None."""
    return Task(loss=study.loss or classification_loss, score=study.evaluate)
