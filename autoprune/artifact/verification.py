"""The checks of `autoprune verify`: whether a delivered file is whole, and is what its plan says.

Opening the file has checked digests and signature. Here its forms are compared with each other, and, where
the original's class can be built from its source, the network is made again from original and plan: once
dense, once in the original's shapes with zeros. All of them have to give the same answer to the probe.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoprune.artifact.export import ONNX_TOLERANCE, flat_tensors, probe_inputs, relative_error, run_onnx
from autoprune.artifact.loader import (
    answers_probe,
    build_original,
    input_signature,
    load_exactly_,
    read_weights,
    rebuild_dense,
)
from autoprune.artifact.program import load_program
from autoprune.artifact.reader import ONNX, PROGRAM, WEIGHTS, Artifact
from autoprune.artifact.sparse import sparse_weights
from autoprune.errors import AutopruneError


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check; `passed` is None where the check is not possible."""

    name: str
    passed: bool | None
    detail: str


def verify_artifact(artifact: Artifact) -> tuple[Check, ...]:
    """Run every check on an opened file, in order; a check that fails raises nothing."""
    members, signer = len(artifact.manifest.members), artifact.signer
    return (
        Check(name="digests", passed=True, detail=f"{members} members, SHA-256"),
        Check(name="signature", passed=True if signer else None, detail=signer or "not signed"),
        *_Comparison(artifact).checks(),
    )


class _Comparison:
    """The forms of one network, each compared with the exported program on the probe input."""

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.manifest = artifact.manifest
        self.probe: tuple[Tensor, ...] = ()
        self.expected: list[Tensor] = []
        self.weights: dict[str, Tensor] = {}

    def checks(self) -> Iterator[Check]:
        first = _guarded("program", self._program)
        yield first
        if first.passed:
            yield _guarded("weights", self._weights)
            yield _guarded("onnx", self._onnx)
            yield _guarded("dense", self._dense)
            yield _guarded("sparse", self._sparse)

    def _program(self) -> Check:
        shapes, dtypes = input_signature(self.manifest)
        batch = self.manifest.probe.batch_size if self.manifest.probe else 2
        self.probe = probe_inputs(shapes, dtypes, batch=batch)
        module = load_program(self.artifact.member(PROGRAM))
        self.weights = {n.removeprefix("program."): t for n, t in module.state_dict().items()}
        self.expected = self._answer(module)
        passed = answers_probe(module, self.manifest)
        return Check(name="program", passed=passed, detail="model.pt2 answers the probe as the manifest says")

    def _weights(self) -> Check:
        stored = read_weights(self.artifact.member(WEIGHTS))
        same = all(torch.equal(t, stored[n]) for n, t in self.weights.items() if n in stored)
        num_shared = len(stored.keys() & self.weights.keys())
        detail = f"model.safetensors and model.pt2 share {num_shared} of {len(stored)} tensors"
        return Check(name="weights", passed=same and num_shared > 0, detail=detail)

    def _onnx(self) -> Check:
        if ONNX not in self.manifest.members:
            return Check(name="onnx", passed=None, detail="the file has no ONNX form")
        answers = [torch.as_tensor(a) for a in run_onnx(self.artifact.member(ONNX), self.probe)]
        return self._compared("onnx", answers, "ONNX Runtime against torch")

    def _dense(self) -> Check:
        module = rebuild_dense(self.manifest, read_weights(self.artifact.member(WEIGHTS)))
        if module is None:
            return Check(name="dense", passed=None, detail=self._no_source())
        return self._compared("dense", self._answer(module), "original + plan against the delivered network")

    def _sparse(self) -> Check:
        original = build_original(self.manifest.architecture)
        if original is None or (self.manifest.plan is not None and not self.manifest.removed):
            return Check(name="sparse", passed=None, detail=self._no_source())
        weights = sparse_weights(read_weights(self.artifact.member(WEIGHTS)), self.manifest.removed)
        load_exactly_(original, weights)
        return self._compared(
            "sparse", self._answer(original), "original with zeros against the delivered network"
        )

    def _no_source(self) -> str:
        source = self.manifest.architecture
        return f"{source.factory or source.class_name} cannot be built here (is its folder on PYTHONPATH?)"

    def _answer(self, module: nn.Module) -> list[Tensor]:
        with torch.no_grad():
            return flat_tensors(module(*self.probe))

    def _compared(self, name: str, answers: list[Tensor], what: str) -> Check:
        error = max((relative_error(a, b) for a, b in zip(answers, self.expected, strict=True)), default=0.0)
        return Check(
            name=name, passed=error <= ONNX_TOLERANCE, detail=f"{what}: relative difference {error:.1e}"
        )


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except (AutopruneError, RuntimeError, ValueError) as error:
        return Check(name=name, passed=False, detail=str(error).splitlines()[0][:200])
