"""Rooms are described once all of them stand."""

from autoprune.artifact.export import export_model
from autoprune.artifact.manifest import Architecture, Manifest, Preprocessing, manifest_of_run
from autoprune.artifact.reader import member_chunks, open_artifact
from autoprune.artifact.summary import artifact_text
from autoprune.artifact.verify_artifact import audit
from autoprune.artifact.writer import Protection, load, sparse_weights, write_artifact

__all__ = [
    "Architecture",
    "Manifest",
    "Preprocessing",
    "Protection",
    "artifact_text",
    "audit",
    "export_model",
    "load",
    "manifest_of_run",
    "member_chunks",
    "open_artifact",
    "sparse_weights",
    "write_artifact",
]
