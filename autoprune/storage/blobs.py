"""The artifact store of a run, a folder or a bucket: checkpoints as blobs whose names pin their content."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from optuna.artifacts import FileSystemArtifactStore
from optuna.artifacts.exceptions import ArtifactNotFound

from autoprune.errors import RunError, UsageError
from autoprune.files import atomic_write
from autoprune.storage.retry import INSTALL_HINT, RESUME_HINT, retrying


class BlobStore(Protocol):
    """What a run needs of an artifact store: Optuna's protocol, and a list of names."""

    def open_reader(self, artifact_id: str) -> BinaryIO: ...  # noqa: D102
    def write(self, artifact_id: str, content_body: BinaryIO) -> None: ...  # noqa: D102
    def remove(self, artifact_id: str) -> None: ...  # noqa: D102
    def names(self) -> list[str]: ...  # noqa: D102
    def close(self) -> None: ...  # noqa: D102


def open_blobs(where: str) -> BlobStore:
    """Open an artifact store: an `s3://` URL, or a folder that is made when something is written.

    Raises:
        UsageError: S3's client is missing.
        RunError: the bucket cannot be used.
    """
    return BucketBlobs(where) if where.startswith("s3://") else FolderBlobs(where)


class FolderBlobs(FileSystemArtifactStore):
    """A folder in which a file is there completely or not at all."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        self.folder = Path(folder)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write a file whole or not at all.

        Raises:
            RunError: the disk is full, or the folder is read-only.
        """
        path = self.folder / artifact_id  # names are digests of our own
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as file:
                file.write(content_body.read())
        except OSError as error:
            raise RunError(
                f"a checkpoint cannot be written to {self.folder}: {error.strerror}",
                f"make room there, or make it writable; {RESUME_HINT}",
            ) from error

    def names(self) -> list[str]:
        """Return the names of all files, the unfinished ones of killed processes included."""
        return [p.name for p in self.folder.iterdir()] if self.folder.is_dir() else []

    def close(self) -> None:
        """Do nothing: a folder holds nothing open."""


class BucketBlobs:
    """A prefix in an S3 bucket, by Optuna's own store.

    Optuna's `Backoff` is not used: it repeats a deletion ten times.
    """

    def __init__(self, url: str) -> None:
        try:
            import boto3
            from botocore.exceptions import NoCredentialsError
        except ImportError:
            raise UsageError("an s3:// artifact store needs boto3, which is missing", INSTALL_HINT) from None
        from optuna.artifacts import Boto3ArtifactStore

        bucket, _, self._prefix = url.removeprefix("s3://").partition("/")
        self._url = url
        try:
            self._store = Boto3ArtifactStore(bucket, client=boto3.client("s3"))
            self._call(lambda: self._store.client.head_bucket(Bucket=bucket))
        except (NoCredentialsError, ValueError) as error:
            raise self._error(error) from None
        except RunError:
            self.close()
            raise

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """Return the whole content: a stream could break off half-way."""
        return io.BytesIO(self._call(lambda: self._store.open_reader(self._key(artifact_id)).read()))

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """Write an object; S3 shows it once it is complete."""
        content = content_body.read()
        self._call(lambda: self._store.write(self._key(artifact_id), io.BytesIO(content)))

    def remove(self, artifact_id: str) -> None:
        """Remove an object."""
        self._call(lambda: self._store.remove(self._key(artifact_id)))

    def names(self) -> list[str]:
        """Return the names of all objects below the prefix."""
        paginator = self._store.client.get_paginator("list_objects_v2")
        prefix = self._key("")
        pages = self._call(lambda: list(paginator.paginate(Bucket=self._store.bucket, Prefix=prefix)))
        return [o["Key"].removeprefix(prefix) for page in pages for o in page.get("Contents", ())]

    def close(self) -> None:
        """Close the connections."""
        self._store.client.close()

    def _key(self, artifact_id: str) -> str:
        return f"{self._prefix}/{artifact_id}" if self._prefix else artifact_id

    def _call(self, operation: Callable[[], Any]) -> Any:
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            return retrying("the artifact store", _is_away)(operation)
        except ArtifactNotFound:
            raise
        except (ClientError, BotoCoreError) as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> RunError:
        return RunError(
            f"{self._url} does not work: {error}",
            "see that the bucket exists, and that AWS_ENDPOINT_URL_S3, AWS_ACCESS_KEY_ID and "
            f"AWS_SECRET_ACCESS_KEY (or ~/.aws) are right; {RESUME_HINT}",
        )


def _is_away(error: BaseException) -> bool:
    """Return whether there was no connection, or an answer that asks to come back; a refusal is final."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, ReadTimeoutError

    if isinstance(error, ClientError):
        return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)) >= 500
    return isinstance(error, ConnectionError | HTTPClientError | ReadTimeoutError)
