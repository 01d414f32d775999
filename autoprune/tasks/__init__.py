"""How a network is used: the loss that training minimises, and the score that the network is judged by.

A `Task` holds both. Every function that trains, measures or ranks a network takes one; the default is
classification, with cross-entropy and top-1. `task_of` makes the task of a study from its short form, the
fields `loss` and `evaluate`.

Modules, in reading order:

- `task`: defines the `Task`, the types of its parts, and classification's own loss.
"""

from autoprune.tasks.task import (
    CLASSIFICATION,
    Loss,
    Score,
    Task,
    classification_loss,
    logits_of,
    task_of,
)

__all__ = [
    "CLASSIFICATION",
    "Loss",
    "Score",
    "Task",
    "classification_loss",
    "logits_of",
    "task_of",
]
