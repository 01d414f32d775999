"""The reader: it opens a delivered file, and checks all of it before anything of it is used.

A file is a container, or a container inside age, which is decrypted in memory. The manifest is checked
against a signature if one is required, every member against the manifest. Nothing here knows torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from autoprune.artifact.container import Container, container_chunks
from autoprune.artifact.manifest import MAX_MANIFEST, Manifest, MemberDigest
from autoprune.artifact.onnx_check import check_onnx
from autoprune.crypto import (
    SIGNATURE_BYTES,
    AgeHeader,
    KeySource,
    check_signature,
    decrypt_to_memory,
    is_encrypted,
    open_file,
    read_header,
    sign_manifest,
)
from autoprune.errors import ArtifactError
from autoprune.files import Buffer

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
WEIGHTS, PROGRAM, ONNX = "model.safetensors", "model.pt2", "model.onnx"
ORDER = (MANIFEST, SIGNATURE, WEIGHTS, PROGRAM, ONNX)
REQUIRED = {MANIFEST, WEIGHTS, PROGRAM}
MAX_MEMBERS = 8  # docs/format.md, section 1
Identity = KeySource | Sequence[KeySource]


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A delivered file that was opened: all digests hold, and the signature if there is one.

    Attributes:
        header: the part that age shows without a key; None for a plain container.
        signer: the public key of the signature as an OpenSSH line; trusted only if it was required.
    """

    manifest: Manifest
    header: AgeHeader | None
    signer: str | None
    container: Container

    def member(self, name: str) -> bytes:
        """Return one member; its digest is checked again, on the bytes that are returned.

        Raises:
            ArtifactError: the member is missing, has changed since the file was opened, or is ONNX that
                refers to something outside itself.
        """
        if name not in self.manifest.members:
            raise ArtifactError(f"the file has no {name}", "see autoprune inspect for what it has")
        # A plain file stays on the disk and may change after it was opened, hence a second check.
        data = self.container.read(name)
        if digest_of(data) != self.manifest.members[name]:
            raise _digest_error(name)
        if name == ONNX:
            check_onnx(data)
        return data


def _digest_error(name: str) -> ArtifactError:
    return ArtifactError(f"{name} is not the one that the manifest speaks of", "get the file again")


def digest_of(data: bytes) -> MemberDigest:
    """Return the size and SHA-256 of a member's bytes."""
    return MemberDigest(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


@contextmanager
def open_artifact(
    path: KeySource,
    *,
    identity: Identity | None = None,
    passphrase: str | None = None,
    require_signature: KeySource | None = None,
) -> Iterator[Artifact]:
    """Open a delivered file and check all of it; encrypted files are decrypted in memory.

    Raises:
        ArtifactError: the file is no delivered file, damaged, of another version, not openable by this key,
            or not signed as required.
        UsageError: a key cannot be read, or does not go with the file.
    """
    with open_file(Path(path)) as stream:
        header: AgeHeader | None = None
        source: BinaryIO = stream
        if is_encrypted(stream):
            header = read_header(stream)
            source = decrypt_to_memory(stream, identity=identity, passphrase=passphrase)
        yield _check(source, header, require_signature)


def _check(source: BinaryIO, header: AgeHeader | None, required: KeySource | None) -> Artifact:
    source.seek(0)
    if source.read(4) != b"PK\x03\x04":
        raise ArtifactError(
            "this is no delivered file of autoprune", "give a model.autoprune or model.autoprune.age"
        )
    container = Container(source, max_entries=MAX_MEMBERS)
    names = list(container.entries)
    if names != [n for n in ORDER if n in names] or not REQUIRED.issubset(names):
        raise ArtifactError("the members of the file are not those of the format", "get the file again")
    text = container.read(MANIFEST, limit=MAX_MANIFEST)
    signature = container.read(SIGNATURE, limit=SIGNATURE_BYTES) if SIGNATURE in names else None
    signer = check_signature(text, signature, required=required)
    manifest = Manifest.from_json(text)
    _check_digests(container, manifest)
    return Artifact(manifest=manifest, header=header, signer=signer, container=container)


def _check_digests(container: Container, manifest: Manifest) -> None:
    if set(manifest.members) != set(container.entries) - {MANIFEST, SIGNATURE}:
        raise ArtifactError("the manifest lists other members than the file has", "get the file again")
    for name, expected in manifest.members.items():
        digest = hashlib.sha256()
        for chunk in container.chunks(name):
            digest.update(chunk)
        if container.entries[name].size != expected.size or digest.hexdigest() != expected.sha256:
            raise _digest_error(name)


def member_chunks(artifact: Artifact, *, signing_key: KeySource | None = None) -> Iterator[Buffer]:
    """Yield the container of an opened file again, with a new signature if a key is given.

    Raises:
        UsageError: the key cannot sign.
    """
    text = artifact.container.read(MANIFEST)
    signature = artifact.container.read(SIGNATURE) if SIGNATURE in artifact.container.entries else None
    if signing_key is not None:
        signature = sign_manifest(text, signing_key)
    head: list[tuple[str, Buffer]] = [(MANIFEST, text)]
    if signature is not None:
        head.append((SIGNATURE, signature))
    return container_chunks(
        chain(head, ((name, artifact.member(name)) for name in artifact.manifest.members))
    )
