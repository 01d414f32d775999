"""Rooms are described once all of them stand."""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from autoprune.artifact.export import export_model as export_model
    from autoprune.artifact.manifest import Architecture as Architecture
    from autoprune.artifact.manifest import Manifest as Manifest
    from autoprune.artifact.manifest import Preprocessing as Preprocessing
    from autoprune.artifact.manifest import manifest_of_run as manifest_of_run
    from autoprune.artifact.reader import member_chunks as member_chunks
    from autoprune.artifact.reader import open_artifact as open_artifact
    from autoprune.artifact.rebuild import architecture_of as architecture_of
    from autoprune.artifact.summary import artifact_text as artifact_text
    from autoprune.artifact.verify_artifact import audit as audit
    from autoprune.artifact.writer import load as load
    from autoprune.artifact.writer import sparse_weights as sparse_weights
    from autoprune.artifact.writer import write_artifact as write_artifact

# A look into a delivered file needs no torch, whose import takes seconds: names are imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "export": ["export_model"],
        "manifest": ["Architecture", "Manifest", "Preprocessing", "manifest_of_run"],
        "reader": ["member_chunks", "open_artifact"],
        "rebuild": ["architecture_of"],
        "summary": ["artifact_text"],
        "verify_artifact": ["audit"],
        "writer": ["load", "sparse_weights", "write_artifact"],
    },
)
