"""Files that are written whole or not at all: under another name in the same folder, then renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from autoprune.errors import ArtifactError

Buffer = bytes | bytearray | memoryview

BUFFER = 1 << 17  # of streams: age comes in pieces of 8 KiB; a tenth more speed (measured: docs/log.md)
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


@contextmanager
def atomic_write(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """Open a stream that becomes the file `path` when the block ends well, and leaves nothing otherwise.

    An earlier file is replaced in one step, so no reader sees half of it. The content is flushed to the
    disk before the renaming: a crash leaves the old file or the new one.

    Args:
        path: the file, in a folder that exists.
        private: whether only the owner can read the file; otherwise the process's umask says who can.

    Raises:
        OSError: the folder cannot be written, or the disk is full.
    """
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    handle = os.open(part, NEW_FILE, 0o600 if private else 0o666)
    try:
        with os.fdopen(handle, "wb", buffering=BUFFER) as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    except BaseException:
        with suppress(OSError):
            part.unlink()
        raise


@contextmanager
def write_private(path: Path) -> Iterator[BinaryIO]:
    """Open a stream for a delivered file: `atomic_write` for the owner alone, with errors for people.

    Raises:
        ArtifactError: the folder cannot be written, the disk is full, or the block raises an `OSError`.
    """
    try:
        with atomic_write(path, private=True) as stream:
            yield stream
    except OSError as error:
        raise ArtifactError(
            f"cannot write {path}: {error.strerror}", "free some space, or choose a folder you can write"
        ) from None


def write_chunks(path: Path, chunks: Iterable[Buffer]) -> None:
    """Write a delivered file from pieces.

    Raises:
        ArtifactError: the file cannot be written, see `write_private`.
    """
    with write_private(path) as stream:
        for chunk in chunks:
            stream.write(chunk)
