from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from autoprune.config import Study
from autoprune.data import load_data
from autoprune.errors import UsageError
from autoprune.tasks import CLASSIFICATION, Task, classification_loss, logits_of, task_of
from tests.tiny import tiny_net

STUDY = Study(name="s", model=tiny_net, data=lambda: load_data("digits", search_from="train"))


def test_a_task_is_classification_unless_it_says_otherwise() -> None:
    logits_BC, targets_B = torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    assert Task() == CLASSIFICATION
    assert CLASSIFICATION.score is None
    assert CLASSIFICATION.has_logits
    assert CLASSIFICATION.loss(logits_BC, targets_B) == F.cross_entropy(logits_BC, targets_B)


def test_a_study_gives_its_task() -> None:
    def loss(output: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        return output.sum()

    assert task_of(STUDY) == CLASSIFICATION
    own = task_of(Study(name="s", model=tiny_net, data=STUDY.data, loss=loss, evaluate=lambda m, s, d: 0.5))
    assert own.loss is loss
    assert not own.has_logits
    assert own.score is not None
    assert own.score(tiny_net(), None, "cpu") == 0.5  # type: ignore[arg-type]


def test_the_first_of_several_outputs_is_the_logits() -> None:
    logits_BC, auxiliary_BC = torch.zeros(2, 3), torch.ones(2, 3)
    assert logits_of((logits_BC, auxiliary_BC)) is logits_BC
    assert classification_loss((logits_BC, auxiliary_BC), torch.tensor([0, 1])) == pytest.approx(
        1.0986, abs=1e-4
    )


@pytest.mark.parametrize("output", [(), torch.zeros(3), {"out": torch.zeros(2, 3)}])
def test_an_output_without_logits_is_refused(output: object) -> None:
    with pytest.raises(UsageError, match="no table of logits"):
        logits_of(output)
