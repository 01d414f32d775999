"""Keys, encryption and signatures, all of them standards that others read: age v1, Ed25519, OpenSSH files.

A **recipient** is a public key to which a file is encrypted, an **identity** the secret key that opens it;
a passphrase may stand in for both. Encryption does not say who made a file, a **signature** does. The room
knows files and bytes; their content is the business of `autoprune.artifact` and `autoprune.storage`.

- `keys` makes and reads the files that hold recipients and identities.
- `age` encrypts and decrypts, bounds what a stranger's header may ask for, and tells one error from another.
- `signing` signs a manifest and checks signatures.
"""

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
