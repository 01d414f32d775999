"""Signatures: Ed25519 (RFC 8032) over the manifest's digest, so that a file says who made it.

Encryption does not say it: anyone can encrypt to a public key. A signature is the public key and 64 bytes;
it counts only against a key that the reader names (`docs/format.md`, section 4). Keys are files as
`ssh-keygen -t ed25519` writes them, or PEM.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization as forms
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from autoprune.crypto.keys import KeySource, read_key_file, write_secret
from autoprune.errors import ArtifactError, UsageError

CONTEXT = b"autoprune manifest v1\n\0"
KEY_BYTES, SIGNATURE_BYTES = 32, 96
RAW = forms.Encoding.Raw, forms.PublicFormat.Raw
FIELD = 2**255 - 19
ORDER_8 = 0x7A03AC9277FDC74EC6CC392CFA53202A0F67100D760B3CBA4FD84D3D706A17C7  # d y^4 + 2 y^2 = 1
WEAK_Y = {0, 1, FIELD - 1, FIELD, FIELD + 1, ORDER_8, FIELD - ORDER_8}


def signing_keygen(path: KeySource) -> str:
    """Make an Ed25519 key in a new OpenSSH file, its public half in `PATH.pub`; return the public line.

    Raises:
        UsageError: one of the files exists, or cannot be made.
    """
    key = Ed25519PrivateKey.generate()
    secret = key.private_bytes(forms.Encoding.PEM, forms.PrivateFormat.OpenSSH, forms.NoEncryption())
    public = key.public_key().public_bytes(forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH)
    target = Path(path).expanduser()
    public_file = target.with_name(target.name + ".pub")
    if public_file.exists():
        raise UsageError(f"{public_file} exists, and keys are never overwritten", "choose another name")
    write_secret(target, secret)
    public_file.write_bytes(public + b"\n")
    return public.decode()


def sign_manifest(manifest: bytes, key_file: KeySource) -> bytes:
    """Sign the bytes of a manifest; return the public key and the signature, 96 bytes together.

    Raises:
        UsageError: the file holds no Ed25519 secret key without a passphrase.
    """
    key = _secret_key(Path(key_file).expanduser())
    return key.public_key().public_bytes(*RAW) + key.sign(_signed_text(manifest))


def _signed_text(manifest: bytes) -> bytes:
    return CONTEXT + hashlib.sha256(manifest).digest()


def _secret_key(path: Path) -> Ed25519PrivateKey:
    content = read_key_file(path)
    loaders = (forms.load_ssh_private_key, forms.load_pem_private_key)
    for load in loaders:
        try:
            key = load(content, None)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            continue
        if isinstance(key, Ed25519PrivateKey):
            return key
    raise UsageError(
        f"{path} holds no Ed25519 secret key that can be used without a passphrase",
        "make one with: autoprune keygen --signing",
    )


def read_public_key(source: KeySource) -> bytes:
    """Read the 32 bytes of an Ed25519 public key: an `ssh-ed25519 ...` text, a file with one, or PEM.

    Raises:
        UsageError: there is no such key.
    """
    is_text = isinstance(source, str) and source.startswith("ssh-ed25519 ")
    content = str(source).encode() if is_text else read_key_file(Path(source).expanduser())
    for load in (forms.load_ssh_public_key, forms.load_pem_public_key):
        try:
            key = load(content)
        except (ValueError, TypeError, UnsupportedAlgorithm):
            continue
        if isinstance(key, Ed25519PublicKey) and not _is_weak(raw := key.public_bytes(*RAW)):
            return raw
    raise UsageError(f"{source} is no Ed25519 public key", "give the .pub file, or its line ssh-ed25519 ...")


def check_signature(manifest: bytes, signature: bytes | None, *, required: KeySource | None) -> str | None:
    """Check a signature, and that it is by the required key; return its public key as an OpenSSH line.

    Raises:
        ArtifactError: the signature is wrong, or a key is required and the signature is missing or by
            another key.
        UsageError: the required key cannot be read.
    """
    required_key = None if required is None else read_public_key(required)
    if signature is None:
        if required_key is not None:
            raise ArtifactError(
                "the file is not signed, and a signature was required", "ask its author for a signed one"
            )
        return None
    if len(signature) != SIGNATURE_BYTES or _is_weak(signature[:KEY_BYTES]):
        raise _signature_error()
    public = Ed25519PublicKey.from_public_bytes(signature[:KEY_BYTES])
    try:
        public.verify(signature[KEY_BYTES:], _signed_text(manifest))
    except InvalidSignature:
        raise _signature_error() from None
    if required_key is not None and required_key != signature[:KEY_BYTES]:
        raise ArtifactError(
            "the file is signed by another key than the required one", "ask its author which key it is"
        )
    return public.public_bytes(forms.Encoding.OpenSSH, forms.PublicFormat.OpenSSH).decode()


def _is_weak(public: bytes) -> bool:
    """Return whether a public key is a point of small order (RFC 8032, section 5.1): it "signs" any text.

    Nobody has the secret half of such a key and nobody needs it: with the signature all zeros the key of
    zeros holds for one text in four. OpenSSL does not check it. The y coordinate alone decides, whatever
    the sign bit.
    """
    return int.from_bytes(public, "little") % 2**255 in WEAK_Y


def _signature_error() -> ArtifactError:
    return ArtifactError("the file's signature is wrong", "get the file again from its author")
