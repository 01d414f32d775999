"""Signatures: right key, right content, or nothing."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from autoprune.errors import ArtifactError, UsageError
from autoprune.signing import check_signature, sign_manifest, signing_keygen

TEXT = b'{"format_version":1}'


def test_a_signature_holds_for_its_text_and_key_alone(tmp_path: Path) -> None:
    public = signing_keygen(tmp_path / "key")
    other = signing_keygen(tmp_path / "other")
    signature = sign_manifest(TEXT, tmp_path / "key")
    assert len(signature) == 96
    for required in (public, tmp_path / "key.pub", None):
        assert check_signature(TEXT, signature, required=required) == public
    with pytest.raises(ArtifactError, match="another key"):
        check_signature(TEXT, signature, required=other)
    with pytest.raises(ArtifactError, match="wrong"):
        check_signature(TEXT + b" ", signature, required=None)
    with pytest.raises(ArtifactError, match="not signed"):
        check_signature(TEXT, None, required=public)
    assert check_signature(TEXT, None, required=None) is None


def test_no_byte_of_a_signature_can_change(tmp_path: Path) -> None:
    public = signing_keygen(tmp_path / "key")
    signature = sign_manifest(TEXT, tmp_path / "key")
    for position in range(len(signature)):
        forged = bytearray(signature)
        forged[position] ^= 1
        with pytest.raises(ArtifactError):
            check_signature(TEXT, bytes(forged), required=public)
    for forged_bytes in (b"", signature[:-1], signature + b"\0"):
        with pytest.raises(ArtifactError, match="wrong"):
            check_signature(TEXT, forged_bytes, required=None)


def test_another_key_cannot_claim_a_signature(tmp_path: Path) -> None:
    public = signing_keygen(tmp_path / "key")
    signing_keygen(tmp_path / "mallory")
    own = sign_manifest(TEXT, tmp_path / "key")
    theirs = sign_manifest(TEXT, tmp_path / "mallory")
    with pytest.raises(ArtifactError):
        check_signature(TEXT, own[:32] + theirs[32:], required=public)


def test_keys_are_never_overwritten(tmp_path: Path) -> None:
    signing_keygen(tmp_path / "key")
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    for path in ("key", "key2"):
        (tmp_path / "key2.pub").touch()
        with pytest.raises(UsageError, match="never overwritten"):
            signing_keygen(tmp_path / path)
    assert not (tmp_path / "key2").exists()


def test_pem_keys_work_too(tmp_path: Path) -> None:
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.PKCS8, forms.NoEncryption())
    public = key.public_key().public_bytes(forms.Encoding.PEM, forms.PublicFormat.SubjectPublicKeyInfo)
    (tmp_path / "key.pem").write_bytes(secret)
    (tmp_path / "public.pem").write_bytes(public)
    signature = sign_manifest(TEXT, tmp_path / "key.pem")
    assert check_signature(TEXT, signature, required=tmp_path / "public.pem")


@pytest.mark.skipif(not shutil.which("ssh-keygen"), reason="ssh-keygen is not here")
def test_ssh_keygen_makes_keys_that_work(tmp_path: Path) -> None:
    path = tmp_path / "id"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "me@host", "-f", path], check=True)
    assert check_signature(TEXT, sign_manifest(TEXT, path), required=path.with_suffix(".pub"))
    subprocess.run(["ssh-keygen", "-q", "-p", "-N", "locked", "-f", path], check=True)
    with pytest.raises(UsageError, match="without a passphrase"):
        sign_manifest(TEXT, path)


@pytest.mark.parametrize("given", ["ssh-ed25519 AAAA", "no/such.pub", __file__])
def test_what_is_no_public_key_is_refused(given: str) -> None:
    with pytest.raises(UsageError):
        check_signature(TEXT, None, required=given)
