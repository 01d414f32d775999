"""The container: a zip archive in one canonical layout, so that it can be read in one way only.

Members are stored one after the other, every header has one possible form, and the reader rebuilds all
headers from what it read and compares. Sizes therefore add up to the size of the file: nothing expands,
nothing hides between members, no name appears twice. `docs/format.md`, section 1, is the specification;
the field layout is PKWARE's APPNOTE 6.3.10, sections 4.3 and 4.5.3 (zip64).
"""

from __future__ import annotations

import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from autoprune.errors import ArtifactError
from autoprune.files import Buffer

VERSION = 45  # APPNOTE 4.4.3.2: 4.5, the first with zip64
DATE = 0x21  # 1980-01-01, the zero of zip's calendar
FULL32, FULL16 = 0xFFFFFFFF, 0xFFFF  # "look into the zip64 field"
LOCAL = struct.Struct("<IHHHHHIIIHH")
LOCAL_EXTRA = struct.Struct("<HHQQ")
CENTRAL = struct.Struct("<IHHHHHHIIIHHHHHII")
CENTRAL_EXTRA = struct.Struct("<HHQQQ")
END64 = struct.Struct("<IQHHIIQQQQ")
LOCATOR = struct.Struct("<IIQI")
END = struct.Struct("<IHHHHIIH")
TAIL_BYTES = END64.size + LOCATOR.size + END.size
MAX_NAME = 200  # a guess: the longest name that torch gives a member has 50 characters
NAME = re.compile(r"[A-Za-z0-9_.]+(/[A-Za-z0-9_.]+)*", re.ASCII)
CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One member: the position of its header, its length, and its CRC-32."""

    name: str
    offset: int
    size: int
    crc32: int

    @property
    def data_offset(self) -> int:
        """The position of the member's first byte."""
        return self.offset + LOCAL.size + len(self.name) + LOCAL_EXTRA.size


def _damage(problem: str) -> ArtifactError:
    return ArtifactError(f"the container is damaged or not of our making: {problem}", "get the file again")


def _local_header(e: Entry) -> bytes:
    name = e.name.encode("ascii")
    fixed = LOCAL.pack(
        0x04034B50, VERSION, 0, 0, 0, DATE, e.crc32, FULL32, FULL32, len(name), LOCAL_EXTRA.size
    )
    return fixed + name + LOCAL_EXTRA.pack(1, 16, e.size, e.size)


def _directory(entries: Sequence[Entry]) -> bytes:
    rows = []
    for e in entries:
        name = e.name.encode("ascii")
        fixed = CENTRAL.pack(
            0x02014B50, VERSION, VERSION, 0, 0, 0, DATE, e.crc32, FULL32, FULL32,
            len(name), CENTRAL_EXTRA.size, 0, 0, 0, 0, FULL32,
        )  # fmt: skip
        rows.append(fixed + name + CENTRAL_EXTRA.pack(1, 24, e.size, e.size, e.offset))
    return b"".join(rows)


def _tail(count: int, size: int, offset: int) -> bytes:
    return (
        END64.pack(0x06064B50, END64.size - 12, VERSION, VERSION, 0, 0, count, count, size, offset)
        + LOCATOR.pack(0x07064B50, 0, offset + size, 1)
        + END.pack(0x06054B50, FULL16, FULL16, FULL16, FULL16, FULL32, FULL32, 0)
    )


def check_name(name: str) -> None:
    """Refuse a name that could leave a folder or mean two things.

    Raises:
        ArtifactError: the name is not plain ASCII, is too long, or has a part of dots only.
    """
    parts = name.split("/")
    if len(name) > MAX_NAME or not NAME.fullmatch(name) or any(set(p) <= {"."} for p in parts):
        raise _damage(f"the member name {name[:80]!r} is not allowed")


def container_chunks(members: Iterable[tuple[str, Buffer]]) -> Iterator[Buffer]:
    """Yield the bytes of a container with these members in pieces; one member at a time is in memory.

    Raises:
        ArtifactError: a name is not allowed.
    """
    entries: list[Entry] = []
    offset = 0
    for name, data in members:
        check_name(name)
        entry = Entry(name=name, offset=offset, size=len(data), crc32=zlib.crc32(data))
        yield _local_header(entry)
        yield data
        entries.append(entry)
        offset = entry.data_offset + entry.size
    directory = _directory(entries)
    yield directory
    yield _tail(len(entries), len(directory), offset)


class Container:
    """A container in a seekable stream; members are read when asked for, and checked by CRC-32."""

    def __init__(self, source: BinaryIO, *, max_entries: int) -> None:
        """Read the directory, after its size was checked, and compare every header with its only form.

        Raises:
            ArtifactError: the bytes are not a canonical container.
        """
        self._source = source
        total = source.seek(0, os.SEEK_END)
        count, size, offset = self._read_tail(total, max_entries)
        self.entries = {e.name: e for e in _parse_directory(self._at(offset, size), count)}
        self._check_layout(count, size, offset)

    def _at(self, offset: int, size: int) -> bytes:
        self._source.seek(offset)
        data = self._source.read(size)
        if len(data) != size:
            raise _damage("it ends early")
        return data

    def _read_tail(self, total: int, max_entries: int) -> tuple[int, int, int]:
        if total < TAIL_BYTES:
            raise _damage("it is too short")
        tail = self._at(total - TAIL_BYTES, TAIL_BYTES)
        *_, count, size, offset = END64.unpack_from(tail)
        if offset + size + TAIL_BYTES != total or tail != _tail(count, size, offset):
            raise _damage("it does not end as it must")
        if count > max_entries or size > count * (CENTRAL.size + CENTRAL_EXTRA.size + MAX_NAME):
            raise _damage(f"it has more than {max_entries} members, or an oversized directory")
        return count, size, offset

    def _check_layout(self, count: int, size: int, offset: int) -> None:
        entries = tuple(self.entries.values())
        if len(entries) != count:
            raise _damage("a member name occurs twice")
        if _directory(entries) != self._at(offset, size):
            raise _damage("its directory is not canonical")
        position = 0
        for entry in entries:
            header = _local_header(entry)
            if entry.offset != position or position + len(header) + entry.size > offset:
                raise _damage("its members overlap or leave gaps")
            if self._at(position, len(header)) != header:
                raise _damage(f"the header of {entry.name!r} contradicts the directory")
            position = entry.data_offset + entry.size
        if position != offset:
            raise _damage("there are bytes between the members and the directory")

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield one member, a mebibyte at a time; only the end shows whether the checksum holds.

        Raises:
            ArtifactError: the member ends early, or its checksum is wrong.
        """
        entry = self.entries[name]
        crc, position = 0, 0
        while position < entry.size:
            piece = self._at(entry.data_offset + position, min(CHUNK, entry.size - position))
            crc, position = zlib.crc32(piece, crc), position + len(piece)
            yield piece
        if crc != entry.crc32:
            raise _damage(f"the checksum of {name!r} is wrong")

    def read(self, name: str, *, limit: int | None = None) -> bytes:
        """Return the whole of one member.

        Raises:
            ArtifactError: the member is larger than `limit`, or damaged.
        """
        entry = self.entries[name]
        if limit is not None and entry.size > limit:
            raise _damage(f"{name!r} has {entry.size} bytes, more than the allowed {limit}")
        data = self._at(entry.data_offset, entry.size)
        if zlib.crc32(data) != entry.crc32:
            raise _damage(f"the checksum of {name!r} is wrong")
        return data


def _parse_directory(data: bytes, count: int) -> Iterator[Entry]:
    position = 0
    try:
        for _ in range(count):
            fields = CENTRAL.unpack_from(data, position)
            crc32, name_len = fields[7], fields[10]
            start = position + CENTRAL.size
            name = data[start : start + name_len].decode("ascii")
            check_name(name)
            _, _, size, _, offset = CENTRAL_EXTRA.unpack_from(data, start + name_len)
            yield Entry(name=name, offset=offset, size=size, crc32=crc32)
            position = start + name_len + CENTRAL_EXTRA.size
    except (struct.error, UnicodeDecodeError):
        raise _damage("its directory cannot be read") from None
