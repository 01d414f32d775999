"""The truth of a run: an Optuna storage and an artifact store.

One Optuna study per round attempt, `<run>/round-NN`; `<run>/round-00` is the baseline and `<run>/final` the
delivered model. What the controller and the report need are user attributes of these studies and their
trials, so any process that can open them can continue the run. Weights are checkpoints: one
safetensors file with the composed plan in its header, named by its own SHA-256 and verified when read.

Where the run is, a folder or PostgreSQL with S3, is `place`; how it waits for them `patience`.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import optuna
import torch
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.storages._cached_storage import _CachedStorage
from optuna.trial import FrozenTrial, TrialState
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from autoprune.errors import ArtifactError, UsageError
from autoprune.location import ARTIFACTS, DATABASE, Place
from autoprune.plan import PruningPlan
from autoprune.storage.retry import open_artifacts, open_storage

__all__ = [
    "ARTIFACTS", "CHECKPOINT", "DATABASE", "FINAL", "Checkpoint", "Place", "RunStore", "Seal",
    "fail_left_running_", "has_run", "like_run", "name_in", "names_in", "put", "quiet_optuna", "scored",
    "studies_in",
]  # fmt: skip

FINAL = "final"
BASELINE = "/round-00"
PLAN_KEY = "autoprune_plan"
MADE = "made"  # put last: the study is whole; tells it from a later one that got its name and its number
CHECKPOINT = "checkpoint"  # a trial's model, where it is kept
SUFFIX, SEALED = ".safetensors", ".age"


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Optuna says on stderr what we say ourselves; warnings stay."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@dataclass(frozen=True, kw_only=True, eq=False)
class Checkpoint:
    """Weights of a dense model, and the plan that leads from the original to its shapes."""

    weights: Mapping[str, Tensor]
    plan: PruningPlan

    def is_of(self, model: nn.Module) -> bool:
        """Whether a model has exactly these weights."""
        state = model.state_dict()
        return state.keys() == self.weights.keys() and all(
            torch.equal(state[name].cpu(), weight) for name, weight in self.weights.items()
        )

    def load_into_(self, model: nn.Module) -> None:
        """Give the weights to a model of the same shapes."""
        model.load_state_dict(dict(self.weights))


@dataclass(frozen=True, kw_only=True)
class Seal:
    """How checkpoints are protected at rest; `open` undoes `close`, or raises an `AutopruneError`."""

    close: Callable[[bytes], bytes]
    open: Callable[[bytes], bytes]


class View(_CachedStorage):
    """The database as one study sees it: finished trials are read once, and so is what they say.

    Attributes:
        records: by trial number, what `history` made of a finished trial.
    """

    def __init__(self, backend: optuna.storages.RDBStorage) -> None:
        super().__init__(backend)
        self.records: dict[int, Any] = {}


class RunStore:
    """One run's studies and checkpoints.

    Args:
        where: the run is; a path is a folder that holds all of it.
        name: of the run, the prefix of its studies.
        create: make the database; otherwise it has to exist.
        seal: what new checkpoints are encrypted with, and sealed ones opened; None keeps them as they are.

    Raises:
        UsageError: there is no database in the folder, or it holds a run of another name.
    """

    def __init__(
        self, where: Place | Path, name: str, *, create: bool = False, seal: Seal | None = None
    ) -> None:
        self.place = where if isinstance(where, Place) else Place(folder=where)
        self.folder, self.name, self.seal = self.place.folder, name, seal
        if self.place.is_local and not create and not (self.folder / DATABASE).is_file():
            raise UsageError(f"there is no run in {self.folder}", "start it without --resume")
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = self.place.checkpoints(name)
        self.artifacts = open_artifacts(self.checkpoints)
        self.storage = open_storage(self.place)
        self._guard: Callable[[], None] = _nobody_minds
        self._views: dict[str, tuple[str, View]] = {}
        others = {n.split("/")[0] for n in optuna.get_all_study_names(self.storage)} - {name}
        if others and self.place.is_local:  # a database server holds many runs
            self.close()
            raise UsageError(
                f"{self.folder} holds the run {min(others)!r}, not {name!r}",
                "resume it with the study that started it, or choose another --out",
            )

    def guard_with(self, check: Callable[[], None]) -> None:
        """Let `check` raise before anything that only the run's coordinator may change is changed."""
        self._guard = check

    def guard(self) -> None:
        """See that this process may still decide.

        Raises:
            RunError: another process has taken the run over.
        """
        self._guard()

    def close(self) -> None:
        """Let go of the database and the artifact store."""
        self.artifacts.close()
        self.storage.remove_session()
        self.storage.engine.dispose()

    def erase(self) -> None:
        """Remove the database and all checkpoints of a folder; the store has to be closed."""
        if not self.place.is_local:
            return
        for name in (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm"):
            (self.folder / name).unlink(missing_ok=True)
        if self.place.artifacts is None:
            shutil.rmtree(self.folder / ARTIFACTS, ignore_errors=True)

    def study(self, number: int | str) -> optuna.Study | None:
        """The study of a round attempt (0 is the baseline) or `FINAL`; None where there is none yet.

        One whose making was interrupted is none. Finished trials are read from the database once, however
        often the study is asked for.
        """
        name = self._study_name(number)
        try:
            made = self.storage.get_study_user_attrs(self.storage.get_study_id_from_name(name))[MADE]
            return optuna.load_study(study_name=name, storage=self._view(name, made))
        except KeyError:
            return None

    def _view(self, name: str, made: str) -> View:
        """The database as this study sees it; another one by the same name is seen afresh."""
        if self._views.get(name, ("",))[0] != made:
            self._views[name] = (made, View(self.storage))
        return self._views[name][1]

    def create_study(
        self, number: int | str, attributes: Mapping[str, Any], result: tuple[str, float] | None = None
    ) -> optuna.Study:
        """A new study that knows these attributes, all of them or not at all.

        What an interrupted making of it left is removed first.

        Args:
            number: as for `study`.
            attributes: what `put` takes.
            result: the checkpoint and the top-1 of its one trial, for those that search nothing.

        Raises:
            DuplicatedStudyError: there is one, and it is whole.
        """
        self.guard()
        if self.study(number) is None:
            with suppress(KeyError):
                self.drop_study(number)
        study = optuna.create_study(
            study_name=self._study_name(number), storage=self.storage, direction="maximize"
        )
        put(study, **attributes)
        if result is not None:
            artifact_id, top1 = result
            study.add_trial(optuna.trial.create_trial(value=top1, user_attrs={CHECKPOINT: artifact_id}))
        made = uuid4().hex
        put(study, **{MADE: made})
        return optuna.load_study(study_name=study.study_name, storage=self._view(study.study_name, made))

    def drop_study(self, number: int | str) -> None:
        """Forget a study.

        Raises:
            KeyError: there is none.
        """
        self.guard()
        optuna.delete_study(study_name=self._study_name(number), storage=self.storage)

    def rounds(self) -> Iterator[optuna.Study]:
        """The studies of the round attempts so far, in order."""
        number = 1
        while (study := self.study(number)) is not None:
            yield study
            number += 1

    def save(self, model: nn.Module, plan: PruningPlan) -> str:
        """Keep a model; gives the artifact's id, which pins its content."""
        weights = {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}
        content = save_safetensors(weights, metadata={PLAN_KEY: plan.to_json()})
        artifact_id = f"{hashlib.sha256(content).hexdigest()}{SUFFIX}"
        if self.seal is not None:
            artifact_id, content = artifact_id + SEALED, self.seal.close(content)
        if not self.holds(artifact_id):
            self.artifacts.write(artifact_id, io.BytesIO(content))
        return artifact_id

    def load(self, artifact_id: str) -> Checkpoint:
        """The checkpoint of this id.

        Raises:
            ArtifactError: it is missing, or its content is not what was saved.
            UsageError: it is encrypted, and there is nothing to open it with.
        """
        hint = "the run cannot continue from it; start the run again in a new folder"
        try:
            with self.artifacts.open_reader(artifact_id) as file:
                content = file.read()
        except ArtifactNotFound:
            raise ArtifactError(f"checkpoint {artifact_id} is missing in {self.checkpoints}", hint) from None
        content = self._opened(artifact_id, content)
        if hashlib.sha256(content).hexdigest() != artifact_id.removesuffix(SEALED).removesuffix(SUFFIX):
            raise ArtifactError(f"checkpoint {artifact_id} in {self.checkpoints} is damaged", hint)
        try:
            return Checkpoint(weights=load_safetensors(content), plan=_plan_in_header(content))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(f"checkpoint {artifact_id} is not one of autoprune's", hint) from error

    def forget(self, artifact_id: str) -> None:
        """Remove a checkpoint that no round will start from."""
        if self.holds(artifact_id):
            self.artifacts.remove(artifact_id)

    def _opened(self, artifact_id: str, content: bytes) -> bytes:
        if not artifact_id.endswith(SEALED):
            return content
        if self.seal is None:
            raise UsageError(
                f"the checkpoints of the run in {self.folder} are encrypted",
                "go on with the --encrypt-run (and --run-identity) that it was started with",
            )
        return self.seal.open(content)

    def keep_only(self, artifact_ids: Collection[str]) -> None:
        """Remove all else, half-written files of killed processes included; for a run that is over."""
        self.guard()
        for name in self.artifacts.names():
            if name not in artifact_ids:
                self.artifacts.remove(name)

    def holds(self, artifact_id: str) -> bool:
        """Whether this checkpoint is there and whole."""
        try:
            self.load(artifact_id)
        except ArtifactError:
            return False
        return True

    def _study_name(self, number: int | str) -> str:
        return f"{self.name}/{number}" if isinstance(number, str) else f"{self.name}/round-{number:02d}"


def has_run(place: Place, name: str) -> bool:
    """Whether there is a run to go on with.

    Raises:
        UsageError: the database cannot be reached.
    """
    if place.is_local:
        return (place.folder / DATABASE).is_file()
    return any(study.startswith(f"{name}/") for study in studies_in(place))


def name_in(where: Place | Path) -> str:
    """The name of the run in a folder.

    Raises:
        UsageError: there is no run, or it has not measured its baseline yet.
    """
    place = where if isinstance(where, Place) else Place(folder=where)
    if place.is_local and not (place.folder / DATABASE).is_file():
        raise UsageError(f"there is no run in {place.folder}", like_run(place.folder))
    names = names_in(place)
    if not names:
        raise UsageError(
            f"the run in {place} has not measured its baseline yet", "wait for it, or start it again"
        )
    return names[0]


def like_run(folder: Path) -> str:
    """A hint that names the run beside this folder whose name is nearest."""
    runs = [str(found.parent) for found in folder.parent.glob(f"*/{DATABASE}")]
    near = difflib.get_close_matches(str(folder), runs, n=1)
    return f"did you mean {near[0]}?" if near else "give the folder that autoprune run wrote: runs/NAME"


def names_in(place: Place) -> list[str]:
    """The runs that have begun to measure their original."""
    if place.is_local and not (place.folder / DATABASE).is_file():
        return []
    return [n.removesuffix(BASELINE) for n in studies_in(place) if n.endswith(BASELINE)]


def studies_in(place: Place) -> list[str]:
    """The names of all studies of a storage."""
    storage = open_storage(place)
    try:
        return [str(s.study_name) for s in storage.get_all_studies()]
    finally:
        storage.remove_session()
        storage.engine.dispose()


def put(where: optuna.Study | optuna.Trial, **attributes: Any) -> None:
    """Set user attributes; dataclasses, and tuples of them, become plain values."""
    for key, value in attributes.items():
        where.set_user_attr(key, _plain(value))


def scored(study: optuna.Study) -> list[FrozenTrial]:
    """The finished trials of a round, in order; those of killed processes are left out."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def fail_left_running_(study: optuna.Study) -> list[FrozenTrial]:
    """Tell the storage that the trials which a stopped process left behind failed; gives those that ran."""
    left = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    for _ in study.get_trials(deepcopy=False, states=(TrialState.WAITING,)):
        study.ask()  # only a running trial can be told
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
    return left


def _nobody_minds() -> None:
    """A store outside a run may change anything."""


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, tuple | list):
        return [_plain(v) for v in value]
    return value


def _plan_in_header(content: bytes) -> PruningPlan:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    return PruningPlan.from_json(header["__metadata__"][PLAN_KEY])
