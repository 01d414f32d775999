"""The database of a run: Optuna's RDB storage, whose operations are repeated while the database is away.

An operation that failed may have been carried out all the same, only its answer was lost. The repetition then
finds that the study exists, or that the trial is finished, and counts that as done.

SQLite as Optuna opens it gives one enqueued trial to two workers, and gives up on a busy database after five
seconds. A write-ahead log, `BEGIN IMMEDIATE` and a timeout of a minute mend both. Every commit is flushed to
the disk (`synchronous=FULL`, SQLite's default), so that a decision is on the disk before the checkpoints that
it makes superfluous are removed.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import optuna
import tenacity
from optuna.exceptions import DuplicatedStudyError, StorageInternalError, UpdateFinishedTrialError
from optuna.storages import RDBStorage
from optuna.trial import TrialState
from sqlalchemy import Connection, event
from sqlalchemy.exc import DatabaseError, DBAPIError, IntegrityError, OperationalError, ProgrammingError

from autoprune.errors import AutopruneError, RunError, UsageError
from autoprune.location import DATABASE, RunLocation
from autoprune.storage.optuna_private import READS, WRITES
from autoprune.storage.retry import INSTALL_HINT, RESUME_HINT, retrying

BUSY_TIMEOUT_S = 60
HEARTBEAT_S = 10  # between two heartbeats of a process that works on the run; a guess
GRACE_PERIOD_S = 90  # a process without a heartbeat for so long counts as dead: nine missed ones; a guess

# A part of SQLite's message -> what to do about it.
REMEDIES = {
    "malformed": f"sqlite3 {DATABASE} .recover | sqlite3 NEW may save it; otherwise start a new run",
    "not a database": f"sqlite3 {DATABASE} .recover | sqlite3 NEW may save it; otherwise start a new run",
    "disk is full": f"make room on the disk that holds it; then {RESUME_HINT}",
    "disk I/O error": f"see whether its disk is full, over a quota, or failing (dmesg); then {RESUME_HINT}",
    "readonly": f"make the folder and its files writable; then {RESUME_HINT}",
    "unable to open": f"see that the folder is there and can be written; then {RESUME_HINT}",
    "locked": f"another program has held it for {BUSY_TIMEOUT_S} s: fuser {DATABASE} names it; "
    f"then {RESUME_HINT}",
}


def _repeat_while_away(storage_class: type[RetryingStorage]) -> type[RetryingStorage]:
    """Give every operation of `RDBStorage` that reaches the database to `_retry`."""
    for name in READS | WRITES:
        setattr(storage_class, name, _retry(name))
    return storage_class


def _retry(name: str) -> Callable[..., Any]:
    operation = getattr(RDBStorage, name)

    @functools.wraps(operation)
    def method(self: RetryingStorage, *args: Any, **kwargs: Any) -> Any:
        attempts = 0

        def attempt() -> Any:
            nonlocal attempts
            attempts += 1
            try:
                return operation(self, *args, **kwargs)
            except (DuplicatedStudyError, UpdateFinishedTrialError, KeyError):
                if attempts == 1 or not _is_done(self, name, args, kwargs):
                    raise
                return _ANSWERS[name](self, *args, **kwargs)

        try:
            return retrying("the database", _is_away)(attempt)
        except (StorageInternalError, DBAPIError) as error:
            raise _database_error(error, str(self.engine.url)) from error
        except ValueError as error:
            if name not in READS:  # the value that was to be written is wrong
                raise
            malformed = ValueError(f"malformed value ({error})")
            raise _database_error(malformed, str(self.engine.url)) from error

    return method


# What an operation returns whose earlier attempt was carried out though its answer was lost.
_ANSWERS: dict[str, Callable[..., Any]] = {
    "create_new_study": lambda storage, directions, study_name: storage.get_study_id_from_name(study_name),
    "delete_study": lambda storage, study_id: None,
    "set_trial_state_values": lambda storage, trial_id, state, values=None: True,
}


def _is_done(storage: RDBStorage, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name == "set_trial_state_values":
        state = kwargs.get("state", args[1] if len(args) > 1 else None)
        # A trial that another process failed meanwhile was not finished by this one.
        return storage.get_trial(args[0]).state is state and state is not TrialState.FAIL
    return name in _ANSWERS


@_repeat_while_away
class RetryingStorage(RDBStorage):
    """Optuna's RDB storage, which waits while the database is away.

    It is made with a heartbeat interval, so that the tables for heartbeats exist, but reports none: Optuna
    warns about heartbeats outside `Study.optimize`, and a run records its own (`membership`).
    """

    def get_heartbeat_interval(self) -> int | None:
        """Return None, so that `Study.ask` does not warn about a loop that is not used."""
        return None


def open_storage(location: RunLocation) -> RetryingStorage:
    """Open the database of a run; its tables are created where there are none.

    Raises:
        UsageError: PostgreSQL's driver is missing, or the database cannot be reached.
        RunError: the file is damaged.
    """
    try:
        return _open(location)
    except ImportError:
        raise UsageError("PostgreSQL needs the package psycopg, which is missing", INSTALL_HINT) from None
    except (DatabaseError, StorageInternalError) as error:
        if location.is_local:
            raise _database_error(error, str(location)) from error
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        raise UsageError(
            f"{location} cannot be opened: {reason}",
            "see that it runs and can be reached, and that PGPASSWORD or ~/.pgpass is right",
        ) from None


def close_storage(storage: RetryingStorage) -> None:
    """Close all connections to the database."""
    storage.remove_session()
    storage.engine.dispose()


def _is_away(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if not isinstance(cause, DBAPIError) or "sqlite3" in type(cause.orig).__module__:
        return False
    return isinstance(cause, OperationalError) or cause.connection_invalidated


def _database_error(error: BaseException, url: str) -> AutopruneError:
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    reason = str(getattr(cause, "orig", None) or cause).splitlines()[0]
    hint = next((remedy for words, remedy in REMEDIES.items() if words in reason), RESUME_HINT)
    return RunError(f"the run's database does not work: {reason} ({url})", hint)


# Two processes that create the tables at the same time get in each other's way once.
@tenacity.retry(
    stop=tenacity.stop_after_attempt(5), wait=tenacity.wait_random(0.05, 0.5), reraise=True,
    retry=tenacity.retry_if_exception(lambda e: _lost_creation_race(e)),
)  # fmt: skip
def _open(location: RunLocation) -> RetryingStorage:
    options: dict[str, Any] = (
        {"connect_args": {"timeout": BUSY_TIMEOUT_S}}
        if location.is_local
        else {"connect_args": {"connect_timeout": 10}, "pool_pre_ping": True}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        storage = RetryingStorage(
            location.url, engine_kwargs=options, heartbeat_interval=HEARTBEAT_S, grace_period=GRACE_PERIOD_S
        )
    if location.is_local:
        event.listen(storage.engine, "connect", _write_ahead)
        event.listen(storage.engine, "begin", _begin_immediate)
        storage.engine.dispose()  # the connection that created the tables has neither listener
    return storage


def _lost_creation_race(error: BaseException) -> bool:
    exists = isinstance(error, OperationalError | ProgrammingError) and "already exists" in str(error)
    return exists or isinstance(error, IntegrityError)


def _write_ahead(connection: Any, record: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions by itself
    connection.execute("PRAGMA journal_mode=WAL")


def _begin_immediate(connection: Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")
