"""The way back from a delivered file to its network: in the user's own class, or as the exported program.

`reader` has checked the file before any tensor is built here. The user's class is built from its source:
the original by its factory, then the plan is applied and the weights are loaded. The source is a name in a
file, and a file may be hostile: a name is only ever called if it is a subclass of `torch.nn.Module`, or a
function annotated to return one, outside the standard library, with plain arguments. What was built counts
only if it answers the probe as the delivered network did.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import typing
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from autoprune.artifact.export import probe_answer, probe_inputs
from autoprune.artifact.manifest import Architecture, Manifest
from autoprune.artifact.program import load_program
from autoprune.artifact.reader import PROGRAM, WEIGHTS, Artifact, Identity, open_artifact
from autoprune.crypto import KeySource
from autoprune.errors import ArtifactError, AutopruneError
from autoprune.plan import PruningPlan
from autoprune.structure import densify, trace

MAX_SAFETENSORS_HEADER = 32 << 20  # docs/format.md, section 2; the library alone allows 100 MB
PROBE_TOLERANCE = 1e-4  # a guess: far above the rounding of another machine, far below another network
FACTORY = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*:[A-Za-z_][A-Za-z0-9_.]*", re.ASCII)
WORD = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)  # no path, no address


def load(
    path: KeySource,
    *,
    identity: Identity | None = None,
    passphrase: str | None = None,
    require_signature: KeySource | None = None,
) -> nn.Module:
    """Return the delivered network, ready to use, in evaluation mode on the CPU.

    The network is of the user's own class if that class can be imported here and still computes the same,
    otherwise it is a module around the exported program; the numbers are the same. No plaintext of an
    encrypted file touches the disk.

    Args:
        identity: age identity file or files, or OpenSSH private key; the default identity if None.
        passphrase: the passphrase of a file that was encrypted with one.
        require_signature: Ed25519 public key (file, or `ssh-ed25519 ...`) that must have signed the file.

    Raises:
        ArtifactError: the file is refused, see `open_artifact`.
    """
    with open_artifact(
        path, identity=identity, passphrase=passphrase, require_signature=require_signature
    ) as artifact:
        return build_module(artifact)


def build_module(artifact: Artifact) -> nn.Module:
    """Return the network of an opened file, as `load` does."""
    try:
        rebuilt = rebuild_dense(artifact.manifest, read_weights(artifact.member(WEIGHTS)))
    except ArtifactError as error:
        warnings.warn(f"{error.message}; using the exported program", UserWarning, stacklevel=3)
        rebuilt = None
    return rebuilt if rebuilt is not None else build_program(artifact)


def build_program(artifact: Artifact) -> nn.Module:
    """Return the network of an opened file from its exported program, without the user's class.

    Raises:
        ArtifactError: the program holds what it may not, or does not answer the probe as it must.
    """
    module = load_program(artifact.member(PROGRAM))
    if not answers_probe(module, artifact.manifest):
        raise ArtifactError("model.pt2 does not answer the probe as the manifest says", "get the file again")
    return module


def architecture_of(model: nn.Module, factory: object = None) -> Architecture:
    """Return what the manifest says about the original: its class, and its factory where there is one.

    A factory is named if it can be imported under its own name and called with plain arguments. One that
    has a method `source()`, which gives `module:qualname` and the keyword arguments, speaks for itself; any
    other is taken to need no arguments.

    Args:
        model: the original network.
        factory: the function or class that built it, or an object that is called like one. A network is no
            factory: how it was built is not known.
    """
    class_name = type(model).__qualname__
    if not callable(factory) or isinstance(factory, nn.Module) or inspect.ismethod(factory):
        return Architecture(class_name=class_name)
    arguments: dict[str, Any] = {}
    if (source := getattr(factory, "source", None)) is not None:
        name, arguments = source()
    else:
        name = f"{getattr(factory, '__module__', '')}:{getattr(factory, '__qualname__', '')}"
    if (
        not FACTORY.fullmatch(name)
        or name.startswith("__main__:")  # another process has another main module
        or not all(map(_is_plain, arguments.values()))
    ):
        return Architecture(class_name=class_name)
    return Architecture(class_name=class_name, factory=name, arguments=arguments)


def _is_plain(value: object) -> bool:
    return (
        value is None
        or isinstance(value, bool | int | float)
        or bool(isinstance(value, str) and WORD.fullmatch(value))
    )


def find_factory(architecture: Architecture) -> Callable[..., nn.Module] | None:
    """Import the original's factory; return None if it cannot be imported or may not be called."""
    if architecture.factory is None or not FACTORY.fullmatch(architecture.factory):
        return None
    module_name, _, qualname = architecture.factory.partition(":")
    if module_name.split(".")[0] in sys.stdlib_module_names or not all(
        map(_is_plain, architecture.arguments.values())
    ):
        return None
    try:
        factory: Any = importlib.import_module(module_name)
        for part in qualname.split("."):
            factory = getattr(factory, part)
    except Exception:  # a module may do and raise anything while it is imported
        return None
    return factory if _builds_module(factory) else None


def _builds_module(factory: object) -> bool:
    if inspect.isclass(factory):
        return issubclass(factory, nn.Module)
    if not inspect.isfunction(factory):
        return False
    try:
        result = typing.get_type_hints(factory).get("return")
    except Exception:  # annotations are text, and may name anything
        return False
    return inspect.isclass(result) and issubclass(result, nn.Module)


def build_original(architecture: Architecture) -> nn.Module | None:
    """Build the original network, freshly initialised, on the CPU; None if its source cannot be used here.

    The state of torch's random numbers stays as it was.
    """
    factory = find_factory(architecture)
    if factory is None:
        return None
    state = torch.get_rng_state()
    try:
        return factory(**architecture.arguments).cpu().eval()
    except Exception:  # the user's code, perhaps another version of it
        return None
    finally:
        torch.set_rng_state(state)


def rebuild_dense(manifest: Manifest, weights: Mapping[str, Tensor]) -> nn.Module | None:
    """Build the delivered network in the user's class; None if its source cannot be used here.

    Raises:
        ArtifactError: the source was found, but what it builds is not the delivered network.
    """
    original = build_original(manifest.architecture)
    if original is None:
        return None
    try:
        dense = original if manifest.plan is None else _apply(original, manifest, manifest.plan)
        load_exactly_(dense, weights)
    except (AutopruneError, RuntimeError) as error:
        raise _network_error(manifest, str(error).splitlines()[0]) from None
    dense.eval()
    if not answers_probe(dense, manifest):
        raise _network_error(manifest, "it answers the probe differently")
    return dense


def _apply(original: nn.Module, manifest: Manifest, plan: PruningPlan) -> nn.Module:
    shapes, dtypes = input_signature(manifest)
    example = probe_inputs(shapes, dtypes, batch=manifest.probe.batch_size if manifest.probe else 2)
    graph = trace(original, example)
    if not plan.keep.keys() <= {g.name for g in graph.groups}:  # channels behind layer norms were pruned, too
        graph = trace(original, example, norms="rescale")
    return densify(original, graph, plan)


def _network_error(manifest: Manifest, why: str) -> ArtifactError:
    return ArtifactError(
        f"{manifest.architecture.factory} does not build the delivered network here: {why[:200]}",
        "use the version of the code that the network was trained with",
    )


def input_signature(manifest: Manifest) -> tuple[list[tuple[int | None, ...]], list[str]]:
    """Return the shapes and types of the inputs."""
    return [i.shape for i in manifest.inputs], [i.dtype for i in manifest.inputs]


def load_exactly_(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load a state dict in place; names, shapes and types have to be the network's own.

    Raises:
        ArtifactError: a type differs.
        RuntimeError: a name or shape differs (from torch, which names them).
    """
    own = network.state_dict()
    for name, tensor in weights.items():
        if name in own and own[name].dtype != tensor.dtype:
            raise ArtifactError(f"{name} is {tensor.dtype}, not {own[name].dtype}", "use the same type")
    network.load_state_dict(dict(weights), strict=True)


def answers_probe(network: nn.Module, manifest: Manifest) -> bool:
    """Return whether a network gives the answer in the manifest to the probe input."""
    if manifest.probe is None:
        return False
    shapes, dtypes = input_signature(manifest)
    try:
        answer = probe_answer(network, shapes, dtypes, manifest.probe.batch_size)
    except Exception:  # another network may fail in any way on these inputs
        return False
    expected = torch.tensor(manifest.probe.outputs, dtype=torch.float64)
    if len(answer) != len(expected):
        return False
    error = (torch.tensor(answer, dtype=torch.float64) - expected).abs().max()
    return bool(error <= PROBE_TOLERANCE * expected.abs().max())


def read_weights(data: bytes) -> dict[str, Tensor]:
    """Read the tensors of a safetensors member, after a check of its header's size.

    Raises:
        ArtifactError: the member is no safetensors file, or its header is oversized.
    """
    size = int.from_bytes(data[:8], "little")
    try:
        if len(data) < 8 or size > min(MAX_SAFETENSORS_HEADER, len(data) - 8):
            raise ArtifactError("the header of model.safetensors is oversized", "get the file again")
        return load_safetensors(data)
    except (SafetensorError, KeyError, ValueError, RuntimeError):
        raise ArtifactError("model.safetensors is no safetensors file", "get the file again") from None
