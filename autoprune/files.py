"""Files that are written whole or not at all: beside their place under another name, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from autoprune.errors import ArtifactError

Buffer = bytes | bytearray | memoryview

BUFFER = 1 << 17  # of streams: age comes in pieces of 8 KiB; a tenth more speed (measured: docs/log.md)


@contextmanager
def write_beside(path: Path) -> Iterator[BinaryIO]:
    """A stream that becomes the file `path` when the block ends well, and leaves nothing otherwise.

    It is written next to `path` under another name, flushed and renamed; only its owner can read it.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror}", "choose a folder you can write"
        ) from None
    part = Path(name)
    try:
        with os.fdopen(handle, "wb", buffering=BUFFER) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ArtifactError(
            f"cannot write {path}: {error.strerror}", "free some space or choose another place"
        ) from None
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_chunks(path: Path, chunks: Iterable[Buffer]) -> None:
    """Write a file whole or not at all."""
    with write_beside(path) as stream:
        for chunk in chunks:
            stream.write(chunk)
