"""A task: the loss that training minimises, and the score that a network is judged by.

The default is classification, with the cross-entropy of the logits and top-1.
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
        UsageError: the output holds no logits.
    """
    logits = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(logits, Tensor) or logits.ndim < 2:
        raise UsageError(
            f"the model's output is no table of logits but {type(output).__name__}",
            "give the study its own loss and evaluate",
        )
    return logits


def classification_loss(output: Any, target: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of logits (B, C) and class indices (B,), a scalar in float32.

    Raises:
        UsageError: the output holds no logits.
    """
    return F.cross_entropy(logits_of(output).float(), target, label_smoothing=label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Task:
    """The loss that training minimises, and the score that a network is judged by.

    Attributes:
        loss: (model output, targets) -> scalar loss, the mean over the batch; training minimises it.
        score: (model, split, device) -> score in [0, 1], higher is better; None stands for top-1, which is
            measured sample by sample.
    """

    loss: Loss = classification_loss
    score: Score | None = None

    @property
    def has_logits(self) -> bool:
        """Whether the outputs are known to be a classifier's logits: the loss is cross-entropy.

        Only then labels can be smoothed and the original network's logits can be distilled.
        """
        return self.loss is classification_loss


CLASSIFICATION = Task()


def task_of(study: Study) -> Task:
    """Return the task of a study, from its fields `loss` and `evaluate`; None means classification's."""
    return Task(loss=study.loss or classification_loss, score=study.evaluate)
