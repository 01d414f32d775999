"""How a run was started, as its baseline study tells it, for those who join the run or look at it."""

from __future__ import annotations

from dataclasses import dataclass, replace

from autoprune.errors import UsageError
from autoprune.location import Place, Run
from autoprune.storage.retry import open_storage
from autoprune.storage.run_store import BASELINE, name_in, names_in


@dataclass(frozen=True, kw_only=True)
class RunHeader:
    """How a run was started, as its baseline tells it.

    Attributes:
        place: where the run is, with the artifact store that it was started with unless another was given.
        sources: SHA-256 of the files that the command names.
    """

    place: Place
    name: str
    command: str
    sources: dict[str, str]


def read_run_header(run: Run) -> RunHeader:
    """Read how a run was started.

    Raises:
        UsageError: there is no such run, or its original is not measured yet.
    """
    name = run.name or name_in(run.place)
    if name not in names_in(run.place):
        raise UsageError(
            f"{run.place} holds no run {name!r} that has measured its baseline", "start it, or wait for it"
        )
    storage = open_storage(run.place)
    try:
        known = storage.get_study_user_attrs(storage.get_study_id_from_name(f"{name}{BASELINE}"))
    finally:
        storage.remove_session()
        storage.engine.dispose()
    return RunHeader(
        place=replace(run.place, artifacts=run.place.artifacts or known.get("artifacts")), name=name,
        command=known["command"], sources=known.get("sources", {}),
    )  # fmt: skip
