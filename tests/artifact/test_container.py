"""The container can be read in one way only; everything else is refused."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.artifact.container import (
    TAIL_BYTES,
    Container,
    check_name,
    container_chunks,
)
from autoprune.errors import ArtifactError

MEMBERS = {"manifest.json": b"{}", "a/b.bin": bytes(range(256)) * 9, "empty": b""}


def made(members: dict[str, bytes]) -> bytes:
    return b"".join(container_chunks(members.items()))


def read(data: bytes, max_entries: int = 8) -> dict[str, bytes]:
    container = Container(io.BytesIO(data), max_entries=max_entries)
    assert all(b"".join(container.chunks(n)) == container.read(n) for n in container.entries)
    return {name: container.read(name) for name in container.entries}


def test_what_is_written_is_read() -> None:
    assert read(made(MEMBERS)) == MEMBERS
    assert read(made({})) == {}


def test_other_zip_readers_agree(tmp_path: Path) -> None:
    file = tmp_path / "c.zip"
    file.write_bytes(made(MEMBERS))
    with zipfile.ZipFile(file) as archive:
        assert archive.testzip() is None
        assert {n: archive.read(n) for n in archive.namelist()} == MEMBERS
        assert all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
    if shutil.which("unzip"):
        subprocess.run(["unzip", "-tq", file], check=True, capture_output=True)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8})?", fullmatch=True), st.binary(max_size=300), max_size=6
    )
)
def test_any_members_survive(members: dict[str, bytes]) -> None:
    assert read(made(members)) == members


@settings(max_examples=300, deadline=None)
@given(position=st.integers(0, len(made(MEMBERS)) - 1), flip=st.integers(1, 255))
def test_no_byte_can_change(position: int, flip: int) -> None:
    data = bytearray(made(MEMBERS))
    data[position] ^= flip
    with pytest.raises(ArtifactError):
        read(bytes(data))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_spliced_bytes_are_refused_or_the_same(data: st.DataObject) -> None:
    whole = made(MEMBERS)
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
    changed = whole[:start] + data.draw(st.binary(max_size=120)) + whole[stop:]
    try:
        assert read(changed) == MEMBERS
    except ArtifactError:
        assert changed != whole


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 3), st.integers(0, 400), st.integers(0, 400))
def test_any_directory_is_refused_politely(body: bytes, count: int, size: int, offset: int) -> None:
    tail = made({})[-TAIL_BYTES:]
    forged = bytearray(tail)
    struct.pack_into("<QQQQ", forged, 24, count, count, size, offset)
    struct.pack_into("<Q", forged, 56 + 8, offset + size)
    try:
        read(body + bytes(forged))
    except ArtifactError:
        return
    assert not body


def zipped(write: Callable[[zipfile.ZipFile], None], **options: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", **options) as archive:  # type: ignore[call-overload]
        write(archive)
    return buffer.getvalue()


def test_a_zip_bomb_is_refused_unread() -> None:
    bomb = zipped(lambda z: z.writestr("manifest.json", bytes(50_000_000)), compression=zipfile.ZIP_DEFLATED)
    assert len(bomb) < 100_000
    with pytest.raises(ArtifactError):
        read(bomb)


@pytest.mark.parametrize(
    "name", ["../up", "/root", "a/../b", "a//b", "a\\b", "C:x", "é", "", ".", "a/.", "x" * 300]
)
def test_names_that_mean_something_else_are_refused(name: str) -> None:
    with pytest.raises(ArtifactError):
        check_name(name)
    with pytest.raises(ArtifactError):
        made({name: b""})


@pytest.mark.parametrize("name", ["../up", "/root", "a/../b", "a\\b"])
def test_traversal_in_a_file_is_refused(name: str) -> None:
    honest = "n" * len(name)
    forged = made({honest: b"x"}).replace(honest.encode(), name.encode())
    with pytest.raises(ArtifactError):
        read(forged)


def test_duplicate_names_are_refused() -> None:
    forged = made({"aa": b"1", "ab": b"2"}).replace(b"ab", b"aa")
    with pytest.raises(ArtifactError, match="twice"):
        read(forged)


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda d: d + b"\0", id="trailing byte"),
        pytest.param(lambda d: b"\0" + d, id="leading byte"),
        pytest.param(lambda d: d + d, id="two files in a row"),
        pytest.param(lambda d: d[:-1], id="last byte missing"),
        pytest.param(lambda d: d[:200], id="cut"),
        pytest.param(lambda d: b"", id="empty"),
        pytest.param(lambda d: zipped(lambda z: z.writestr("a", "b")), id="another program's zip"),
    ],
)
def test_other_layouts_are_refused(change: Callable[[bytes], bytes]) -> None:
    with pytest.raises(ArtifactError):
        read(change(made(MEMBERS)))


def test_too_many_members_are_refused_before_the_directory_is_read() -> None:
    data = made({f"m{i}": b"" for i in range(9)})
    with pytest.raises(ArtifactError, match="more than 8"):
        read(data)
    assert len(read(data, max_entries=9)) == 9


def test_a_member_over_its_limit_is_refused_before_it_is_read() -> None:
    container = Container(io.BytesIO(made(MEMBERS)), max_entries=8)
    with pytest.raises(ArtifactError, match="more than the allowed 10"):
        container.read("a/b.bin", limit=10)
