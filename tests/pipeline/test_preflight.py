"""A study whose network or data is of a wrong kind is refused before anything is traced."""

from typing import Any

import pytest
from torch import nn

from autoprune import Study, load_data
from autoprune.errors import UsageError
from autoprune.pipeline.preflight import trace_study


@pytest.mark.parametrize("model", [None, 3, lambda: None])
def test_a_model_that_is_no_module_is_refused(model: Any) -> None:
    data = load_data("digits", search_from="train")
    with pytest.raises(UsageError, match="the study's model is a "):
        trace_study(Study(name="a", model=model, data=data))


@pytest.mark.parametrize("data", [None, 3, lambda: None])
def test_data_of_another_kind_are_refused(data: Any) -> None:
    with pytest.raises(UsageError, match="the study's data is a "):
        trace_study(Study(name="a", model=nn.Linear(2, 2), data=data))
