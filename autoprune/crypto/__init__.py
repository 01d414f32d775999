"""Rooms are described once all of them stand."""

from autoprune.crypto.age import (
    AgeHeader,
    check_protection,
    decrypt_file,
    decrypt_to_memory,
    encrypt_chunks,
    is_encrypted,
    open_file,
    read_header,
    rewrap_file,
)
from autoprune.crypto.keys import (
    SECRET,
    KeySource,
    default_identity_path,
    default_recipient,
    keygen,
    read_identities,
    read_recipients,
)
from autoprune.crypto.signing import SIGNATURE_BYTES, check_signature, sign_manifest, signing_keygen

__all__ = [
    "SECRET",
    "SIGNATURE_BYTES",
    "AgeHeader",
    "KeySource",
    "check_protection",
    "check_signature",
    "decrypt_file",
    "decrypt_to_memory",
    "default_identity_path",
    "default_recipient",
    "encrypt_chunks",
    "is_encrypted",
    "keygen",
    "open_file",
    "read_header",
    "read_identities",
    "read_recipients",
    "rewrap_file",
    "sign_manifest",
    "signing_keygen",
]
