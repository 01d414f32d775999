"""The writer: it exports a network, describes it, signs and encrypts it, whole or not at all.

`docs/format.md` is the specification.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

from autoprune.artifact.container import container_chunks
from autoprune.artifact.export import ExampleInputs, Exported, export_model, inference_copy
from autoprune.artifact.manifest import InputSpec, Manifest, Probe
from autoprune.artifact.reader import (
    MANIFEST,
    ONNX,
    PROGRAM,
    SIGNATURE,
    WEIGHTS,
    digest_of,
)  # fmt: skip
from autoprune.artifact.sparse import removed_indices
from autoprune.config import Protection
from autoprune.crypto import KeySource, default_recipient, encrypt_chunks, sign_manifest
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
    """Export a network and write it as one delivered file; return the manifest as written.

    No plaintext of an encrypted file touches the disk.

    Args:
        model: the dense network; it is left as it is.
        example_inputs: one tensor or a tuple; only shapes and types are used.
        manifest: the part that the run knows; this function fills in inputs, probe, removed indices, digests.
        graph: the original's graph, for which `manifest.plan` was made; needed for the sparse export.
        protection: who may open the file, and who signs it.

    Raises:
        ArtifactError: the network cannot be exported, or the file not written; nothing of it is left.
        VerificationError: the exported forms compute something else than the network does.
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
