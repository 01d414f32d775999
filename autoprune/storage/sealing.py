"""A run's checkpoints encrypted at rest: age again, to public keys whose secret the run can reach.

What lies on the disk between two rounds is then as closed as the delivered file. The run reads its own
checkpoints through an identity; that it can is tried before anything starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyrage

from autoprune.config import Protection
from autoprune.crypto import default_identity_path, read_identities, read_recipients
from autoprune.errors import ArtifactError, UsageError
from autoprune.storage.run_store import Seal

TRIED = b"can be read again"


def run_seal(protection: Protection) -> Seal | None:
    """How this run's checkpoints are encrypted and opened; None where they are not encrypted.

    Key files are read once, here: one that is a pipe or is taken away later will do.

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
    recipients = read_recipients(protection.run_recipients)
    identities = _identities(protection.run_identities)
    seal = _seal(recipients, identities)
    try:
        seal.open(seal.close(TRIED))
    except ArtifactError:
        raise UsageError(
            "the run could not read its own checkpoints: no key at hand opens what is encrypted to "
            f"{', '.join(r if len(r) < 24 else r[:20] + '...' for r in protection.run_recipients)}",
            "name the secret key with --run-identity, or add your own public key with another --encrypt-run",
        ) from None
    return seal


def _seal(recipients: Sequence[Any], identities: Sequence[Any]) -> Seal:
    def close(content: bytes) -> bytes:
        return bytes(pyrage.encrypt(content, recipients))

    def open_(content: bytes) -> bytes:
        try:
            return bytes(pyrage.decrypt(content, identities))
        except pyrage.DecryptError:
            raise ArtifactError(
                "a checkpoint of the run cannot be opened: the key is not the run's, or the file is damaged",
                "name the key that the run was started with: --run-identity FILE",
            ) from None

    return Seal(close=close, open=open_)


def _identities(given: Sequence[str]) -> list[Any]:
    if given:
        return read_identities(list(given))
    path = default_identity_path()
    if not path.exists():
        raise UsageError(
            f"the run has to read its own checkpoints, and there is no key file {path}",
            "name the secret key with --run-identity FILE, or make one with autoprune keygen",
        )
    return read_identities(path)
