"""A file is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from autoprune.errors import ArtifactError
from autoprune.files import atomic_write, write_chunks, write_private


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")

    def chunks() -> object:
        yield b"new"
        raise OSError(28, "No space left on device")

    with pytest.raises(ArtifactError, match="No space left"):
        write_chunks(target, chunks())  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt), write_private(target):
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert target.read_bytes() == b"old"


def test_an_unwritable_folder_is_an_error_for_people(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot write"):
        write_chunks(tmp_path / "missing" / "out", [b""])


def test_who_can_read_a_file_is_as_asked(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        with atomic_write(tmp_path / "open") as stream:
            stream.write(b"a")
        write_chunks(tmp_path / "private", [b"b", b"c"])
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in tmp_path.iterdir()}
    assert modes == {"open": 0o644, "private": 0o600}
    assert (tmp_path / "private").read_bytes() == b"bc"


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.write_bytes(b"old")
    with atomic_write(target) as stream:
        stream.write(b"new")
        stream.flush()
        assert target.read_bytes() == b"old"
    assert target.read_bytes() == b"new"
