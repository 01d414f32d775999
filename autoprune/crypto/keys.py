"""Key files: age identities and recipients, in the forms that `age-keygen` and `ssh-keygen` write.

A *recipient* is a public key (`age1...`, `ssh-ed25519 ...`, `ssh-rsa ...`), an *identity* the secret that
belongs to it. Secrets live in files that their owner alone can read; they are never overwritten, never
arguments of a command and never printed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyrage

from autoprune.errors import ArtifactError, UsageError

SECRET = "AGE-SECRET-KEY-1"  # noqa: S105 - the public prefix of every age identity, no secret
SSH_PRIVATE = b"-----BEGIN"
MAX_KEY_FILE = 1 << 20  # a guess: far above any list of recipients, far below trouble
KeySource = str | Path


def default_identity_path() -> Path:
    """Return `$AUTOPRUNE_KEY_FILE`, or else `autoprune/key.txt` in the XDG configuration folder."""
    if path := os.environ.get("AUTOPRUNE_KEY_FILE"):
        return Path(path).expanduser()
    config = os.environ.get("XDG_CONFIG_HOME")
    return (Path(config) if config else Path.home() / ".config") / "autoprune" / "key.txt"


def write_secret(path: Path, content: bytes) -> None:
    """Write a new file that only its owner can read; missing folders above it are made.

    Raises:
        UsageError: the file exists, or cannot be made.
    """
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        raise UsageError(
            f"the key file {path} exists, and keys are never overwritten",
            "choose another name, or move it away",
        ) from None
    except OSError as error:
        raise UsageError(
            f"cannot write the key file {path}: {error.strerror}", "choose another folder"
        ) from None
    with os.fdopen(handle, "wb") as stream:
        stream.write(content)


def keygen(path: KeySource) -> str:
    """Make an X25519 identity in a new file, as `age-keygen -o` does; return its public key.

    Raises:
        UsageError: the file exists, or cannot be made.
    """
    identity = pyrage.x25519.Identity.generate()
    recipient = str(identity.to_public())
    created = datetime.now(UTC).isoformat(timespec="seconds")
    text = f"# created: {created}\n# public key: {recipient}\n{identity}\n"
    write_secret(Path(path).expanduser(), text.encode())
    return recipient


def default_recipient(*, create: bool = True) -> str:
    """Return the public key of the default identity, which is made on first use.

    Raises:
        UsageError: the identity does not exist and `create` is false, or its file holds no X25519 identity.
    """
    path = default_identity_path()
    if not path.exists():
        if not create:
            raise UsageError(f"there is no key file {path}", "make one with: autoprune keygen")
        return keygen(path)
    return recipients_of(path)[0]


def recipients_of(path: KeySource) -> list[str]:
    """Return the public keys of the age identities in a file.

    Raises:
        UsageError: the file cannot be read or holds no X25519 identity.
    """
    keys = [pyrage.x25519.Identity.from_str(line) for line in _lines(Path(path)) if line.startswith(SECRET)]
    if not keys:
        raise UsageError(f"{path} holds no age identity", "make one with: autoprune keygen")
    return [str(key.to_public()) for key in keys]


def read_recipients(sources: Sequence[KeySource]) -> list[Any]:
    """Read public keys for pyrage, from `age1...` and `ssh-...` texts or from files with one a line.

    Raises:
        UsageError: a text is no public key, or a file cannot be read or holds none.
    """
    recipients = []
    for source in sources:
        if isinstance(source, str) and source.startswith(("age1", "ssh-")):
            recipients.append(_recipient(source, source))
        else:
            lines = list(_lines(Path(source).expanduser()))
            recipients += [_recipient(line, str(source)) for line in lines]
            if not lines:
                raise UsageError(
                    f"{source} holds no public key", "put age1... or ssh-... keys into it, one a line"
                )
    return recipients


def _recipient(text: str, source: str) -> Any:
    hint = "give age1..., ssh-ed25519 ..., ssh-rsa ..., or a file with such lines"
    if text.startswith(SECRET):
        raise UsageError(
            f"{source} holds a secret key where a public one is wanted",
            "give the age1... line in its comment",
        )
    try:
        if text.startswith("ssh-"):
            return pyrage.ssh.Recipient.from_str(text)
        return pyrage.x25519.Recipient.from_str(text)
    except pyrage.RecipientError:
        raise UsageError(f"{text[:60]!r} is no public key that age knows", hint) from None


def read_identities(sources: KeySource | Sequence[KeySource]) -> list[Any]:
    """Read secret keys for pyrage, from age identity files and OpenSSH private key files.

    In code, an identity itself (`AGE-SECRET-KEY-1...`) may stand in place of a file.

    Raises:
        UsageError: a file cannot be read, or holds no identity.
    """
    if isinstance(sources, str | Path):
        sources = [sources]
    return [identity for source in sources for identity in _identities(source)]


def _identities(source: KeySource) -> Iterator[Any]:
    problem = UsageError(
        "the identity text is no age key"
        if _is_secret(source)
        else f"{source} holds no identity that age can use",
        "give a file made by autoprune keygen, age-keygen, or ssh-keygen (without a passphrase)",
    )
    try:
        if _is_secret(source):
            yield pyrage.x25519.Identity.from_str(str(source).strip())
            return
        path = Path(source).expanduser()
        content = read_key_file(path)
        if content.startswith(SSH_PRIVATE):
            yield pyrage.ssh.Identity.from_buffer(content)
            return
        keys = [pyrage.x25519.Identity.from_str(line) for line in _lines(path)]
    except pyrage.IdentityError:
        raise problem from None
    if not keys:
        raise problem
    yield from keys


def _is_secret(source: KeySource) -> bool:
    return isinstance(source, str) and source.strip().startswith(SECRET)


def read_key_file(path: Path) -> bytes:
    """Read the bytes of a key file, at most a mebibyte of them.

    Raises:
        UsageError: the file cannot be read, or is too large for a key file.
    """
    try:
        with path.open("rb") as stream:
            content = stream.read(MAX_KEY_FILE + 1)
    except OSError as error:
        raise UsageError(
            f"cannot read the key file {path}: {error.strerror}",
            "give an existing file, or make one: autoprune keygen",
        ) from None
    if len(content) > MAX_KEY_FILE:
        raise UsageError(f"{path} is too large for a key file", "give the file that holds the key alone")
    return content


def _lines(path: Path) -> Iterator[str]:
    try:
        text = read_key_file(path).decode()
    except UnicodeDecodeError:
        raise UsageError(
            f"{path} is no text file with keys", "give the file that holds the key alone"
        ) from None
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            yield line.strip()


def default_identities() -> list[Any]:
    """Read the default identity, for a file that was given without any key.

    Raises:
        ArtifactError: there is no default identity.
    """
    path = default_identity_path()
    if not path.exists():
        raise ArtifactError(
            f"the file is encrypted, no key was given, and there is no {path}",
            "name the key file with --identity (in code: identity=...)",
        )
    return read_identities(path)
