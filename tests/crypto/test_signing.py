"""Signatures: right key, right content, or nothing."""

from __future__ import annotations

import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from autoprune.crypto.signing import (
    FIELD,
    WEAK_Y,
    _signed_text,
    check_signature,
    sign_manifest,
    signing_keygen,
)
from autoprune.errors import ArtifactError, UsageError

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


def weak_keys() -> list[bytes]:
    return [(y | sign << 255).to_bytes(32, "little") for y in sorted(WEAK_Y) for sign in (0, 1)]


def test_keys_that_sign_anything_sign_nothing() -> None:
    """OpenSSL takes zeros as a signature by the points of small order for a good part of all texts."""
    taken = 0
    for key in weak_keys():
        for text in (b"%d" % number for number in range(40)):
            forged = key + key + bytes(32)
            with suppress(InvalidSignature):
                Ed25519PublicKey.from_public_bytes(key).verify(forged[32:], _signed_text(text))
                taken += 1
            with pytest.raises(ArtifactError, match="wrong"):
                check_signature(text, forged, required=None)
    assert taken > 50


@pytest.mark.parametrize("key", weak_keys(), ids=lambda key: key[::-1].hex()[:6] + key.hex()[:4])
def test_a_key_that_signs_anything_cannot_be_required(key: bytes, tmp_path: Path) -> None:
    line = Ed25519PublicKey.from_public_bytes(key).public_bytes(
        forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH
    )
    with pytest.raises(UsageError, match="no Ed25519 public key"):
        check_signature(TEXT, None, required=line.decode())


def test_the_weak_keys_are_all_points_of_small_order() -> None:
    """Three doublings of -x^2 + y^2 = 1 + d x^2 y^2 lead to (0, 1): from these y and from no other."""
    d = -121665 * pow(121666, -1, FIELD) % FIELD
    for y in WEAK_Y:
        x2, y2 = (y * y - 1) * pow(d * y * y + 1, -1, FIELD) % FIELD, y * y % FIELD  # squares of x and y
        for _ in range(3):
            product = d * x2 * y2
            x2, y2 = (
                4 * x2 * y2 * pow(1 + product, -2, FIELD) % FIELD,
                (y2 + x2) ** 2 * pow(1 - product, -2, FIELD) % FIELD,
            )
        assert (x2, y2) == (0, 1)
    assert len({y % FIELD for y in WEAK_Y}) == 5  # eight points, of which three pairs share their y


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
