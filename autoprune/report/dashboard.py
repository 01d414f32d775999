"""`autoprune dashboard`: optuna-dashboard over any number of runs, on this machine alone, to look at.

The runs are read again while they go on; nothing that is clicked reaches them (`view_storage`). The server
has no users and no passwords, so it listens on the loopback address, answers only to its names, and takes no
request that would change something.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import TYPE_CHECKING, Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import optuna

from autoprune.errors import AutopruneError, UsageError
from autoprune.location import DATABASE, RunLocation, RunReference, parse_database_url, parse_run
from autoprune.report.campaign_view import Campaign, views
from autoprune.report.view_storage import StudyView, ViewArtifacts, ViewStorage
from autoprune.search import read_run
from autoprune.storage import BASELINE, RunStore, quiet_optuna, read_run_header, suggest_run

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

HOST = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost")
PORT = 8080
TRIED_PORTS = 50
DEPTH = 3  # folders below the given one in which runs are looked for: runs/sweep/study/


@dataclass(frozen=True, kw_only=True)
class ShownRun:
    """A run in the list."""

    label: str
    location: RunLocation
    name: str


def find_runs(text: str) -> list[ShownRun]:
    """The runs that `text` names: a run's folder, a folder of runs, or a database with runs in it.

    Raises:
        UsageError: there is none.
    """
    found = _in_database(text) if "://" in text else _in_folders(Path(text))
    if not found:
        hint = (
            "name a database with runs in it"
            if "://" in text
            else f"{suggest_run(Path(text))} A folder above will do"
        )
        raise UsageError(f"there is no run in {text}", hint)
    return found


def _in_folders(folder: Path) -> list[ShownRun]:
    levels = ("/".join(["*"] * depth + [DATABASE]) for depth in range(DEPTH + 1))
    files = [f for level in levels for f in sorted(folder.glob(level))]
    locations = [RunLocation(folder=f.parent) for f in sorted(files, key=lambda f: f.stat().st_mtime)]
    return [
        ShownRun(label=location.folder.resolve().name, location=location, name=name)
        for location in locations
        for name in _names(location)
    ]


def _in_database(text: str) -> list[ShownRun]:
    address, _, wanted = text.partition("#")
    database = parse_database_url(address)
    names = _names(RunLocation(folder=Path(), database=database))
    return [
        ShownRun(label=n, location=parse_run(f"{database}#{n}").location, name=n)
        for n in names
        if not wanted or n == wanted
    ]


def _names(location: RunLocation) -> list[str]:
    """The runs in a storage; one that has not begun yet is none."""
    from autoprune.storage import open_storage

    with quiet_optuna(), suppress(AutopruneError):
        storage = open_storage(location)
        try:
            names = [s.study_name for s in storage.get_all_studies()]
        finally:
            storage.remove_session()
            storage.engine.dispose()
        return [n.removesuffix(BASELINE) for n in names if n.endswith(BASELINE)]
    return []


class Gallery:
    """All runs that `text` names, read again where their storage has changed."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._seen: dict[str, tuple[float, list[StudyView]]] = {}
        self.storage = ViewStorage(self._look)

    def _look(self) -> list[StudyView]:
        return [view for run in find_runs(self._text) for view in self._views(run)]

    def _views(self, run: ShownRun) -> list[StudyView]:
        key, changed = f"{run.location}#{run.name}", _last_change(run.location)
        known = self._seen.get(key)
        if known is None or known[0] != changed:
            with suppress(AutopruneError, KeyError):  # a study that is just being made
                known = self._seen[key] = (changed, read_views(run, self._link))
        return known[1] if known else []

    def _link(self, key: str) -> str:
        return f"/dashboard/studies/{self.storage.id_of(key)}"


def read_views(run: ShownRun, link: Callable[[str], str]) -> list[StudyView]:
    """A run's studies as they are to be seen."""
    with quiet_optuna(), closing(RunStore(run.location, run.name)) as store:
        record = read_run(store)
        trials = {
            name.removeprefix(f"{run.name}/"): optuna.load_study(
                study_name=name, storage=store.storage
            ).get_trials(deepcopy=False)
            for name in optuna.get_all_study_names(store.storage)
            if name.startswith(f"{run.name}/")
        }
    return views(
        Campaign(
            label=run.label, record=record, trials=trials, link=link,
            plan_of=lambda artifact: _plan(run, artifact),
        )
    )  # fmt: skip


def _plan(run: ShownRun, artifact: str) -> bytes:
    try:
        location = read_run_header(
            RunReference(location=run.location, name=run.name)
        ).location  # it knows where the checkpoints are
        with quiet_optuna(), closing(RunStore(location, run.name)) as store:
            return store.load_checkpoint(artifact).plan.to_json().encode()
    except AutopruneError as error:  # encrypted, away, or forgotten after the decision
        return json.dumps({"unavailable": error.message}).encode()


def _last_change(location: RunLocation) -> float:
    """When a folder's database was written; another database is asked every time."""
    if not location.is_local:
        return time.monotonic()
    files = (location.folder / name for name in (DATABASE, f"{DATABASE}-wal"))
    return max((f.stat().st_mtime for f in files if f.exists()), default=0.0)


def application(gallery: Gallery) -> WSGIApplication:
    """The dashboard, read-only and for this machine's own names."""
    import optuna_dashboard

    inner: WSGIApplication = optuna_dashboard.wsgi(
        gallery.storage, artifact_store=ViewArtifacts(gallery.storage)
    )

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
    def log_message(self, *given: Any) -> None:
        """No line for each request."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Dashboard:
    """A server that is bound, and answers once `serve` is called."""

    server: WSGIServer
    runs: Sequence[ShownRun]

    @property
    def address(self) -> str:
        """What to type into a browser on this machine."""
        return f"http://{HOST}:{self.server.server_port}/dashboard"

    def serve(self) -> None:
        """Answer until interrupted."""
        with suppress(KeyboardInterrupt):
            self.server.serve_forever()
        self.server.server_close()

    def serve_beside(self) -> threading.Thread:
        """Answer on a thread of its own, until `server.shutdown`."""
        thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        thread.start()
        return thread


def open_dashboard(text: str, port: int | None = None) -> Dashboard:
    """Bind a server for the runs that `text` names: to `port`, or to the first free one from 8080 on.

    Raises:
        UsageError: there is no run, or the port is taken.
    """
    runs = find_runs(text)
    app = application(Gallery(text))
    for candidate in [port] if port is not None else range(PORT, PORT + TRIED_PORTS):
        with suppress(OSError):
            server = make_server(HOST, candidate, app, server_class=_Server, handler_class=_Silent)
            return Dashboard(server=server, runs=runs)
    taken = f"port {port} is" if port is not None else f"ports {PORT} to {PORT + TRIED_PORTS - 1} are"
    raise UsageError(f"{taken} taken on {HOST}", "choose another with --port; 0 takes any that is free")
