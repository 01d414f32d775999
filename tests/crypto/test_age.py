"""Encryption: the `age` tool is the judge, and damage looks like a wrong key."""

from __future__ import annotations

import io
import os
import pty
import shutil
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pyrage
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoprune.crypto.age import (
    check_protection,
    decrypt_file,
    decrypt_to_memory,
    encrypt_chunks,
    is_encrypted,
    read_header,
    rewrap_file,
)
from autoprune.crypto.keys import keygen
from autoprune.errors import ArtifactError, AutopruneError, UsageError

CHUNK = (64 << 10) + 16  # age: 64 KiB of plaintext and a tag
PLAIN = bytes(i * 7 % 251 for i in range(200_000))  # four chunks
WORD = "correct horse"
needs_age = pytest.mark.skipif(
    not shutil.which("age"), reason="the age tool (Debian package age) is not here"
)


@pytest.fixture
def key(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "key.txt"
    return path, keygen(path)


def encrypted(recipient: str, tmp_path: Path, plain: bytes = PLAIN) -> Path:
    target = tmp_path / "file.age"
    encrypt_chunks(target, iter([plain]), recipients=[recipient])
    return target


def opened(data: bytes, identity: Path) -> bytes:
    return decrypt_to_memory(io.BytesIO(data), identity=identity).read()


def age(*arguments: str | Path, stdin: bytes | None = None) -> bytes:
    return subprocess.run(["age", *map(str, arguments)], input=stdin, check=True, capture_output=True).stdout


def age_at_a_terminal(passphrase: str, *arguments: str | Path) -> None:
    """`age` asks for passphrases on its terminal only, so it gets one."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp("age", ["age", *map(str, arguments)])  # noqa: S606 - the tool under test, no shell
    asked = b""
    while True:
        try:
            asked += os.read(terminal, 1024)
        except OSError:
            break
        if asked.rstrip().endswith(b":"):
            os.write(terminal, passphrase.encode() + b"\n")
            asked = b""
    assert os.waitpid(pid, 0)[1] == 0, asked


def test_several_recipients_open_the_file_each(tmp_path: Path) -> None:
    keys = [tmp_path / f"k{i}" for i in range(3)]
    target = tmp_path / "file.age"
    encrypt_chunks(target, iter([PLAIN[:10], b"", PLAIN[10:]]), recipients=[keygen(k) for k in keys])
    assert all(opened(target.read_bytes(), k) == PLAIN for k in keys)
    with target.open("rb") as stream:
        assert read_header(stream).kinds == ("X25519",) * 3
        assert is_encrypted(stream)
    assert target.stat().st_mode & 0o077 == 0


@needs_age
def test_age_opens_ours_and_we_open_what_age_makes(tmp_path: Path, key: tuple[Path, str]) -> None:
    path, recipient = key
    ours = encrypted(recipient, tmp_path)
    assert age("-d", "-i", path, ours) == PLAIN
    assert opened(age("-r", recipient, stdin=PLAIN), path) == PLAIN


@needs_age
@pytest.mark.skipif(not shutil.which("age-keygen"), reason="age-keygen is not here")
def test_identity_files_are_those_of_age_keygen(tmp_path: Path, key: tuple[Path, str]) -> None:
    path, recipient = key
    said = subprocess.run(["age-keygen", "-y", path], check=True, capture_output=True, text=True)
    assert said.stdout.strip() == recipient
    theirs = tmp_path / "theirs"
    subprocess.run(["age-keygen", "-o", theirs], check=True, capture_output=True)
    public = subprocess.run(["age-keygen", "-y", theirs], check=True, capture_output=True, text=True)
    assert opened(encrypted(public.stdout.strip(), tmp_path).read_bytes(), theirs) == PLAIN


@needs_age
@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_ssh_keys_work_with_age_both_ways(tmp_path: Path, kind: str) -> None:
    if not shutil.which("ssh-keygen"):
        pytest.skip("ssh-keygen is not here")
    path = tmp_path / "ssh"
    subprocess.run(["ssh-keygen", "-q", "-t", kind, "-N", "", "-C", "", "-f", path], check=True)
    public = path.with_suffix(".pub")
    for recipient in (public, public.read_text().strip()):
        target = tmp_path / "file.age"
        encrypt_chunks(target, iter([PLAIN]), recipients=[recipient])
        assert age("-d", "-i", path, target) == PLAIN
    assert opened(age("-R", public, stdin=PLAIN), path) == PLAIN


@needs_age
def test_passphrases_work_with_age_both_ways(tmp_path: Path) -> None:
    source, theirs, ours, back = (tmp_path / n for n in ("plain", "theirs", "ours", "back"))
    source.write_bytes(PLAIN)
    age_at_a_terminal(WORD, "-p", "-o", theirs, source)
    decrypt_file(theirs, back, passphrase=WORD)
    assert back.read_bytes() == PLAIN
    back.unlink()
    with pytest.raises(ArtifactError, match="cannot be opened"):
        decrypt_file(theirs, back, passphrase=WORD[1:])
    assert not back.exists()
    encrypt_chunks(ours, iter([PLAIN]), passphrase=WORD)
    age_at_a_terminal(WORD, "-d", "-o", back, ours)
    assert back.read_bytes() == PLAIN
    with ours.open("rb") as stream:
        assert read_header(stream).by_passphrase
        with pytest.raises(UsageError, match="passphrase"):
            decrypt_to_memory(stream, identity=keygen_in(tmp_path))


def keygen_in(folder: Path) -> Path:
    keygen(folder / "another")
    return folder / "another"


def test_rewrap_changes_who_can_open(tmp_path: Path, key: tuple[Path, str]) -> None:
    path, recipient = key
    old, new = encrypted(recipient, tmp_path), tmp_path / "new.age"
    other = tmp_path / "other"
    rewrap_file(old, new, recipients=[keygen(other)], identity=path)
    assert opened(new.read_bytes(), other) == PLAIN
    with pytest.raises(ArtifactError, match="cannot be opened"):
        opened(new.read_bytes(), path)
    with pytest.raises(ArtifactError, match="cannot be opened"):
        rewrap_file(old, tmp_path / "not", recipients=[recipient], identity=other)
    assert not (tmp_path / "not").exists()


@pytest.mark.parametrize(
    ("recipients", "passphrase"),
    [(["age1x"], "word"), ([], None), ([], ""), (["age1x"], None), ([__file__], None)],
)
def test_locks_that_age_refuses_are_refused_before_anything_is_written(
    tmp_path: Path, recipients: list[str], passphrase: str | None
) -> None:
    with pytest.raises(UsageError):
        check_protection(recipients, passphrase)
    with pytest.raises(UsageError):
        encrypt_chunks(tmp_path / "out", iter([b""]), recipients=recipients, passphrase=passphrase)
    assert list(tmp_path.iterdir()) == []


def test_too_many_recipients_are_refused(tmp_path: Path, key: tuple[Path, str]) -> None:
    with pytest.raises(UsageError, match="64"):
        check_protection([key[1]] * 65, None)
    many = pyrage.encrypt(b"x", [pyrage.x25519.Recipient.from_str(key[1])] * 65)
    with pytest.raises(ArtifactError, match="cannot be opened"):
        opened(many, key[0])


@cache
def victim() -> tuple[bytes, str, str]:
    """A file of four chunks, another for the same key, and the key."""
    identity = pyrage.x25519.Identity.generate()
    files = [pyrage.encrypt(plain, [identity.to_public()]) for plain in (PLAIN, PLAIN[::-1])]
    return files[0], files[1], str(identity)


def header_size(data: bytes) -> int:
    return read_header(io.BytesIO(data)).size_bytes


def chunks(data: bytes) -> tuple[bytes, list[bytes]]:
    start = header_size(data) + 16  # the nonce of the payload
    return data[:start], [data[i : i + CHUNK] for i in range(start, len(data), CHUNK)]


def refused(data: bytes) -> None:
    identity = victim()[2]
    with pytest.raises(AutopruneError) as caught:
        decrypt_to_memory(io.BytesIO(data), identity=identity)
    assert caught.value.message.startswith("the encrypted file cannot be opened")


def test_every_byte_of_the_header_counts() -> None:
    data = victim()[0]
    for position in range(header_size(data) + 16):
        for flip in (1, 0x80):
            refused(data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :])


def test_flipped_bytes_in_every_chunk_are_found() -> None:
    data = victim()[0]
    for position in {*range(header_size(data) + 16, len(data), 9973), len(data) - 1}:
        refused(data[:position] + bytes([data[position] ^ 4]) + data[position + 1 :])


CUTS: dict[str, Callable[[bytes, list[bytes]], bytes]] = {
    "after the nonce": lambda head, parts: head,
    "after chunk 1": lambda head, parts: head + parts[0],
    "after chunk 2": lambda head, parts: head + b"".join(parts[:2]),
    "before the last": lambda head, parts: head + b"".join(parts[:-1]),
    "inside a tag": lambda head, parts: head + b"".join(parts)[:-1],
    "first missing": lambda head, parts: head + b"".join(parts[1:]),
    "middle missing": lambda head, parts: head + parts[0] + b"".join(parts[2:]),
    "swapped": lambda head, parts: head + parts[1] + parts[0] + b"".join(parts[2:]),
    "doubled": lambda head, parts: head + parts[0] + b"".join(parts),
    "trailing byte": lambda head, parts: head + b"".join(parts) + b"\0",
    "trailing chunk": lambda head, parts: head + b"".join(parts) + parts[0],
    "file doubled": lambda head, parts: 2 * (head + b"".join(parts)),
    "spliced": lambda head, parts: head + parts[0] + b"".join(chunks(victim()[1])[1][1:]),
    "another's payload": lambda head, parts: head + b"".join(chunks(victim()[1])[1]),
    "half a header": lambda head, parts: head[:60],
    "empty": lambda head, parts: b"",
}


@pytest.mark.parametrize("cut", CUTS)
def test_rearranged_files_are_refused(cut: str) -> None:
    refused(CUTS[cut](*chunks(victim()[0])))


def test_a_wrong_key_is_told_in_the_same_words(tmp_path: Path) -> None:
    keygen(tmp_path / "wrong")
    with pytest.raises(ArtifactError, match="cannot be opened"):
        opened(victim()[0], tmp_path / "wrong")


def test_a_damaged_file_leaves_no_output(tmp_path: Path) -> None:
    data, _, identity = victim()
    source, target = tmp_path / "damaged", tmp_path / "out"
    source.write_bytes(data[:-1])
    with pytest.raises(ArtifactError, match="cannot be opened"):
        decrypt_file(source, target, identity=identity)
    assert [p.name for p in tmp_path.iterdir()] == ["damaged"]


def scrypt_header(work_factor: str, stanzas: int = 1) -> bytes:
    stanza = f"-> scrypt {'A' * 22} {work_factor}\n{'A' * 43}\n" * stanzas
    return f"age-encryption.org/v1\n{stanza}--- {'A' * 43}\n".encode() + bytes(64)


@pytest.mark.parametrize(("work_factor", "stanzas"), [("22", 1), ("99", 1), ("018", 1), ("10", 2)])
def test_expensive_passphrase_headers_are_refused_at_once(work_factor: str, stanzas: int) -> None:
    with pytest.raises(ArtifactError, match="cannot be opened"):
        decrypt_to_memory(io.BytesIO(scrypt_header(work_factor, stanzas)), passphrase=WORD)


def test_an_endless_header_costs_no_memory() -> None:
    data = b"age-encryption.org/v1\n" + b"-> X25519 a\n" + b"A" * 30_000_000
    tracemalloc.start()
    with pytest.raises(ArtifactError):
        read_header(io.BytesIO(data))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


def test_armour_is_refused_with_advice(key: tuple[Path, str]) -> None:
    armoured = pyrage.encrypt(b"x", [pyrage.x25519.Recipient.from_str(key[1])], armored=True)
    with pytest.raises(ArtifactError, match="armour"):
        is_encrypted(io.BytesIO(armoured))


def test_key_and_passphrase_together_are_refused(key: tuple[Path, str]) -> None:
    with pytest.raises(UsageError, match="not both"):
        decrypt_to_memory(io.BytesIO(victim()[0]), identity=key[0], passphrase=WORD)


@pytest.mark.skipif(sys.platform == "win32", reason="file size limits are POSIX")
def test_a_full_disk_leaves_nothing(tmp_path: Path, key: tuple[Path, str]) -> None:
    """A real failing write: the process may write no file above 100 kB."""
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from autoprune.crypto.age import encrypt_chunks\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000,) * 2)\n"
        "encrypt_chunks(Path(sys.argv[1]), iter([bytes(1_000_000)]), recipients=[sys.argv[2]])"
    )
    folder = tmp_path / "full"
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, folder / "out", key[1]], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "ArtifactError: cannot write" in done.stderr
    assert list(folder.iterdir()) == []


STANZA_LINES = st.one_of(
    st.binary(max_size=80),
    st.sampled_from([b"-> X25519 abc", b"-> scrypt AAAA 18", b"-> ", b"A" * 64, b"A" * 43, b"", b"---"]),
)


@given(st.lists(STANZA_LINES, max_size=80), st.binary(max_size=40))
@settings(max_examples=300, deadline=None)
def test_any_header_is_read_or_refused_politely(lines: list[bytes], tail: bytes) -> None:
    data = b"age-encryption.org/v1\n" + b"\n".join([*lines, b"--- " + b"A" * 43 + b"\n"]) + tail
    try:
        header = read_header(io.BytesIO(data))
    except ArtifactError as error:
        assert error.message.startswith("the encrypted file cannot be opened")  # noqa: PT017
    else:
        assert 1 <= len(header.kinds) <= 64
        assert header.size_bytes <= len(data)
