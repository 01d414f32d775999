"""The truth of a run: an Optuna storage and an artifact store.

There is one Optuna study per round attempt, `<run>/round-NN`; `<run>/round-00` is the baseline and
`<run>/final` the delivered model. What the controller and the report need are user attributes of these
studies and their trials, so any process that can open them can continue the run. Weights are checkpoints:
one safetensors file with the composed plan in its header, named by its own SHA-256 and verified when it is
read.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import optuna
import torch
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import FrozenTrial, TrialState
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

from autoprune.errors import ArtifactError, UsageError
from autoprune.location import ARTIFACTS, DATABASE, RunLocation
from autoprune.plan import PruningPlan
from autoprune.serialization import to_plain
from autoprune.storage.blobs import open_blobs
from autoprune.storage.database import close_storage, open_storage
from autoprune.storage.optuna_private import CachedStorage

FINAL = "final"
BASELINE = "/round-00"
PLAN_KEY = "autoprune_plan"
# Set last: a study that has it is whole. Its value tells a study from a later one of the same name.
# The stored key is that of version 0.1.0, whose runs are still read and resumed.
WHOLE = "made"
CHECKPOINT = "checkpoint"  # a trial's attribute: the id of its model's checkpoint
SUFFIX, ENCRYPTED_SUFFIX = ".safetensors", ".age"


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Silence what Optuna logs on stderr, as a run reports it itself; warnings stay."""
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

    def matches(self, model: nn.Module) -> bool:
        """Return whether a model has exactly these weights."""
        state = model.state_dict()
        return state.keys() == self.weights.keys() and all(
            torch.equal(state[name].cpu(), weight) for name, weight in self.weights.items()
        )

    def load_into_(self, model: nn.Module) -> None:
        """Load the weights into a model of the same shapes, in place."""
        model.load_state_dict(dict(self.weights))


@dataclass(frozen=True, kw_only=True)
class CheckpointCipher:
    """How checkpoints are encrypted at rest; `decrypt` undoes `encrypt`, or raises an `AutopruneError`."""

    encrypt: Callable[[bytes], bytes]
    decrypt: Callable[[bytes], bytes]


class RunStore:
    """One run's studies and checkpoints.

    Args:
        location: of the run; a path is a folder that holds all of it.
        name: of the run, which is the prefix of its studies.
        create: create the database; otherwise it has to exist.
        cipher: encrypts new checkpoints and decrypts the encrypted ones; None writes them as they are.

    Raises:
        UsageError: there is no database in the folder, or it holds a run of another name.
    """

    def __init__(
        self,
        location: RunLocation | Path,
        name: str,
        *,
        create: bool = False,
        cipher: CheckpointCipher | None = None,
    ) -> None:
        self.location = location if isinstance(location, RunLocation) else RunLocation(folder=location)
        self.folder, self.name, self.cipher = self.location.folder, name, cipher
        if self.location.is_local and not create and not (self.folder / DATABASE).is_file():
            raise UsageError(f"there is no run in {self.folder}", "start it without --resume")
        if create:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.checkpoints = self.location.checkpoints(name)
        self.blobs = open_blobs(self.checkpoints)
        self.storage = open_storage(self.location)
        self._may_change: Callable[[], None] = _always
        self._caches: dict[str, tuple[str, CachedStorage]] = {}
        others = {n.split("/")[0] for n in optuna.get_all_study_names(self.storage)} - {name}
        if others and self.location.is_local:  # a database server holds many runs
            self.close()
            raise UsageError(
                f"{self.folder} holds the run {min(others)!r}, not {name!r}",
                "resume it with the study that started it, or choose another --out",
            )

    def guard_with(self, check: Callable[[], None]) -> None:
        """Call `check`, which may raise, before any change that is the coordinator's alone."""
        self._may_change = check

    def guard(self) -> None:
        """Check that this process may still decide.

        Raises:
            RunError: another process has taken the run over.
        """
        self._may_change()

    def close(self) -> None:
        """Close the database and the artifact store."""
        self.blobs.close()
        close_storage(self.storage)

    def erase(self) -> None:
        """Remove the database and all checkpoints of a local run; the store has to be closed."""
        if not self.location.is_local:
            return
        for name in (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm"):
            (self.folder / name).unlink(missing_ok=True)
        if self.location.artifacts is None:
            shutil.rmtree(self.folder / ARTIFACTS, ignore_errors=True)

    def study(self, number: int | str) -> optuna.Study | None:
        """Return the study of a round attempt (0 is the baseline) or of `FINAL`, None where there is none.

        A study whose creation was interrupted counts as none. Finished trials are read from the database
        once, however often the study is asked for.
        """
        name = self._study_name(number)
        try:
            mark = self.storage.get_study_user_attrs(self.storage.get_study_id_from_name(name))[WHOLE]
            return optuna.load_study(study_name=name, storage=self._cache(name, mark))
        except KeyError:
            return None

    def _cache(self, name: str, mark: str) -> CachedStorage:
        """Return the cached database of one study; a later study of the same name gets a fresh cache."""
        if self._caches.get(name, ("",))[0] != mark:
            self._caches[name] = (mark, CachedStorage(self.storage))
        return self._caches[name][1]

    def create_study(
        self, number: int | str, attributes: Mapping[str, Any], result: tuple[str, float] | None = None
    ) -> optuna.Study:
        """Create a study with its attributes, all of them or not at all.

        What an interrupted creation left behind is removed first.

        Args:
            number: as for `study`.
            attributes: as `set_attrs` takes them.
            result: checkpoint and score of the one trial of a study that searches nothing.

        Raises:
            DuplicatedStudyError: there is one, and it is whole.
        """
        self.guard()
        if self.study(number) is None:
            with suppress(KeyError):
                self.delete_study(number)
        study = optuna.create_study(
            study_name=self._study_name(number), storage=self.storage, direction="maximize"
        )
        set_attrs(study, **attributes)
        if result is not None:
            artifact_id, score = result
            study.add_trial(optuna.trial.create_trial(value=score, user_attrs={CHECKPOINT: artifact_id}))
        mark = uuid4().hex
        set_attrs(study, **{WHOLE: mark})
        return optuna.load_study(study_name=study.study_name, storage=self._cache(study.study_name, mark))

    def delete_study(self, number: int | str) -> None:
        """Delete a study.

        Raises:
            KeyError: there is none.
        """
        self.guard()
        optuna.delete_study(study_name=self._study_name(number), storage=self.storage)

    def rounds(self) -> Iterator[optuna.Study]:
        """Iterate over the studies of the round attempts so far, in order."""
        number = 1
        while (study := self.study(number)) is not None:
            yield study
            number += 1

    def save_checkpoint(self, model: nn.Module, plan: PruningPlan) -> str:
        """Write a model's weights and plan, and return the checkpoint's id, which pins its content."""
        weights = {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}
        content = save_safetensors(weights, metadata={PLAN_KEY: plan.to_json()})
        artifact_id = f"{hashlib.sha256(content).hexdigest()}{SUFFIX}"
        if self.cipher is not None:
            artifact_id, content = artifact_id + ENCRYPTED_SUFFIX, self.cipher.encrypt(content)
        if not self.has_checkpoint(artifact_id):
            self.blobs.write(artifact_id, io.BytesIO(content))
        return artifact_id

    def load_checkpoint(self, artifact_id: str) -> Checkpoint:
        """Read the checkpoint of this id.

        Raises:
            ArtifactError: it is missing, or its content is not what was written.
            UsageError: it is encrypted, and no key was given.
        """
        hint = "the run cannot continue from it; start the run again in a new folder"
        try:
            with self.blobs.open_reader(artifact_id) as file:
                content = file.read()
        except ArtifactNotFound:
            raise ArtifactError(f"checkpoint {artifact_id} is missing in {self.checkpoints}", hint) from None
        content = self._decrypt(artifact_id, content)
        digest = artifact_id.removesuffix(ENCRYPTED_SUFFIX).removesuffix(SUFFIX)
        if hashlib.sha256(content).hexdigest() != digest:
            raise ArtifactError(f"checkpoint {artifact_id} in {self.checkpoints} is damaged", hint)
        try:
            return Checkpoint(weights=load_safetensors(content), plan=_plan_of(content))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(f"checkpoint {artifact_id} is not one of autoprune's", hint) from error

    def has_checkpoint(self, artifact_id: str) -> bool:
        """Return whether a checkpoint is there and whole."""
        try:
            self.load_checkpoint(artifact_id)
        except ArtifactError:
            return False
        return True

    def delete_checkpoint(self, artifact_id: str) -> None:
        """Remove a checkpoint that no round will start from."""
        if self.has_checkpoint(artifact_id):
            self.blobs.remove(artifact_id)

    def delete_checkpoints_except(self, artifact_ids: Collection[str]) -> None:
        """Remove every other blob, unfinished files of killed processes included; for a run that is over."""
        self.guard()
        for name in self.blobs.names():
            if name not in artifact_ids:
                self.blobs.remove(name)

    def _decrypt(self, artifact_id: str, content: bytes) -> bytes:
        if not artifact_id.endswith(ENCRYPTED_SUFFIX):
            return content
        if self.cipher is None:
            raise UsageError(
                f"the checkpoints of the run in {self.folder} are encrypted",
                "go on with the --encrypt-run (and --run-identity) that it was started with",
            )
        return self.cipher.decrypt(content)

    def _study_name(self, number: int | str) -> str:
        return f"{self.name}/{number}" if isinstance(number, str) else f"{self.name}/round-{number:02d}"


def has_run(location: RunLocation, name: str) -> bool:
    """Return whether there is a run that can be resumed.

    Raises:
        UsageError: the database cannot be reached.
    """
    if location.is_local:
        return (location.folder / DATABASE).is_file()
    return any(study.startswith(f"{name}/") for study in study_names_at(location))


def run_name_at(location: RunLocation | Path) -> str:
    """Return the name of the run in a folder.

    Raises:
        UsageError: there is no run, or it has not measured its baseline yet.
    """
    location = location if isinstance(location, RunLocation) else RunLocation(folder=location)
    if location.is_local and not (location.folder / DATABASE).is_file():
        raise UsageError(f"there is no run in {location.folder}", suggest_run(location.folder))
    names = run_names_at(location)
    if not names:
        raise UsageError(
            f"the run in {location} has not measured its baseline yet", "wait for it, or start it again"
        )
    return names[0]


def suggest_run(folder: Path) -> str:
    """Return a hint that names the run beside a folder whose name is nearest to the folder's."""
    runs = [str(database.parent) for database in folder.parent.glob(f"*/{DATABASE}")]
    nearest = difflib.get_close_matches(str(folder), runs, n=1)
    return f"did you mean {nearest[0]}?" if nearest else "give the folder that autoprune run wrote: runs/NAME"


def run_names_at(location: RunLocation) -> list[str]:
    """Return the names of the runs that have begun to measure their original."""
    if location.is_local and not (location.folder / DATABASE).is_file():
        return []
    return [n.removesuffix(BASELINE) for n in study_names_at(location) if n.endswith(BASELINE)]


def study_names_at(location: RunLocation) -> list[str]:
    """Return the names of all studies of a storage."""
    storage = open_storage(location)
    try:
        return [str(s.study_name) for s in storage.get_all_studies()]
    finally:
        close_storage(storage)


def set_attrs(target: optuna.Study | optuna.Trial, /, **attributes: Any) -> None:
    """Set user attributes; dataclasses, and sequences of them, are stored as plain values."""
    for key, value in attributes.items():
        target.set_user_attr(key, to_plain(value))


def completed_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the completed trials of a study in order; those of killed processes are not among them."""
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _always() -> None:
    """Let a store that no run is coordinated through change anything."""


def _plan_of(content: bytes) -> PruningPlan:
    length = int.from_bytes(content[:8], "little")  # the safetensors format: a header's length, the header
    header = json.loads(content[8 : 8 + length])
    return PruningPlan.from_json(header["__metadata__"][PLAN_KEY])
