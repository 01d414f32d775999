"""Key files are private, never overwritten, and understood in the forms that people have them."""

from __future__ import annotations

from pathlib import Path

import pytest

from autoprune.crypto.keys import (
    default_identities,
    default_identity_path,
    default_recipient,
    keygen,
    read_identities,
    read_recipients,
    recipients_of,
)
from autoprune.errors import ArtifactError, UsageError


def test_a_key_file_is_private_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "new" / "key.txt"
    recipient = keygen(path)
    assert recipient.startswith("age1")
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o077 == 0
    before = path.read_bytes()
    with pytest.raises(UsageError, match="never overwritten"):
        keygen(path)
    assert path.read_bytes() == before
    assert recipients_of(path) == [recipient]


def test_the_default_key_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AUTOPRUNE_KEY_FILE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert default_identity_path() == tmp_path / "autoprune" / "key.txt"
    with pytest.raises(UsageError, match="no key file"):
        default_recipient(create=False)
    with pytest.raises(ArtifactError, match="no key was given"):
        default_identities()
    first = default_recipient()
    assert default_recipient(create=False) == first
    assert len(default_identities()) == 1
    monkeypatch.setenv("AUTOPRUNE_KEY_FILE", str(tmp_path / "mine"))
    assert default_recipient() != first
    assert (tmp_path / "mine").exists()


def test_recipients_come_as_text_and_in_files(tmp_path: Path) -> None:
    keys = [keygen(tmp_path / name) for name in "ab"]
    listed = tmp_path / "team.txt"
    listed.write_text(f"# the team\n\n{keys[0]}\n{keys[1]}\n")
    found = [str(r) for r in read_recipients([str(listed), keys[0]])]
    assert found == [*keys, keys[0]]


@pytest.mark.parametrize("given", ["age1nonsense", "ssh-ed25519 AAAA", "no/such/file"])
def test_what_is_no_recipient_is_refused(given: str) -> None:
    with pytest.raises(UsageError):
        read_recipients([given])


def test_a_secret_is_no_recipient_and_is_not_shown(tmp_path: Path) -> None:
    keygen(tmp_path / "key")
    with pytest.raises(UsageError, match="secret key") as caught:
        read_recipients([tmp_path / "key"])
    assert "AGE-SECRET" not in str(caught.value)


def test_identities_come_from_files_or_in_code(tmp_path: Path) -> None:
    keygen(tmp_path / "a")
    keygen(tmp_path / "b")
    assert len(read_identities([tmp_path / "a", str(tmp_path / "b")])) == 2
    secret = (tmp_path / "a").read_text().splitlines()[-1]
    assert len(read_identities(secret)) == 1


@pytest.mark.parametrize(
    "content", [b"", b"# only a comment\n", b"AGE-SECRET-KEY-1NONSENSE\n", b"\xff\xfe", b"-----BEGIN X"]
)
def test_what_is_no_identity_is_refused_without_its_content(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_identities(path)
    assert "NONSENSE" not in str(caught.value)


def test_a_huge_file_is_no_key(tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(2 << 20))
    with pytest.raises(UsageError, match="too large"):
        read_identities(tmp_path / "key")
