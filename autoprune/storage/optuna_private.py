"""The private names of Optuna that this package uses, and why; every other module calls these functions.

`pyproject.toml` bounds Optuna's version from above for their sake. Each has been the same from Optuna 4.0 on.

* `_CachedStorage` is what `optuna.load_study` itself wraps around an RDB storage that is given by URL. A
  storage that is given as an object is used as it is, so without the wrapper every look at a round would read
  all of its finished trials from the database again.
* `Study._storage`, `Study._study_id`, `FrozenTrial._trial_id`: a trial that was added by `Study.add_trial`
  can only be run, and get attributes, through the storage and its id.
* `RDBStorage._get_stale_trial_ids` compares heartbeats by the database's own clock. Optuna calls it inside
  `Study.optimize` only, which this package does not use: a run asks and tells.
* `RDBStorage._get_best_trial_id`, `_get_trials`, `_create_new_trial`, `_set_trial_param`: four of the
  operations that reach the database, all of which `database` repeats while it is away.
* `FrozenStudy` is what `BaseStorage.get_all_studies` returns: whoever writes a storage needs its name.
* `BaseDistribution._contains` tells whether a stored value is still inside a distribution.
"""

from __future__ import annotations

import copy
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import RDBStorage
from optuna.storages._cached_storage import _CachedStorage
from optuna.study._frozen import FrozenStudy as FrozenStudy
from optuna.trial import FrozenTrial, TrialState

# The operations of `RDBStorage` that reach the database. `database` repeats them while it is away.
READS = frozenset(
    {
        "get_study_id_from_name", "get_study_name_from_id", "get_study_directions", "get_study_user_attrs",
        "get_study_system_attrs", "get_all_studies", "get_trial_id_from_study_id_trial_number",
        "_get_best_trial_id", "get_trial", "_get_trials", "_get_stale_trial_ids",
    }
)  # fmt: skip
WRITES = frozenset(
    {
        "create_new_study", "delete_study", "set_study_user_attr", "set_study_system_attr",
        "_create_new_trial", "_set_trial_param", "set_trial_state_values", "set_trial_intermediate_value",
        "set_trial_user_attr", "set_trial_system_attr", "record_heartbeat",
    }
)  # fmt: skip


class CachedStorage(_CachedStorage):
    """A database as one study sees it: finished trials are read once, and so is what is derived from them.

    Attributes:
        records: trial number -> what `search.history` made of a finished trial.
    """

    def __init__(self, backend: RDBStorage) -> None:
        super().__init__(backend)
        self.records: dict[int, Any] = {}


def cached_records(study: optuna.Study) -> dict[int, Any]:
    """Return the records of a study's finished trials, an empty mapping where its storage keeps none."""
    return getattr(study._storage, "records", {})


def frozen_study_id(study: FrozenStudy) -> int:
    """Return the id of a study in its storage."""
    return study._study_id


def renamed_study(study: FrozenStudy, name: str, study_id: int) -> FrozenStudy:
    """Return the same study under another name and id, as another storage shows it."""
    renamed = copy.copy(study)
    renamed.study_name, renamed._study_id = name, study_id
    return renamed


def trial_id(trial: FrozenTrial) -> int:
    """Return a trial's id, which is unique over all studies of a storage."""
    return trial._trial_id


def live_trial(study: optuna.Study, trial: FrozenTrial) -> optuna.Trial:
    """Return the trial object that parameters can be suggested to."""
    return optuna.Trial(study, trial._trial_id)


def set_trial_attr(study: optuna.Study, trial: FrozenTrial, key: str, value: Any) -> None:
    """Set a user attribute of a running trial."""
    study._storage.set_trial_user_attr(trial._trial_id, key, value)


def is_running(storage: RDBStorage, trial_id: int) -> bool:
    """Return whether the database still counts a trial as running."""
    return storage.get_trial(trial_id).state is TrialState.RUNNING


def stale_trial_ids(storage: RDBStorage, study: optuna.Study) -> list[int]:
    """Return the ids of running trials that had a heartbeat once and none within the grace period."""
    return storage._get_stale_trial_ids(study._study_id)


def contains(distribution: BaseDistribution, value: Any) -> bool:
    """Return whether a value lies inside a distribution."""
    return distribution._contains(distribution.to_internal_repr(value))
