"""The exported program (`model.pt2`): stripped when written, and loaded after a check.

Torch's own file holds the user's example input, pickled, and stack traces with lines and paths of the user's
source; the writer leaves both out. What is loaded is a module in evaluation mode, for which neither the
user's class nor this package's structure layer is needed.
"""

from __future__ import annotations

import io
import json
import zipfile
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from autoprune.artifact.container import container_chunks
from autoprune.artifact.program_check import MODEL, SAMPLES, check_program
from autoprune.errors import ArtifactError, UsageError


def write_program(program: ExportedProgram) -> bytes:
    """Return what `torch.export.save` writes, without sample inputs and metadata, in the canonical container.

    Raises:
        ArtifactError: the program holds something that a reader would have to refuse.
    """
    program.example_inputs = None
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    members = []
    with zipfile.ZipFile(buffer) as archive:
        for name in archive.namelist():
            data = archive.read(name)
            members.append((name, _stripped(data) if name == MODEL else b"" if name == SAMPLES else data))
    result = b"".join(container_chunks(members))
    check_program(result)
    return result


def _stripped(model_json: bytes) -> bytes:
    document = json.loads(model_json)
    module = document["graph_module"]
    for node in module["graph"]["nodes"]:
        node["metadata"] = {}
    module["metadata"] = {}
    module["module_call_graph"] = [call for call in module["module_call_graph"] if call["fqn"] == ""]
    document["guards_code"] = []
    return json.dumps(document, separators=(",", ":")).encode()


class DeliveredProgram(nn.Module):
    """An exported program as a module: evaluation only, callable as the original was.

    Its parameters and buffers carry their original names under `program.`.
    """

    def __init__(self, program: nn.Module) -> None:
        super().__init__()
        self.program = program
        self.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the original's `forward` returns in evaluation mode."""
        return self.program(*args, **kwargs)

    def train(self, mode: bool = True) -> DeliveredProgram:
        """Refuse any mode but evaluation.

        Raises:
            UsageError: training mode is asked for; the exported program has none.
        """
        if mode:
            raise UsageError(
                "a network loaded from its exported program cannot be trained",
                "make the network's own class importable where the file is loaded",
            )
        self.training = False
        for module in self.program.modules():
            module.training = False
        return self


def load_program(data: bytes) -> nn.Module:
    """Build the network from a program's bytes, after checking them.

    Raises:
        ArtifactError: the program holds what it may not, or this version of torch cannot read it.
    """
    check_program(data)
    try:
        program = torch.export.load(io.BytesIO(data)).module(check_guards=False)
    except Exception as error:  # torch raises anything here, from AssertionError to KeyError
        raise ArtifactError(
            f"torch {torch.__version__} cannot load model.pt2 ({type(error).__name__}: {str(error)[:200]})",
            "install the version of torch that autoprune inspect names, or use model.onnx",
        ) from None
    return DeliveredProgram(program)
