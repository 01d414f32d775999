"""A database and an object store that may be away for a while: wait with back-off, then go on.

`open_storage` and `open_artifacts` give what Optuna needs, made patient with tenacity. An operation whose
answer got lost may have been carried out: asking again for what is done already counts as done.

SQLite as Optuna opens it hands one enqueued trial to two workers and gives up on a busy database; a
write-ahead log, `BEGIN IMMEDIATE` and a patient timeout mend both. Every commit is
flushed to the disk (`synchronous=FULL`, SQLite's default), so that a decision is on it before the
checkpoints that it makes superfluous are removed.
"""

from __future__ import annotations

import functools
import io
import logging
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from typing import Any, BinaryIO, Protocol

import optuna
import tenacity
from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import Connection, event
from sqlalchemy.exc import DatabaseError, DBAPIError, IntegrityError, OperationalError, ProgrammingError

from autoprune.errors import AutopruneError, RunError, UsageError
from autoprune.location import DATABASE, Place

BUSY_TIMEOUT_S = 60
PATIENCE_S = 900  # how long a run waits for its storage; a guess at a database's maintenance
BEAT_S = 10  # heartbeats of whoever works on the run
GRACE_S = 90  # without one for this long a process counts as dead
NEXT = "the same command with --resume goes on from the last finished trial"
HOW_TO_INSTALL = "pip install 'autoprune[cluster]'"

READS = {
    "get_study_id_from_name", "get_study_name_from_id", "get_study_directions", "get_study_user_attrs",
    "get_study_system_attrs", "get_all_studies", "get_trial_id_from_study_id_trial_number",
    "_get_best_trial_id", "get_trial", "_get_trials", "_get_stale_trial_ids",
}  # fmt: skip
WRITES = {
    "create_new_study", "delete_study", "set_study_user_attr", "set_study_system_attr", "_create_new_trial",
    "_set_trial_param", "set_trial_state_values", "set_trial_intermediate_value", "set_trial_user_attr",
    "set_trial_system_attr", "record_heartbeat",
}  # fmt: skip
# What SQLite says -> what to do about it.
REMEDIES = {
    "malformed": f"sqlite3 {DATABASE} .recover | sqlite3 NEW may save it; otherwise start a new run",
    "not a database": f"sqlite3 {DATABASE} .recover | sqlite3 NEW may save it; otherwise start a new run",
    "disk is full": f"make room on the disk that holds it; then {NEXT}",
    "disk I/O error": f"see whether its disk is full, over a quota, or failing (dmesg); then {NEXT}",
    "readonly": f"make the folder and its files writable; then {NEXT}",
    "unable to open": f"see that the folder is there and can be written; then {NEXT}",
    "locked": f"another program has held it for {BUSY_TIMEOUT_S} s: fuser {DATABASE} names it; then {NEXT}",
}

log = logging.getLogger("autoprune")


class Artifacts(Protocol):
    """What a run needs of an artifact store; Optuna's protocol."""

    def open_reader(self, artifact_id: str) -> BinaryIO: ...  # noqa: D102
    def write(self, artifact_id: str, content_body: BinaryIO) -> None: ...  # noqa: D102
    def remove(self, artifact_id: str) -> None: ...  # noqa: D102
    def names(self) -> list[str]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


def waiting(what: str, is_away: Callable[[BaseException], bool]) -> tenacity.Retrying:
    """Try again while something is away, less and less often, and say so once."""

    def tell(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            reason = str(state.outcome.exception()).splitlines() or ["no answer"]
            log.warning("%s is away (%s): waiting up to %d s", what, reason[0][:200], PATIENCE_S)

    return tenacity.Retrying(
        wait=tenacity.wait_random_exponential(multiplier=0.5, max=10),
        stop=tenacity.stop_after_delay(PATIENCE_S), retry=tenacity.retry_if_exception(is_away),
        before_sleep=tell, reraise=True,
    )  # fmt: skip


class PatientStorage(RDBStorage):
    """Optuna's RDB storage, which waits while the database is away.

    It counts heartbeats, but does not ask Optuna's own loop to make them: the run asks and tells by itself.
    """

    def get_heartbeat_interval(self) -> int | None:
        """None, so that `Study.ask` does not warn about a loop that is not used."""
        return None

    def stale_trial_ids(self, study: optuna.Study) -> list[int]:
        """Running trials that had a heartbeat once, and none for `GRACE_S` by the database's own clock."""
        return self._get_stale_trial_ids(study._study_id)


def _patient(name: str) -> Callable[..., Any]:
    plain = getattr(RDBStorage, name)

    @functools.wraps(plain)
    def method(self: PatientStorage, *args: Any, **kwargs: Any) -> Any:
        tries = 0

        def once() -> Any:
            nonlocal tries
            tries += 1
            try:
                return plain(self, *args, **kwargs)
            except (DuplicatedStudyError, UpdateFinishedTrialError, KeyError):
                if tries == 1 or not _was_done(self, name, args, kwargs):
                    raise
                return _DONE[name](self, *args)

        try:
            return waiting("the database", _database_is_away)(once)
        except (StorageInternalError, DBAPIError) as error:
            raise damaged(error, str(self.engine.url)) from error
        except ValueError as error:
            if name not in READS:  # what was to be written is wrong
                raise
            raise damaged(ValueError(f"malformed value ({error})"), str(self.engine.url)) from error

    return method


_DONE: dict[str, Callable[..., Any]] = {
    "create_new_study": lambda storage, directions, name: storage.get_study_id_from_name(name),
    "delete_study": lambda storage, study_id: None,
    "set_trial_state_values": lambda storage, trial_id, *rest: True,
}


def _was_done(storage: RDBStorage, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "set_trial_state_values":
        wanted = kwargs.get("state", args[1] if len(args) > 1 else None)
        return storage.get_trial(args[0]).state is wanted and wanted is not TrialState.FAIL
    return name in _DONE


for _name in READS | WRITES:
    setattr(PatientStorage, _name, _patient(_name))


def _database_is_away(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if not isinstance(cause, DBAPIError) or "sqlite3" in type(cause.orig).__module__:
        return False
    return isinstance(cause, OperationalError) or cause.connection_invalidated


def damaged(error: BaseException, where: str) -> AutopruneError:
    """What to tell people about a database that does not work."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    reason = str(getattr(cause, "orig", None) or cause).splitlines()[0]
    hint = next((remedy for words, remedy in REMEDIES.items() if words in reason), NEXT)
    return RunError(f"the run's database does not work: {reason} ({where})", hint)


def open_storage(place: Place) -> PatientStorage:
    """The database of a run; its tables are made where there are none.

    Raises:
        UsageError: PostgreSQL's driver is missing, or the database cannot be reached.
        RunError: the file is damaged.
    """
    try:
        return _opened(place)
    except ImportError:
        raise UsageError("PostgreSQL needs the package psycopg, which is missing", HOW_TO_INSTALL) from None
    except (DatabaseError, StorageInternalError) as error:
        if place.is_local:
            raise damaged(error, str(place)) from error
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise UsageError(
            f"{place} cannot be opened: {reason}",
            "see that it runs and can be reached, and that PGPASSWORD or ~/.pgpass is right",
        ) from None


@tenacity.retry(
    stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_random(0.05, 0.5), reraise=True,
    retry=tenacity.retry_if_exception(lambda e: _lost_the_race(e)),
)  # fmt: skip
def _opened(place: Place) -> PatientStorage:
    """Two processes that make the tables at the same time get in each other's way once."""
    options: dict[str, Any] = (
        {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
        if place.is_local
        else {"connect_args": {"connect_timeout": 10}, "pool_pre_ping": True}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = PatientStorage(
            place.url, engine_kwargs=options, heartbeat_interval=BEAT_S, grace_period=GRACE_S
        )
    if place.is_local:
        event.listen(storage.engine, "connect", _write_ahead)
        event.listen(storage.engine, "begin", _begin_immediate)
        storage.engine.dispose()  # the connection that made the tables knows neither listener
    return storage


def _lost_the_race(error: BaseException) -> bool:
    told = isinstance(error, OperationalError | ProgrammingError) and "already exists" in str(error)
    return told or isinstance(error, IntegrityError)


def _write_ahead(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself
    connection.execute("PRAGMA journal_mode=WAL")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def open_artifacts(where: str) -> Artifacts:
    """An artifact store: an `s3://` URL, or a folder that is made when something is written.

    Raises:
        UsageError: S3's client is missing.
        RunError: the bucket cannot be used.
    """
    return _Bucket(where) if where.startswith("s3://") else Folder(where)


class Folder(FileSystemArtifactStore):
    """A folder in which a file is there completely or not at all."""

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write beside, flush to the disk, and rename.

        Raises:
            RunError: the disk is full, or the folder is read-only.
        """
        path = self._get_filepath(artifact_id)
        beside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(content_body.read())
                file.flush()
                os.fsync(file.fileno())
            beside.replace(path)
        except OSError as error:
            with suppress(OSError):
                beside.unlink()
            raise RunError(
                f"a checkpoint cannot be written to {self._base_path}: {error.strerror}",
                f"make room there, or make it writable; {NEXT}",
            ) from error

    def names(self) -> list[str]:
        """All that is kept, half-written files of killed processes included."""
        return [p.name for p in self._base_path.iterdir()] if self._base_path.is_dir() else []

    def close(self) -> None:
        """Nothing is held open."""


class _Bucket:
    """A prefix in an S3 bucket, by Optuna's own store; its `Backoff` deletes ten times, so it is not used."""

    def __init__(self, url: str) -> None:
        try:
            import boto3
            from botocore.exceptions import NoCredentialsError
        except ImportError:
            raise UsageError(
                "an s3:// artifact store needs boto3, which is missing", HOW_TO_INSTALL
            ) from None
        from optuna.artifacts import Boto3ArtifactStore

        bucket, _, self._prefix = url.removeprefix("s3://").partition("/")
        self._url = url
        try:
            self._store = Boto3ArtifactStore(bucket, client=boto3.client("s3"))
            self._wait(lambda: self._store.client.head_bucket(Bucket=bucket))
        except (NoCredentialsError, ValueError) as error:
            raise self._refused(error) from None
        except RunError:
            self.close()
            raise

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """The whole content: a stream could break off half-way."""
        return io.BytesIO(self._wait(lambda: self._store.open_reader(self._key(artifact_id)).read()))

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """S3 shows an object once it is complete."""
        content = content_body.read()
        self._wait(lambda: self._store.write(self._key(artifact_id), io.BytesIO(content)))

    def remove(self, artifact_id: str) -> None:
        """Remove it, once."""
        self._wait(lambda: self._store.remove(self._key(artifact_id)))

    def names(self) -> list[str]:
        """All that is kept below the prefix."""
        pages = self._store.client.get_paginator("list_objects_v2")
        prefix = self._key("")
        found = self._wait(lambda: list(pages.paginate(Bucket=self._store.bucket, Prefix=prefix)))
        return [o["Key"].removeprefix(prefix) for page in found for o in page.get("Contents", ())]

    def close(self) -> None:
        """Let go of the connections."""
        self._store.client.close()

    def _key(self, artifact_id: str) -> str:
        return f"{self._prefix}/{artifact_id}" if self._prefix else artifact_id

    def _wait(self, call: Callable[[], Any]) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return waiting("the artifact store", _bucket_is_away)(call)
        except ArtifactNotFound:
            raise
        except (ClientError, BotoCoreError) as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> RunError:
        return RunError(
            f"{self._url} does not work: {error}",
            "see that the bucket exists, and that AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY (or ~/.aws) are right; {NEXT}",
        )


def _bucket_is_away(error: BaseException) -> bool:
    """No connection, or an answer that asks to come back; a refusal is final."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, ReadTimeoutError

    if isinstance(error, ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= 500
    return isinstance(error, ConnectionError | HTTPClientError | ReadTimeoutError)
