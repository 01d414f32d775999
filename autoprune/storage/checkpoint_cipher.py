"""The encryption of a run's checkpoints at rest, by age, to public keys whose secret key the run can reach.

What lies on the disk between two rounds is then as well protected as the delivered file. The run reads its
own checkpoints with an identity, and that it can is tried before anything starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyrage

from autoprune.config import Protection
from autoprune.crypto import default_identity_path, read_identities, read_recipients
from autoprune.errors import ArtifactError, UsageError
from autoprune.storage.run_store import CheckpointCipher

PROBE = b"can be read again"


def run_cipher(protection: Protection) -> CheckpointCipher | None:
    """Return the cipher of this run's checkpoints, None where they are not encrypted.

    Key files are read once, here, so that a key may come through a pipe or be taken away later.

    Raises:
        UsageError: a key cannot be read, no key opens what the run writes, or only half of it is asked for.
    """
    if not protection.run_recipients:
        if protection.run_identities:
            raise UsageError(
                "--run-identity is given without --encrypt-run", "say whom the checkpoints are encrypted to"
            )
        return None
    if protection.plain:
        raise UsageError(
            "--encrypt-run and --plain are given: checkpoints closed, and the result open beside them",
            "leave one of them out",
        )
    recipients, identities = (
        read_recipients(protection.run_recipients),
        _identities(protection.run_identities),
    )
    cipher = _cipher(recipients, identities)
    try:
        cipher.decrypt(cipher.encrypt(PROBE))
    except ArtifactError:
        raise UsageError(
            "the run could not read its own checkpoints: no key at hand opens what is encrypted to "
            f"{', '.join(r if len(r) < 24 else r[:20] + '...' for r in protection.run_recipients)}",
            "name the secret key with --run-identity, or add your own public key with another --encrypt-run",
        ) from None
    return cipher


def _cipher(recipients: Sequence[Any], identities: Sequence[Any]) -> CheckpointCipher:
    def encrypt(content: bytes) -> bytes:
        return bytes(pyrage.encrypt(content, recipients))

    def decrypt(content: bytes) -> bytes:
        try:
            return bytes(pyrage.decrypt(content, identities))
        except pyrage.DecryptError:
            raise ArtifactError(
                "a checkpoint of the run cannot be opened: the key is not the run's, or the file is damaged",
                "name the key that the run was started with: --run-identity FILE",
            ) from None

    return CheckpointCipher(encrypt=encrypt, decrypt=decrypt)


def _identities(files: Sequence[str]) -> list[Any]:
    if files:
        return read_identities(list(files))
    path = default_identity_path()
    if not path.exists():
        raise UsageError(
            f"the run has to read its own checkpoints, and there is no key file {path}",
            "name the secret key with --run-identity FILE, or make one with autoprune keygen",
        )
    return read_identities(path)
