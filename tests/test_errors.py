"""Errors cross process boundaries, as those of a data loader's workers do."""

import copy
import pickle

import pytest

from autoprune.errors import AutopruneError, ConfigError, DataError, UnreachableError

ERRORS = [
    DataError("split is empty", "give more"),
    UnreachableError("too small", "ask for more", nearest_cost=0.1),
    ConfigError([DataError("a", "b"), DataError("c", "d")]),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_survives_pickling_and_copying(error: AutopruneError) -> None:
    for copied in (pickle.loads(pickle.dumps(error)), copy.deepcopy(error)):  # noqa: S301
        assert type(copied) is type(error)
        assert str(copied) == str(error)
        assert copied.args == error.args
        assert vars(copied).keys() == vars(error).keys()
