"""Encryption: age v1 (C2SP `age`), in its binary form, entirely by pyrage.

A file is for one or more public keys, or for one passphrase, never for both. Before anything is decrypted
the header's bounds are checked here (`docs/format.md`, section 8). Every later failure raises one and the
same error, so that nobody learns whether the key was wrong or the file damaged. Decryption goes to memory,
or to a file that gets its name only after the last chunk was authenticated.
"""

from __future__ import annotations

import io
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import pyrage

from autoprune.crypto.keys import KeySource, default_identities, read_identities, read_recipients
from autoprune.errors import ArtifactError, UsageError
from autoprune.files import BUFFER, Buffer, write_private

MAGIC = b"age-encryption.org/v1\n"
ARMOUR = b"-----BEGIN AGE"
PLAIN = b"PK\x03\x04"
MAX_HEADER = 64 << 10  # this bound and the next two: docs/format.md, section 8
MAX_RECIPIENTS = 64
MAX_WORK_FACTOR = 21  # 2 GiB of memory and 30 s here; pyrage writes 16 to 20, age 18
NON_BLOCKING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # for a pipe without a writer
# pyrage has one error for everything; only its text says this (pyrage 1.4)
EXCESSIVE = "Excessive work"  # pyrage's words for more than about 16 s on this machine at this moment
STANZA = re.compile(rb"-> ([!-~]+)((?: [!-~]+)*)")
BODY_FULL = re.compile(rb"[A-Za-z0-9+/]{64}")
BODY_LAST = re.compile(rb"[A-Za-z0-9+/]{0,63}")
MAC = re.compile(rb"--- [A-Za-z0-9+/]{43}")


@dataclass(frozen=True, kw_only=True)
class AgeHeader:
    """The part of an encrypted file that everyone can see.

    Attributes:
        kinds: one a recipient: `X25519`, `ssh-ed25519`, `ssh-rsa`, `scrypt` (a passphrase) or others.
        size_bytes: the size of the header.
    """

    kinds: tuple[str, ...]
    size_bytes: int

    @property
    def by_passphrase(self) -> bool:
        """Whether a passphrase opens the file."""
        return "scrypt" in self.kinds


def opening_error() -> ArtifactError:
    """Return the one error for a wrong key, a wrong passphrase and a damaged file."""
    return ArtifactError(
        "the encrypted file cannot be opened: the key or passphrase is wrong, or the file is damaged",
        "check the key with autoprune inspect, and compare the file with where it came from",
    )


def is_encrypted(source: BinaryIO) -> bool:
    """Return whether a stream starts as age does; the stream is left at its start.

    Raises:
        ArtifactError: the stream is age's ASCII armour, which is not a delivered file's form.
    """
    start = _start(source, len(MAGIC))
    if start.startswith(ARMOUR):
        raise ArtifactError(
            "the file is in age's ASCII armour", "decrypt it with age first, or encrypt without -a"
        )
    return start == MAGIC


def _start(source: BinaryIO, size: int) -> bytes:
    source.seek(0)
    data = source.read(size)
    source.seek(0)
    return data


def read_header(source: BinaryIO) -> AgeHeader:
    """Read the recipients of an encrypted file, without any key; the stream is left at its start.

    Raises:
        ArtifactError: the file has no well-formed header within the bounds.
    """
    data = _start(source, MAX_HEADER)
    if data.startswith(PLAIN):
        raise ArtifactError("the file is not encrypted", "use it as it is; autoprune encrypt encrypts it")
    end = data.find(b"\n--- ")
    stop = data.find(b"\n", end + 1)
    if not data.startswith(MAGIC) or end < 0 or stop < 0 or not MAC.fullmatch(data[end + 1 : stop]):
        raise opening_error()
    stanzas = list(_stanzas(data[len(MAGIC) : end].split(b"\n")))
    kinds = [kind for kind, _ in stanzas if not kind.endswith("-grease")]  # age's own decoys
    scrypt = [arguments for kind, arguments in stanzas if kind == "scrypt"]
    if (
        not kinds
        or len(stanzas) > MAX_RECIPIENTS
        or (scrypt and (len(stanzas) > 1 or not _is_bounded(scrypt[0])))
    ):
        raise opening_error()
    return AgeHeader(kinds=tuple(kinds), size_bytes=stop + 1)


def _is_bounded(arguments: Sequence[str]) -> bool:
    return (
        len(arguments) == 2
        and bool(re.fullmatch(r"[1-9][0-9]?", arguments[1]))
        and int(arguments[1]) <= MAX_WORK_FACTOR
    )


def _stanzas(lines: Sequence[bytes]) -> Iterator[tuple[str, list[str]]]:
    rest = iter(lines)
    for line in rest:
        match = STANZA.fullmatch(line)
        if match is None:
            raise opening_error()
        body = next(rest, b"!")
        while BODY_FULL.fullmatch(body):
            body = next(rest, b"!")
        if not BODY_LAST.fullmatch(body):
            raise opening_error()
        yield match[1].decode("ascii"), match[2].decode("ascii").split()


def check_protection(recipients: Sequence[KeySource], passphrase: str | None) -> None:
    """Refuse what age refuses: a passphrase with keys, neither of them, or an empty passphrase.

    Raises:
        UsageError: one of these is given, or a recipient is no public key.
    """
    if recipients and passphrase is not None:
        raise UsageError(
            "a file is encrypted to keys or with a passphrase, not both", "choose one of the two"
        )
    if not recipients and not passphrase:
        raise UsageError(
            "nothing to encrypt with: no recipient, and no passphrase", "give a public key, or a passphrase"
        )
    if recipients and not 1 <= len(read_recipients(recipients)) <= MAX_RECIPIENTS:
        raise UsageError(f"more than {MAX_RECIPIENTS} recipients", f"give at most {MAX_RECIPIENTS}")


class _ErrorKeeper:
    """A writable stream that keeps the error of a failed write, which pyrage reports as a damaged file."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, data: bytes) -> int:
        try:
            return self._stream.write(data)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._stream.flush()


class _ChunkStream(io.RawIOBase):
    """A readable stream over an iterator of buffers, for pyrage, which never holds more than one of them."""

    def __init__(self, chunks: Iterator[Buffer]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._rest = memoryview(chunk)
        count = len(self._rest) if size < 0 else size
        data, self._rest = bytes(self._rest[:count]), self._rest[count:]
        return data


def encrypt_chunks(
    path: Path,
    chunks: Iterator[Buffer],
    *,
    recipients: Sequence[KeySource] = (),
    passphrase: str | None = None,
) -> None:
    """Write an encrypted file from pieces of plaintext; no plaintext touches the disk.

    With recipients the memory needed is that of one piece. With a passphrase pyrage needs the whole at
    once.

    Raises:
        UsageError: keys and passphrase are mixed, missing or wrong.
        ArtifactError: the file cannot be written; nothing is left of it.
    """
    check_protection(recipients, passphrase)
    with write_private(path) as stream:
        if passphrase is not None:
            encrypted = pyrage.passphrase.encrypt(b"".join(chunks), passphrase)
            read_header(io.BytesIO(encrypted[:MAX_HEADER]))  # pyrage chose a work factor that we would take
            stream.write(encrypted)
            return
        target = _ErrorKeeper(stream)
        try:
            pyrage.encrypt_io(_ChunkStream(chunks), target, read_recipients(recipients))
        except pyrage.EncryptError as error:
            raise target.error or error from None


@contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a delivered file for reading.

    Raises:
        ArtifactError: there is no such file, it cannot be read, or it is a pipe or a device.
    """
    try:
        handle = os.open(path, os.O_RDONLY | NON_BLOCKING)
    except OSError as error:
        raise ArtifactError(
            f"cannot read {path}: {error.strerror}", "give the path of a delivered file"
        ) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise ArtifactError(f"cannot read {path}: it is no file", "save what it gives to a file first")
    with os.fdopen(handle, "rb", buffering=BUFFER) as stream:
        yield stream


def decryptor(
    source: BinaryIO,
    *,
    identity: KeySource | Sequence[KeySource] | None = None,
    passphrase: str | None = None,
) -> Callable[[BinaryIO], None]:
    """Check the header and the keys now; return a function that decrypts into a stream.

    Without identity and passphrase the default identity is used.

    Raises:
        UsageError: identity and passphrase are both given, the identity cannot be read, or a passphrase is
            needed.
        ArtifactError: the header is out of bounds, or there is no key at all.
    """
    if identity is not None and passphrase is not None:
        raise UsageError("a file is opened by a key or by a passphrase, not both", "give one of the two")
    header = read_header(source)
    if passphrase is not None:
        return lambda target: _decrypt_by_passphrase(source, target, passphrase)
    if header.by_passphrase:
        raise UsageError(
            "the file is encrypted with a passphrase", "give it: --passphrase (in code: passphrase=...)"
        )
    identities = default_identities() if identity is None else read_identities(identity)

    def decrypt(stream: BinaryIO) -> None:
        target = _ErrorKeeper(stream)
        try:
            pyrage.decrypt_io(source, target, identities)
        except (pyrage.DecryptError, OSError):  # a damaged chunk comes as an OSError
            raise target.error or opening_error() from None

    return decrypt


def _decrypt_by_passphrase(source: BinaryIO, target: BinaryIO, passphrase: str) -> None:
    try:
        target.write(pyrage.passphrase.decrypt(source.read(), passphrase))
    except pyrage.DecryptError as error:
        if EXCESSIVE in str(error):  # stands in the header for everyone to read, and tells nothing else
            raise ArtifactError(
                "the passphrase's work factor asks too much of this machine as busy as it is now",
                "open it when the machine is idle, or with age --decrypt, which waits",
            ) from None
        raise opening_error() from None


def decrypt_to_memory(
    source: BinaryIO,
    *,
    identity: KeySource | Sequence[KeySource] | None = None,
    passphrase: str | None = None,
) -> io.BytesIO:
    """Decrypt a file into memory; return the plaintext once all of it is authenticated.

    Raises:
        UsageError, ArtifactError: in the cases of `decryptor`, or the key is wrong, or the file damaged.
    """
    memory = io.BytesIO()
    decryptor(source, identity=identity, passphrase=passphrase)(memory)
    memory.seek(0)
    return memory


def decrypt_file(
    source: Path,
    target: Path,
    *,
    identity: KeySource | Sequence[KeySource] | None = None,
    passphrase: str | None = None,
) -> None:
    """Write the plaintext of an encrypted file; the target appears once all of it is authenticated.

    Raises:
        UsageError, ArtifactError: in the cases of `decrypt_to_memory`, or a file cannot be read or written.
    """
    with open_file(source) as stream:
        decrypt = decryptor(stream, identity=identity, passphrase=passphrase)
        with write_private(target) as plain:
            decrypt(plain)


def rewrap_file(
    source: Path,
    target: Path,
    *,
    recipients: Sequence[KeySource] = (),
    new_passphrase: str | None = None,
    identity: KeySource | Sequence[KeySource] | None = None,
    passphrase: str | None = None,
) -> None:
    """Encrypt an encrypted file anew, for other recipients, through memory.

    Raises:
        UsageError, ArtifactError: decryption or encryption fails; the target is then left as it was.
    """
    check_protection(recipients, new_passphrase)
    with open_file(source) as stream:
        memory = decrypt_to_memory(stream, identity=identity, passphrase=passphrase)
    chunks = iter(lambda: memory.read(1 << 20), b"")
    encrypt_chunks(target, chunks, recipients=recipients, passphrase=new_passphrase)
