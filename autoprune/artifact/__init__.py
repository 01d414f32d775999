"""The delivered file: one encrypted container with everything that a network's user needs.

A **container** is a zip archive in one canonical layout. Its **members** are the network in three forms
(safetensors, exported program, ONNX) and a **manifest** that says what they are, where they come from and
what their digests are. A reader trusts none of it: everything is checked before torch sees a byte, nothing is
unpickled, and what was built counts only if it answers the **probe**, a fixed input, as the manifest says.
`docs/format.md` is the specification; `autoprune.crypto` closes, opens and signs the file.

Without torch, so that a look into a file is quick:

- `container` writes and reads the archive.
- `manifest` is what a file says about itself, as dataclasses and as strict JSON.
- `onnx_check` refuses ONNX that would reach outside itself.
- `reader` opens a file and checks all of it.
- `summary` shows a file in a few lines.

With torch, from a network to the file and back:

- `program_check` lists what an exported program may hold, and refuses the rest.
- `program` writes and loads the exported program.
- `export` makes the three forms and compares each with torch.
- `writer` writes the file.
- `loader` gives the network back, as the user's class where that can be built.
- `sparse` gives the weights in the original's shapes, with zeros.
- `verification` compares all forms of a file with each other.
"""

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from autoprune.artifact.export import export_model as export_model
    from autoprune.artifact.loader import architecture_of as architecture_of
    from autoprune.artifact.loader import load as load
    from autoprune.artifact.manifest import Architecture as Architecture
    from autoprune.artifact.manifest import Manifest as Manifest
    from autoprune.artifact.manifest import Preprocessing as Preprocessing
    from autoprune.artifact.manifest import manifest_of_run as manifest_of_run
    from autoprune.artifact.reader import member_chunks as member_chunks
    from autoprune.artifact.reader import open_artifact as open_artifact
    from autoprune.artifact.sparse import sparse_safetensors as sparse_safetensors
    from autoprune.artifact.summary import artifact_text as artifact_text
    from autoprune.artifact.verification import verify_artifact as verify_artifact
    from autoprune.artifact.writer import write_artifact as write_artifact

# A look into a delivered file needs no torch, whose import takes seconds: names are imported on first use.
__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "export": ["export_model"],
        "loader": ["architecture_of", "load"],
        "manifest": ["Architecture", "Manifest", "Preprocessing", "manifest_of_run"],
        "reader": ["member_chunks", "open_artifact"],
        "sparse": ["sparse_safetensors"],
        "summary": ["artifact_text"],
        "verification": ["verify_artifact"],
        "writer": ["write_artifact"],
    },
)
