"""Studies for looking at: an Optuna storage that is made of records, and an artifact store beside it.

The dashboard reads one storage and offers to delete and rename what is in it. Here it gets a view instead:
studies of any number of runs, told for people, and nothing that is written to it reaches a run.
"""

from __future__ import annotations

import copy
import io
import threading
import time
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NoReturn

from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages import BaseStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState
from optuna_dashboard import _note as notes

from autoprune.errors import UsageError

MAX_TRIALS = 1_000_000  # of one study: a trial's id is its study's times this, plus its number


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyView:
    """One study as it is to be seen.

    Attributes:
        key: stays the same while the study goes on, though its name may tell how it stands.
        trial_notes: Markdown, by the trial's number.
        files: artifact id -> how its content is made, when it is asked for.
    """

    key: str
    name: str
    user_attrs: dict[str, Any]
    system_attrs: dict[str, Any]
    trials: Sequence[FrozenTrial]
    trial_notes: dict[int, str] = field(default_factory=dict)
    files: dict[str, Callable[[], bytes]] = field(default_factory=dict)


class ViewStorage(BaseStorage):
    """An Optuna storage over views, made anew by `look` at most every `patience_s` seconds.

    A study keeps its id from the first time it was seen.
    """

    def __init__(self, look: Callable[[], Sequence[StudyView]], *, patience_s: float = 0.5) -> None:
        self._look, self._patience_s = look, patience_s
        self._lock = threading.Lock()
        self._ids: dict[str, int] = {}
        self._views: dict[int, StudyView] = {}
        self._looked = -float("inf")

    @property
    def views(self) -> dict[int, StudyView]:
        """Study id -> view, as fresh as `patience_s` asks."""
        with self._lock:
            if time.monotonic() - self._looked >= self._patience_s:
                found = self._look()
                self._views = {self.id_of(view.key): view for view in found}
                self._looked = time.monotonic()
            return self._views

    def id_of(self, key: str) -> int:
        """The id of a study, seen already or about to be: notes link to each other while they are made."""
        return self._ids.setdefault(key, len(self._ids) + 1)

    def content(self, artifact_id: str) -> bytes | None:
        """What an artifact holds; None where no view has it."""
        for view in self.views.values():
            if artifact_id in view.files:
                return view.files[artifact_id]()
        return None

    def get_all_studies(self) -> list[FrozenStudy]:
        """All studies, in the order in which they were first seen."""
        return [
            FrozenStudy(view.name, StudyDirection.MAXIMIZE, copy.copy(view.user_attrs), _system(n, view), n)
            for n, view in sorted(self.views.items())
        ]

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """The trials of a study, under ids of this storage."""
        shown = [self._renumbered(study_id, t) for t in self._view(study_id).trials]
        return [t for t in shown if states is None or t.state in states]

    def _renumbered(self, study_id: int, trial: FrozenTrial) -> FrozenTrial:
        own = copy.copy(trial)
        own._trial_id = _trial_id(study_id, trial.number)
        return own

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """One trial, by its id here."""
        study_id, number = divmod(trial_id, MAX_TRIALS)
        for trial in self.get_all_trials(study_id):
            if trial.number == number:
                return trial
        raise KeyError(trial_id)

    def get_study_id_from_name(self, study_name: str) -> int:
        """The id of the study that is now called so."""
        for study_id, view in self.views.items():
            if view.name == study_name:
                return study_id
        raise KeyError(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        """What the study is called now."""
        return self._view(study_id).name

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """More is better, in all of them."""
        self._view(study_id)
        return [StudyDirection.MAXIMIZE]

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """What people read."""
        return copy.copy(self._view(study_id).user_attrs)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """What the dashboard reads: note, plots, metric names."""
        return _system(study_id, self._view(study_id))

    def _view(self, study_id: int) -> StudyView:
        return self.views[study_id]

    def _refuse(self, *given: Any, **named: Any) -> NoReturn:
        raise UsageError("the dashboard shows runs and changes none", "use the autoprune command")

    create_new_study = _refuse
    delete_study = _refuse
    set_study_user_attr = _refuse
    set_study_system_attr = _refuse
    create_new_trial = _refuse
    set_trial_param = _refuse
    set_trial_state_values = _refuse
    set_trial_intermediate_value = _refuse
    set_trial_user_attr = _refuse
    set_trial_system_attr = _refuse


def _trial_id(study_id: int, number: int) -> int:
    return study_id * MAX_TRIALS + number


def _system(study_id: int, view: StudyView) -> dict[str, Any]:
    """With the trials' notes, which the dashboard keeps in their study under their ids."""
    found = copy.copy(view.system_attrs)
    for number, text in view.trial_notes.items():
        own = _trial_id(study_id, number)
        found |= {notes.note_ver_key(own): 1, **notes.split_body(text, own)}
    return found


class ViewArtifacts:
    """An Optuna artifact store over the same views."""

    def __init__(self, storage: ViewStorage) -> None:
        self._storage = storage

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The artifact's content, made now."""
        content = self._storage.content(artifact_id)
        if content is None:
            raise ArtifactNotFound(artifact_id)
        return io.BytesIO(content)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Nothing is written."""
        raise UsageError("the dashboard shows runs and changes none", "use the autoprune command")

    def remove(self, artifact_id: str) -> None:
        """Nothing is removed."""
        raise UsageError("the dashboard shows runs and changes none", "use the autoprune command")
