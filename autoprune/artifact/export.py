"""The export of one network as safetensors, as an exported program and as ONNX, each checked against torch.

All three are made from a copy on the CPU in evaluation mode, so the caller's module stays as it is. ONNX is
made from the same exported program that is delivered. The probe is a fixed input whose answer goes into the
manifest: it tells a reader whether what was built computes the same.
"""

from __future__ import annotations

import copy
import logging
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from autoprune.artifact.onnx_check import check_onnx
from autoprune.artifact.program import write_program
from autoprune.errors import ArtifactError, VerificationError
from autoprune.torch_private import tree_leaves

OPSET = 18  # what torch's exporter writes exactly; asked for 17 it leaves 18
ONNX_LIMIT = (2 << 30) - (16 << 20)  # protobuf's 2 GiB, less room for everything but weights
ONNX_TOLERANCE = 1e-5  # a promise of the format (section 6)
PROBE_VALUES = 64  # a guess: enough to tell networks apart, and few bytes in the manifest
MAX_PROBE = 1 << 27  # numbers in one input: 1 GiB in float64; a file must not make its reader compute more
ExampleInputs = Tensor | tuple[Tensor, ...]
Shapes = tuple[tuple[int | None, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Exported:
    """One network in its three delivered forms; `onnx` is None where ONNX's size limit is exceeded.

    Attributes:
        input_shapes: one shape per input; None stands for a batch size that is free.
        input_dtypes: the names of the inputs' types as torch prints them, without `torch.`.
        probe_batch: the batch size of the probe.
        probe: the network's answer to the probe, up to 64 values.
    """

    safetensors: bytes
    pt2: bytes
    onnx: bytes | None
    input_shapes: tuple[tuple[int | None, ...], ...]
    input_dtypes: tuple[str, ...]
    probe_batch: int
    probe: tuple[float, ...]


def export_model(model: nn.Module, example_inputs: ExampleInputs) -> Exported:
    """Return a network in all delivered forms.

    Args:
        model: the network, in any mode and on any device; it is left untouched.
        example_inputs: one tensor or a tuple of them; only shapes and types are used, never the values.

    Raises:
        ArtifactError: the network cannot be exported, or only to something unsafe.
        VerificationError: ONNX Runtime or the exported program computes something else than torch does.
    """
    network = inference_copy(model)
    shapes, dtypes = _signature(example_inputs)
    with _quiet(), torch.no_grad():  # inside no_grad, a no_grad of the network's own leaves no trace
        program, free = _program(network, shapes, dtypes)
    batch = 2 if free[0][:1] == (None,) else (shapes[0] or (1,))[0]
    fits = sum(t.numel() * t.element_size() for t in network.state_dict().values()) < ONNX_LIMIT
    return Exported(
        safetensors=to_safetensors(network),
        pt2=write_program(program),
        onnx=to_onnx(program, network, free, dtypes) if fits else None,
        input_shapes=free,
        input_dtypes=dtypes,
        probe_batch=batch,
        probe=probe_answer(network, free, dtypes, batch),
    )


def inference_copy(model: nn.Module) -> nn.Module:
    """Return a copy of the network on the CPU, in evaluation mode, without gradients."""
    return copy.deepcopy(model).cpu().eval().requires_grad_(False)


def _signature(example: ExampleInputs) -> tuple[tuple[tuple[int, ...], ...], tuple[str, ...]]:
    inputs = (example,) if isinstance(example, Tensor) else tuple(example)
    return tuple(tuple(x.shape) for x in inputs), tuple(str(x.dtype).removeprefix("torch.") for x in inputs)


def _program(
    network: nn.Module, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]
) -> tuple[ExportedProgram, Shapes]:
    """Return the exported program, its batch size free where the network allows it, and its input shapes."""
    if all(shapes) and len({shape[0] for shape in shapes}) == 1:
        free: Shapes = tuple((None, *shape[1:]) for shape in shapes)
        try:
            example = probe_inputs(free, dtypes, batch=2)
            dynamic = tuple({0: Dim.AUTO} for _ in example)
            program = torch.export.export(network, example, dynamic_shapes=dynamic)
        except Exception:  # torch raises anything here; a network with a fixed batch is tried below
            logging.getLogger(__name__).debug("no free batch size", exc_info=True)
        else:
            if _has_free_batch(program):
                return program, free
    try:
        return torch.export.export(network, probe_inputs(shapes, dtypes, batch=1)), shapes
    except Exception as error:
        raise ArtifactError(
            f"the network cannot be exported: {str(error).strip()[:300]}",
            "see what torch.export.export says to the same network and inputs",
        ) from error


def _has_free_batch(program: ExportedProgram) -> bool:
    names = set(program.graph_signature.user_inputs)
    values = [n.meta["val"] for n in program.graph.nodes if n.op == "placeholder" and n.name in names]
    return all(isinstance(value.shape[0], torch.SymInt) for value in values)


def probe_inputs(
    shapes: Sequence[Sequence[int | None]], dtypes: Sequence[str], *, batch: int
) -> tuple[Tensor, ...]:
    """Return the fixed inputs of `docs/format.md`, section 7, with `batch` samples where the batch is free.

    Raises:
        ArtifactError: a type is unknown, or a shape is negative or too large.
    """
    return tuple(_probe_input(shape, dtype, batch) for shape, dtype in zip(shapes, dtypes, strict=True))


def _probe_input(shape: Sequence[int | None], dtype: str, batch: int) -> Tensor:
    sizes = [batch if size is None else size for size in shape]
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ArtifactError(f"the input type {dtype[:40]!r} is not known", "get the file again")
    if min(sizes, default=1) < 0 or math.prod(sizes) > MAX_PROBE:
        raise ArtifactError(f"the input shape {sizes[:8]} is not possible here", "get the file again")
    steps = torch.arange(math.prod(sizes), dtype=torch.float64)
    values = torch.sin(0.37 * steps) if kind.is_floating_point else steps % 2
    return values.to(kind).reshape(sizes)


def flat_tensors(output: Any) -> list[Tensor]:
    """Return all tensors in a network's output, in order."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def probe_answer(
    network: nn.Module, shapes: Sequence[Sequence[int | None]], dtypes: Sequence[str], batch: int
) -> tuple[float, ...]:
    """Return up to 64 values of a network's answer to the probe, evenly spread over all outputs."""
    with torch.no_grad():
        output = network(*probe_inputs(shapes, dtypes, batch=batch))
    values = torch.cat([t.detach().double().cpu().flatten() for t in flat_tensors(output)])
    picked = torch.linspace(0, len(values) - 1, min(PROBE_VALUES, len(values))).round().long()
    return tuple(float(v) for v in values[picked])


def to_safetensors(network: nn.Module) -> bytes:
    """Return the state dict as safetensors; a tensor that has several names is written under each of them."""
    tensors = {name: t.detach().cpu().clone().contiguous() for name, t in network.state_dict().items()}
    return bytes(save(tensors))


def to_onnx(program: ExportedProgram, network: nn.Module, shapes: Shapes, dtypes: Sequence[str]) -> bytes:
    """Return ONNX of opset 18, compared in ONNX Runtime with `network` to 1e-5 of the largest output.

    Raises:
        ArtifactError: the network has an operator that ONNX lacks.
        VerificationError: ONNX Runtime computes something else than the network does.
    """
    try:
        with _quiet():
            exported = torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False)
        assert exported is not None
        proto = exported.model_proto
    except Exception as error:  # the exporter wraps and raises anything
        raise ArtifactError(
            f"the network cannot be exported to ONNX: {str(error).strip()[:300]}",
            "see what torch.onnx.export says to the same network",
        ) from error
    _tidy_(proto)
    data = bytes(proto.SerializeToString())
    check_onnx(data)
    for batch in (1, 3):
        _compare(data, network, probe_inputs(shapes, dtypes, batch=batch))
    return data


def _tidy_(proto: Any) -> None:
    """Name inputs, outputs and the batch; drop documentation and metadata, where source paths are kept."""
    for kind, values in (("input", proto.graph.input), ("output", proto.graph.output)):
        names = {v.name: kind if len(values) == 1 else f"{kind}_{i}" for i, v in enumerate(values)}
        for value in values:
            value.name = names[value.name]
            for dim in value.type.tensor_type.shape.dim[:1]:
                if dim.dim_param:
                    dim.dim_param = "batch"
        for node in proto.graph.node:
            node.input[:] = [names.get(n, n) for n in node.input]
            node.output[:] = [names.get(n, n) for n in node.output]
    graph = proto.graph
    del graph.value_info[:]  # its symbolic sizes have torch's names; the graph does not need it
    parts = (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *proto.functions)
    for part in parts:
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def _compare(data: bytes, network: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    with torch.no_grad():
        expected = flat_tensors(network(*inputs))
    answers = [torch.as_tensor(answer) for answer in run_onnx(data, inputs)]
    error = max((relative_error(a, b) for a, b in zip(answers, expected, strict=True)), default=0.0)
    if error > ONNX_TOLERANCE:
        raise VerificationError(
            f"ONNX Runtime computes {error:.1e} (relative) beside torch, more than {ONNX_TOLERANCE:.0e}",
            "report the network: its ONNX form cannot be delivered",
        )


def relative_error(answer: Tensor, expected: Tensor) -> float:
    """Return max|answer - expected| / max|expected|, in float64; infinite for another shape or a NaN."""
    if answer.shape != expected.shape:
        return float("inf")
    a, b = answer.double(), expected.detach().cpu().double()
    if b.numel() == 0:
        return 0.0
    scale = float(b.abs().max())
    error = float((a - b).abs().max()) / (scale or 1.0)
    return error if error == error else float("inf")


def run_onnx(data: bytes, inputs: Sequence[Tensor]) -> list[Any]:
    """Run an ONNX file's bytes on the CPU and return the outputs as arrays."""
    session = silent_onnxruntime().InferenceSession(data, providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    feed = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
    return list(session.run(None, feed))


def silent_onnxruntime() -> Any:
    """Import `onnxruntime` so that it does not report to its maker.

    Since 1.29 its builds for Linux send events (names and hashes of graph and weights among them) and keep
    a database in the home folder, unless `ORT_DISABLE_TELEMETRY` is set before the first import (its
    Privacy.md). A value that the user has set stays.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime

    return onnxruntime


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch's exporters say about themselves; what they raise still comes through."""
    optimiser = logging.getLogger("onnxscript")
    level = optimiser.level
    optimiser.setLevel(logging.ERROR)  # it warns of every constant that it does not fold
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optimiser.setLevel(level)
