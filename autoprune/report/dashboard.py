"""The server of `autoprune dashboard`: optuna-dashboard over any number of runs, read-only, loopback only.

The studies of a run hold what is shown (`annotations`); this module serves them. Optuna's private
`FrozenStudy._study_id` is set here, because a storage gives its studies their ids. The server has no users
and no passwords, so it listens on the loopback address, answers only to its names, and takes no request
that would change something.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any, NoReturn
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from optuna.storages import BaseStorage

from autoprune.errors import AutopruneError, UsageError
from autoprune.location import DATABASE, RunLocation, parse_database_url
from autoprune.report.annotations import SUMMARY
from autoprune.storage import (
    PROCESSES,
    FrozenStudy,
    frozen_study_id,
    open_storage,
    quiet_optuna,
    renamed_study,
    run_names_at,
    suggest_run,
)

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

    from optuna.study import StudyDirection
    from optuna.trial import FrozenTrial, TrialState

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")
PORT = 8080
TRIED_PORTS = 50
DEPTH = 3  # levels below the given folder that are searched for runs: runs/SWEEP/JOB is the deepest


@dataclass(frozen=True, kw_only=True)
class Source:
    """A storage that holds one or more runs.

    Attributes:
        label: the name that the list shows for the run; None where the storage may hold several runs,
            each shown under its own name.
        name: the only run to show; None shows all.
        version: a number that differs where another database took the location of an earlier one.
    """

    location: RunLocation
    label: str | None = None
    name: str | None = None
    version: int = 0


def find_sources(text: str) -> list[Source]:
    """Return the storages that `text` names: a run's folder, a folder of runs, or a database."""
    if "://" in text:
        address, _, name = text.partition("#")
        return [
            Source(
                location=RunLocation(folder=Path(), database=parse_database_url(address)), name=name or None
            )
        ]
    folder = Path(text)
    levels = ("/".join(["*"] * depth + [DATABASE]) for depth in range(DEPTH + 1))
    files = [(f, f.stat()) for level in levels for f in folder.glob(level)]
    return [
        Source(
            location=RunLocation(folder=file.parent), label=_label(file.parent, folder), version=stat.st_ino
        )
        for file, stat in sorted(files, key=lambda f: f[1].st_mtime)
    ]


def _label(run: Path, folder: Path) -> str:
    return folder.resolve().name if run == folder else str(run.relative_to(folder))


def find_labels(text: str) -> list[str]:
    """Return the names under which the list shows the runs that `text` names.

    Raises:
        UsageError: there is no run.
    """
    labels = [source.label or name for source in find_sources(text) for name in _names(source)]
    if not labels:
        hint = f"{suggest_run(Path(text))} A folder above will do"
        raise UsageError(
            f"there is no run in {text}", "name a database with runs in it" if "://" in text else hint
        )
    return labels


def _names(source: Source) -> list[str]:
    """Return the names of the runs in a storage: none where it is damaged or just being made."""
    with quiet_optuna(), suppress(AutopruneError):
        return [name for name in run_names_at(source.location) if source.name in (None, name)]
    return []


class RunsStorage(BaseStorage):
    """The studies of several runs as one read-only Optuna storage, which refuses every change.

    Each run keeps its own storage. Studies are numbered in the order in which they are first seen, and the
    name of a study ends in its summary.

    Args:
        find: returns the storages that exist at this moment; a new one is opened when it is first read.
    """

    def __init__(self, find: Callable[[], Sequence[Source]]) -> None:
        self._find = find
        self._lock = threading.Lock()
        self._storages: dict[Source, BaseStorage] = {}
        self._ids: dict[tuple[Source, int], int] = {}  # storage and id there -> id here

    def _open(self, source: Source) -> BaseStorage:
        with self._lock, quiet_optuna():
            if source not in self._storages:
                self._storages[source] = open_storage(source.location)
            return self._storages[source]

    def _own(self, study_id: int) -> tuple[BaseStorage, int]:
        with self._lock:
            sources = list(self._ids)
        if not 0 < study_id <= len(sources):
            raise KeyError(study_id)
        source, own_id = sources[study_id - 1]
        return self._open(source), own_id

    def get_all_studies(self) -> list[FrozenStudy]:
        """Return all studies, run by run, without those that list a run's processes."""
        studies: list[FrozenStudy] = []
        for source in self._find():
            with suppress(AutopruneError):  # a database that is damaged or just being made
                studies += self._labelled(source)
        return studies

    def _labelled(self, source: Source) -> Iterator[FrozenStudy]:
        for study in self._open(source).get_all_studies():
            run, _, part = study.study_name.partition("/")
            if part != PROCESSES and source.name in (None, run):
                summary = study.user_attrs.get(SUMMARY, "")
                name = f"{source.label or run}/{part}  {summary}".rstrip()
                with self._lock:
                    number = self._ids.setdefault((source, frozen_study_id(study)), len(self._ids) + 1)
                yield renamed_study(study, name, number)

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return the id of the study that has this name now."""
        for study in self.get_all_studies():
            if study.study_name == study_name:
                return frozen_study_id(study)
        raise KeyError(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        """Return the name that the study has now."""
        for study in self.get_all_studies():
            if frozen_study_id(study) == study_id:
                return study.study_name
        raise KeyError(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Return the study's directions as its own storage has them."""
        storage, own_id = self._own(study_id)
        return storage.get_study_directions(own_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Return the study's user attributes as its own storage has them."""
        storage, own_id = self._own(study_id)
        return storage.get_study_user_attrs(own_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return the study's system attributes, its note and figures among them, from its own storage."""
        storage, own_id = self._own(study_id)
        return storage.get_study_system_attrs(own_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the study's trials as its own storage holds them, with the ids that they have there."""
        storage, own_id = self._own(study_id)
        return storage.get_all_trials(own_id, deepcopy=deepcopy, states=states)

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise UsageError("the dashboard shows runs and changes none", "use the autoprune command")

    get_trial = _refuse  # a trial's id is not unique here, and no page asks by it
    create_new_study = delete_study = set_study_user_attr = set_study_system_attr = _refuse
    create_new_trial = set_trial_param = set_trial_state_values = set_trial_intermediate_value = _refuse
    set_trial_user_attr = set_trial_system_attr = _refuse


def application(text: str) -> WSGIApplication:
    """Return the dashboard over the runs that `text` names, read-only and for this machine's own names."""
    import optuna_dashboard

    inner: WSGIApplication = optuna_dashboard.wsgi(RunsStorage(lambda: find_sources(text)))

    def guarded(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        host = str(environ.get("HTTP_HOST", "")).rpartition(":")
        if (host[0] or host[2]) not in NAMES:  # another site's name that was made to point here
            return _refused(start, "421 Misdirected Request", "ask for localhost")
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            return _refused(start, "403 Forbidden", "the dashboard shows runs and changes none")
        return inner(environ, start)

    return guarded


def _refused(start: StartResponse, status: str, reason: str) -> list[bytes]:
    body = f'{{"reason": "{reason}"}}'.encode()
    start(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
    return [body]


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Silent(WSGIRequestHandler):
    def log_message(self, *args: Any) -> None:
        """Do nothing: a line for each request would hide what the command prints."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dashboard:
    """A server that is bound to a port and answers once `serve` is called; `runs` are the runs it shows."""

    server: WSGIServer
    runs: Sequence[str]

    @property
    def address(self) -> str:
        """The address to open in a browser on this machine."""
        return f"http://{HOST}:{self.server.server_port}/dashboard"

    def serve(self) -> None:
        """Answer requests until the process is interrupted."""
        with suppress(KeyboardInterrupt):
            self.server.serve_forever()
        self.server.server_close()

    def serve_beside(self) -> threading.Thread:
        """Answer requests on a thread of its own until `server.shutdown` is called."""
        thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        thread.start()
        return thread


def open_dashboard(text: str, port: int | None = None) -> Dashboard:
    """Bind a server for the runs that `text` names: to `port`, or to the first free one from 8080 on.

    Raises:
        UsageError: there is no run, or the port is taken.
    """
    runs = find_labels(text)
    app = application(text)
    for candidate in [port] if port is not None else range(PORT, PORT + TRIED_PORTS):
        with suppress(OSError):
            server = make_server(HOST, candidate, app, server_class=_Server, handler_class=_Silent)
            return Dashboard(server=server, runs=runs)
    ports = f"port {port} is" if port is not None else f"ports {PORT} to {PORT + TRIED_PORTS - 1} are"
    raise UsageError(f"{ports} taken on {HOST}", "choose another with --port; 0 takes any that is free")
