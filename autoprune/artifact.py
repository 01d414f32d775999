"""The delivered file: written whole or not at all, checked whole before anything of it is used.

`docs/format.md` is the specification. A file is a container, or a container inside age; encrypted files are
decrypted in memory. Every member's digest is checked against the manifest when a file is opened, the
manifest against a signature if one is required, and only then does anyone build a tensor.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from torch import nn

from autoprune.container import Buffer, Container, container_chunks, write_chunks
from autoprune.crypto import (
    AgeHeader,
    decrypt_to_memory,
    encrypt_chunks,
    is_encrypted,
    open_file,
    read_header,
)
from autoprune.errors import ArtifactError
from autoprune.expand import removed_indices
from autoprune.export import ExampleInputs, Exported, export_model, inference_copy
from autoprune.keys import KeySource
from autoprune.manifest import MAX_MANIFEST, InputSpec, Manifest, MemberDigest, Probe
from autoprune.program import load_program
from autoprune.rebuild import answers_probe, read_weights, rebuild_dense
from autoprune.signing import SIGNATURE_BYTES, check_signature, sign_manifest

if TYPE_CHECKING:
    from autoprune.graph import ChannelGraph

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
WEIGHTS, PROGRAM, ONNX = "model.safetensors", "model.pt2", "model.onnx"
ORDER = (MANIFEST, SIGNATURE, WEIGHTS, PROGRAM, ONNX)
REQUIRED = {MANIFEST, WEIGHTS, PROGRAM}
MAX_MEMBERS = 8
Identity = KeySource | Sequence[KeySource]


@dataclass(frozen=True, kw_only=True)
class Protection:
    """Who may open a file, and who vouches for it.

    Attributes:
        recipients: public keys (`age1...`, `ssh-...`, or files of them); none means no encryption by key.
        passphrase: instead of recipients.
        signing_key: file with an Ed25519 secret key.
    """

    recipients: Sequence[KeySource] = ()
    passphrase: str | None = None
    signing_key: KeySource | None = None


def write_artifact(
    path: KeySource,
    *,
    model: nn.Module,
    example_inputs: ExampleInputs,
    manifest: Manifest,
    graph: ChannelGraph | None = None,
    protection: Protection | None = None,
) -> Manifest:
    """Export a network and write it as one delivered file; returns the manifest as written.

    With recipients or a passphrase in `protection` the file is encrypted, and no plaintext touches the disk.

    Args:
        model: the dense network; left as it is.
        example_inputs: one tensor or a tuple; only shapes and types are used.
        manifest: what the run knows; inputs, probe, removed indices and digests are filled in here.
        graph: of the original, for which `manifest.plan` was made; needed for the sparse export.

    Raises:
        ArtifactError: the network cannot be exported, or the file not written; nothing is left of it.
        VerificationError: the exported forms compute something else.
        UsageError: a key cannot be used.
    """
    protection = protection or Protection()
    exported = export_model(model, example_inputs)
    members = {WEIGHTS: exported.safetensors, PROGRAM: exported.pt2}
    if exported.onnx is not None:
        members[ONNX] = exported.onnx
    full = _filled(manifest, exported, members)
    if graph is not None and manifest.plan is not None:
        full = replace(full, removed=removed_indices(graph, manifest.plan, inference_copy(model)))
    text = full.to_json().encode()
    first: list[tuple[str, Buffer]] = [(MANIFEST, text)]
    if protection.signing_key is not None:
        first.append((SIGNATURE, sign_manifest(text, protection.signing_key)))
    _write(Path(path), container_chunks([*first, *members.items()]), protection)
    return full


def _filled(manifest: Manifest, exported: Exported, members: Mapping[str, bytes]) -> Manifest:
    inputs = zip(exported.input_shapes, exported.input_dtypes, strict=True)
    return replace(
        manifest,
        inputs=tuple(InputSpec(shape=shape, dtype=dtype) for shape, dtype in inputs),
        probe=Probe(batch_size=exported.probe_batch, outputs=exported.probe),
        members={name: _digest(data) for name, data in members.items()},
    )


def _write(path: Path, chunks: Iterator[Buffer], protection: Protection) -> None:
    if protection.recipients or protection.passphrase is not None:
        encrypt_chunks(path, chunks, recipients=protection.recipients, passphrase=protection.passphrase)
    else:
        write_chunks(path, chunks)


def _digest(data: bytes) -> MemberDigest:
    return MemberDigest(sha256=hashlib.sha256(data).hexdigest(), size=len(data))


@dataclass(frozen=True, kw_only=True)
class Artifact:
    """A delivered file that was opened: all digests hold, and the signature if there is one.

    Attributes:
        header: what age shows of it; None for a plain container.
        signer: public key of the signature as an OpenSSH line; trusted only if it was required.
    """

    manifest: Manifest
    header: AgeHeader | None
    signer: str | None
    container: Container

    def member(self, name: str) -> bytes:
        """One member, its digest checked again on the bytes that are given out.

        Raises:
            ArtifactError: there is none, or it has changed since the file was opened.
        """
        if name not in self.manifest.members:
            raise ArtifactError(f"the file has no {name}", "see autoprune inspect for what it has")
        data = self.container.read(name)
        if _digest(data) != self.manifest.members[name]:
            raise _changed(name)
        return data


def _changed(name: str) -> ArtifactError:
    return ArtifactError(f"{name} is not the one that the manifest speaks of", "get the file again")


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
        ArtifactError: it is no delivered file, damaged, of another version, not openable by this key, or not
            signed as required.
        UsageError: a key cannot be read, or does not go with the file.
    """
    with open_file(Path(path)) as stream:
        header: AgeHeader | None = None
        source: BinaryIO = stream
        if is_encrypted(stream):
            header = read_header(stream)
            source = decrypt_to_memory(stream, identity=identity, passphrase=passphrase)
        yield _checked(source, header, require_signature)


def _checked(source: BinaryIO, header: AgeHeader | None, required: KeySource | None) -> Artifact:
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
            raise _changed(name)


def load(
    path: KeySource,
    *,
    identity: Identity | None = None,
    passphrase: str | None = None,
    require_signature: KeySource | None = None,
) -> nn.Module:
    """The delivered network, ready to use, in evaluation mode on the CPU.

    It is of the user's own class if that can be imported here and still computes the same, otherwise a module
    around the exported program; the numbers are the same. No plaintext of an encrypted file touches the disk.

    Args:
        identity: age identity file or files, or OpenSSH private key; the default identity if None.
        passphrase: for a file that was encrypted with one.
        require_signature: Ed25519 public key (file, or `ssh-ed25519 ...`) that must have signed the file.

    Raises:
        ArtifactError: see `open_artifact`.
    """
    with open_artifact(
        path, identity=identity, passphrase=passphrase, require_signature=require_signature
    ) as artifact:
        return build_module(artifact)


def build_module(artifact: Artifact) -> nn.Module:
    """The network of an opened file, as `load` gives it."""
    try:
        rebuilt = rebuild_dense(artifact.manifest, read_weights(artifact.member(WEIGHTS)))
    except ArtifactError as error:
        warnings.warn(f"{error.message}; using the exported program", UserWarning, stacklevel=3)
        rebuilt = None
    return rebuilt if rebuilt is not None else build_program(artifact)


def build_program(artifact: Artifact) -> nn.Module:
    """The network of an opened file from its exported program, without the user's class.

    Raises:
        ArtifactError: the program is not harmless, or does not answer the probe as it must.
    """
    module = load_program(artifact.member(PROGRAM))
    if not answers_probe(module, artifact.manifest):
        raise ArtifactError("model.pt2 does not answer the probe as the manifest says", "get the file again")
    return module
