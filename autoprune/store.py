"""Where the truth of a run lives: an Optuna storage and an artifact store in the run's folder.

One Optuna study per round attempt, `<run>/round-NN`; `<run>/round-00` is the baseline and `<run>/final` the
delivered model. What the controller and the report need are user attributes of these studies and their
trials, so any process that can open the folder can continue the run. Weights are checkpoints: one
safetensors file with the composed plan in its header, named by its own SHA-256 and verified when read.

SQLite as Optuna opens it hands one enqueued trial to two workers and gives up on a busy database; a
write-ahead log, `BEGIN IMMEDIATE` and a patient timeout mend both.
"""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.trial import FrozenTrial, TrialState
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from sqlalchemy import Connection, event
from torch import Tensor, nn

from autoprune.errors import ArtifactError, UsageError
from autoprune.plan import PruningPlan

DATABASE = "study.sqlite3"
ARTIFACTS = "artifacts"
BUSY_TIMEOUT_S = 60
FINAL = "final"
BASELINE = "/round-00"
PLAN_KEY = "autoprune_plan"
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


class RunStore:
    """One run's studies and checkpoints.

    Args:
        folder: of the run.
        name: of the run, the prefix of its studies.
        create: make the database; otherwise it has to exist.
        seal: what new checkpoints are encrypted with, and sealed ones opened; None keeps them as they are.

    Raises:
        UsageError: there is no database in the folder, or it holds a run of another name.
    """

    def __init__(self, folder: Path, name: str, *, create: bool = False, seal: Seal | None = None) -> None:
        self.folder, self.name, self.seal = folder, name, seal
        if not create and not (folder / DATABASE).is_file():
            raise UsageError(f"there is no run in {folder}", "start it without --resume")
        (folder / ARTIFACTS).mkdir(parents=True, exist_ok=True)
        self.storage = _open_sqlite(folder / DATABASE)
        self.artifacts = FileSystemArtifactStore(folder / ARTIFACTS)
        others = {n.split("/")[0] for n in optuna.get_all_study_names(self.storage)} - {name}
        if others:
            self.close()
            raise UsageError(
                f"{folder} holds the run {min(others)!r}, not {name!r}",
                "resume it with the study that started it, or choose another --out",
            )

    def close(self) -> None:
        """Let go of the database file."""
        self.storage.remove_session()
        self.storage.engine.dispose()

    def erase(self) -> None:
        """Remove the database and all checkpoints; the store has to be closed."""
        for name in (DATABASE, f"{DATABASE}-wal", f"{DATABASE}-shm"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / ARTIFACTS)

    def study(self, number: int | str) -> optuna.Study | None:
        """The study of a round attempt (0 is the baseline) or `FINAL`; None where there is none yet."""
        try:
            return optuna.load_study(study_name=self._study_name(number), storage=self.storage)
        except KeyError:
            return None

    def create_study(self, number: int | str, attributes: Mapping[str, Any]) -> optuna.Study:
        """A new study that knows these attributes."""
        study = optuna.create_study(
            study_name=self._study_name(number), storage=self.storage, direction="maximize"
        )
        put(study, **attributes)
        return study

    def drop_study(self, number: int | str) -> None:
        """Forget a study whose making was interrupted."""
        optuna.delete_study(study_name=self._study_name(number), storage=self.storage)

    def rounds(self) -> Iterator[optuna.Study]:
        """The studies of the round attempts so far, in order; one whose making was interrupted is none."""
        number = 1
        while (study := self.study(number)) is not None and "planned" in study.user_attrs:
            yield study
            number += 1

    def save(self, model: nn.Module, plan: PruningPlan) -> str:
        """Keep a model; gives the artifact's id, which pins its content."""
        weights = {name: t.detach().cpu().clone().contiguous() for name, t in model.state_dict().items()}
        content = save_safetensors(weights, metadata={PLAN_KEY: plan.to_json()})
        artifact_id = f"{hashlib.sha256(content).hexdigest()}{SUFFIX}"
        if self.seal is not None:
            artifact_id, content = artifact_id + SEALED, self.seal.close(content)
        if not self._holds(artifact_id):
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
            raise ArtifactError(f"checkpoint {artifact_id} is missing in {self.folder}", hint) from None
        content = self._opened(artifact_id, content)
        if hashlib.sha256(content).hexdigest() != artifact_id.removesuffix(SEALED).removesuffix(SUFFIX):
            raise ArtifactError(f"checkpoint {artifact_id} in {self.folder} is damaged", hint)
        try:
            return Checkpoint(weights=load_safetensors(content), plan=_plan_in_header(content))
        except (SafetensorError, KeyError, ValueError) as error:
            raise ArtifactError(f"checkpoint {artifact_id} is not one of autoprune's", hint) from error

    def forget(self, artifact_id: str) -> None:
        """Remove a checkpoint that no round will start from."""
        if self._holds(artifact_id):
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

    def _holds(self, artifact_id: str) -> bool:
        try:
            self.load(artifact_id)
        except ArtifactError:
            return False
        return True

    def _study_name(self, number: int | str) -> str:
        return f"{self.name}/{number}" if isinstance(number, str) else f"{self.name}/round-{number:02d}"


def name_in(folder: Path) -> str:
    """The name of the run in a folder.

    Raises:
        UsageError: there is no run, or it has not measured its baseline yet.
    """
    if not (folder / DATABASE).is_file():
        raise UsageError(
            f"there is no run in {folder}", "give the folder that autoprune run wrote: runs/NAME"
        )
    storage = _open_sqlite(folder / DATABASE)
    try:
        names = [s.study_name for s in storage.get_all_studies()]
    finally:
        storage.remove_session()
        storage.engine.dispose()
    started = [n.removesuffix(BASELINE) for n in names if n.endswith(BASELINE)]
    if not started:
        raise UsageError(
            f"the run in {folder} has not measured its baseline yet", "wait for it, or start it again"
        )
    return started[0]


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


def _open_sqlite(path: Path) -> optuna.storages.RDBStorage:
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{path.resolve()}", engine_kwargs={"connect_args": {"timeout": BUSY_TIMEOUT_S}}
    )
    event.listen(storage.engine, "connect", _write_ahead)
    event.listen(storage.engine, "begin", _begin_immediate)
    storage.engine.dispose()  # the connection that made the tables knows neither listener
    return storage


def _write_ahead(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself
    connection.execute("PRAGMA journal_mode=WAL")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


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
