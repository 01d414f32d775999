"""The place where a run lives: a folder, or a PostgreSQL database with an S3-compatible artifact store.

`RUN` on the command line is a folder, or `postgresql://user@host/database#name`. A folder holds everything;
with a database the folder holds only files that can be made again (report, delivered file). Credentials
come from the environment or the clients' own files (PGPASSWORD, ~/.pgpass, AWS_*, ~/.aws) and are never
taken from a URL, so that no password gets into a process list or a record.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from autoprune.errors import UsageError

DATABASE = "study.sqlite3"
ARTIFACTS = "artifacts"
FORMS = "write a folder, or postgresql://user@host/database#name with the run's name after the #"
SECRETS = ("password", "passfile", "sslpassword")


@dataclass(frozen=True, kw_only=True)
class RunLocation:
    """The place where one run is kept.

    Attributes:
        folder: the folder of the files that people get; of everything where there is no `database`.
        database: a PostgreSQL URL without a password; None stands for SQLite in the folder.
        artifacts: `s3://bucket/prefix`, or a folder that all workers share; None: inside `folder`.
    """

    folder: Path
    database: str | None = None
    artifacts: str | None = None

    @property
    def url(self) -> str:
        """The URL with which SQLAlchemy opens the database."""
        if self.database is None:
            return f"sqlite:///{(self.folder / DATABASE).resolve()}"
        return (
            make_url(self.database).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
        )

    def checkpoints(self, name: str) -> str:
        """Return the place of the weights of the run `name`: an `s3://` URL or a folder."""
        return f"{self.artifacts}/{name}" if self.artifacts else str(self.folder / ARTIFACTS)

    @property
    def is_local(self) -> bool:
        """Whether the folder holds the whole run."""
        return self.database is None

    def __str__(self) -> str:
        return self.database or str(self.folder)


@dataclass(frozen=True, kw_only=True)
class RunReference:
    """A run that somebody named: its location, and its name where one was given."""

    location: RunLocation
    name: str | None


def parse_run(text: str, artifacts: str | None = None) -> RunReference:
    """Read `RUN`, the name of a run on the command line.

    Raises:
        UsageError: the text is no location, names no run, or holds a password.
    """
    if "://" not in text:
        return RunReference(
            location=RunLocation(folder=Path(text), artifacts=parse_artifact_url(artifacts)), name=None
        )
    address, _, name = text.partition("#")
    database = parse_database_url(address)
    if not name:
        raise UsageError(f"{database} names no run", f"write {database}#name")
    location = RunLocation(
        folder=Path("runs") / name, database=database, artifacts=parse_artifact_url(artifacts)
    )
    return RunReference(location=location, name=name)


def parse_database_url(text: str) -> str:
    """Read a PostgreSQL URL without secrets.

    Raises:
        UsageError: the text is no such URL, or holds a password.
    """
    try:
        url = make_url(text)
    except (ArgumentError, ValueError):
        raise UsageError("the storage is no database URL", FORMS) from None
    _refuse_secrets(url)
    if url.get_backend_name() != "postgresql":
        raise UsageError(f"the storage {url.get_backend_name()}:// is not supported", FORMS)
    return url.set(drivername="postgresql").render_as_string()


def parse_artifact_url(text: str | None) -> str | None:
    """Read an `s3://bucket/prefix` URL or a folder.

    Raises:
        UsageError: the text is another URL.
    """
    if text is None or "://" not in text:
        return None if text is None else str(Path(text).absolute())
    scheme, _, rest = text.partition("://")
    bucket = rest.partition("/")[0]
    if scheme != "s3" or not bucket or "@" in bucket or "?" in rest:
        raise UsageError(
            f"--artifacts {scheme}:// is not understood",
            "write s3://bucket/prefix or a folder; the endpoint and the keys come from AWS_ENDPOINT_URL_S3, "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or ~/.aws",
        )
    return text.rstrip("/")


def _refuse_secrets(url: URL) -> None:
    if url.password is not None or set(url.query) & set(SECRETS):
        raise UsageError(
            "the storage's URL holds a password, which every process list would show",
            "leave it out, and set PGPASSWORD or write it into ~/.pgpass (mode 0600)",
        )
