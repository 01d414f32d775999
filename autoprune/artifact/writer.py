"""The delivered file: written whole or not at all, and loaded as a working network.

`docs/format.md` is the specification. What is written is exported and checked here; what is read was
opened and checked by `opening` before any tensor is built.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import save
from torch import nn

from autoprune.artifact.container import container_chunks
from autoprune.artifact.export import ExampleInputs, Exported, export_model, inference_copy
from autoprune.artifact.manifest import InputSpec, Manifest, Probe
from autoprune.artifact.program import load_program
from autoprune.artifact.reader import (
    MANIFEST,
    ONNX,
    PROGRAM,
    SIGNATURE,
    WEIGHTS,
    Artifact,
    Identity,
    digest_of,
    open_artifact,
)  # fmt: skip
from autoprune.artifact.rebuild import answers_probe, read_weights, rebuild_dense
from autoprune.artifact.sparse import expand_weights, removed_indices
from autoprune.config import Protection
from autoprune.crypto import KeySource, default_recipient, encrypt_chunks, sign_manifest
from autoprune.errors import ArtifactError
from autoprune.files import Buffer, write_chunks

if TYPE_CHECKING:
    from autoprune.structure import ChannelGraph

PLAIN = Protection(plain=True)


def write_artifact(
    path: KeySource,
    *,
    model: nn.Module,
    example_inputs: ExampleInputs,
    manifest: Manifest,
    graph: ChannelGraph | None = None,
    protection: Protection = PLAIN,
) -> Manifest:
    """Export a network and write it as one delivered file; returns the manifest as written.

    No plaintext of an encrypted file touches the disk.

    Args:
        model: the dense network; left as it is.
        example_inputs: one tensor or a tuple; only shapes and types are used.
        manifest: what the run knows; inputs, probe, removed indices and digests are filled in here.
        graph: of the original, for which `manifest.plan` was made; needed for the sparse export.
        protection: who may open the file, and who signs it.

    Raises:
        ArtifactError: the network cannot be exported, or the file not written; nothing is left of it.
        VerificationError: the exported forms compute something else.
        UsageError: a key cannot be used.
    """
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
        members={name: digest_of(data) for name, data in members.items()},
    )


def _write(path: Path, chunks: Iterator[Buffer], protection: Protection) -> None:
    if protection.plain:
        write_chunks(path, chunks)
        return
    recipients = protection.recipients
    if not recipients and protection.passphrase is None:
        recipients = (default_recipient(),)
    encrypt_chunks(path, chunks, recipients=recipients, passphrase=protection.passphrase)


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


def sparse_weights(artifact: Artifact) -> bytes:
    """The delivered weights in the original's shapes, zeros in between, as safetensors.

    Raises:
        ArtifactError: the file does not say which indices were removed.
    """
    manifest = artifact.manifest
    if manifest.plan is not None and not manifest.removed:
        raise ArtifactError("the file does not say which indices were removed", "write it with graph=...")
    weights = expand_weights(read_weights(artifact.member(WEIGHTS)), manifest.removed)
    return bytes(save(weights))
