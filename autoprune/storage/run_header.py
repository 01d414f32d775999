"""The header of a run: how it was started, for those who join the run or look at it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoprune.errors import UsageError
from autoprune.location import RunLocation, RunReference
from autoprune.storage.database import close_storage, open_storage
from autoprune.storage.run_store import BASELINE, run_name_at, run_names_at


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """How a run was started, as its baseline study says.

    Attributes:
        location: of the run, with the artifact store that it was started with unless another one was given.
        command: the command line that started it; empty for a run that was started from Python.
        sources: SHA-256 of the files that the command names.
    """

    location: RunLocation
    name: str
    command: str
    sources: dict[str, str]


def read_run_header(run: RunReference) -> RunHeader:
    """Read how a run was started.

    Raises:
        UsageError: there is no such run, or its original is not measured yet.
    """
    name = run.name or run_name_at(run.location)
    if name not in run_names_at(run.location):
        raise UsageError(
            f"{run.location} holds no run {name!r} that has measured its baseline", "start it, or wait for it"
        )
    storage = open_storage(run.location)
    try:
        attributes = storage.get_study_user_attrs(storage.get_study_id_from_name(f"{name}{BASELINE}"))
    finally:
        close_storage(storage)
    artifacts = run.location.artifacts or attributes.get("artifacts")
    return RunHeader(
        location=replace(run.location, artifacts=artifacts),
        name=name,
        command=attributes["command"],
        sources=attributes.get("sources", {}),
    )
