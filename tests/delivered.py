"""A small network in all its delivered forms, for the tests of the delivered file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autoprune.artifact.container import Container, container_chunks
from autoprune.artifact.loader import architecture_of
from autoprune.artifact.manifest import Architecture, Manifest, Preprocessing, Provenance
from autoprune.artifact.writer import write_artifact
from autoprune.plan import PruningPlan
from autoprune.structure.densify import densify
from autoprune.structure.tracing import trace


class SmallNet(nn.Module):
    """Residual, with batch norm and dropout: what evaluation mode and pruning have to get right."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.first = nn.Conv2d(width, 2 * width, 3, padding=1)
        self.second = nn.Conv2d(2 * width, width, 1)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(width, 5)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        stem = torch.relu(self.norm(self.stem(x_BCHW)))
        x = stem + self.second(torch.relu(self.first(stem)))
        return self.head(self.drop(x.mean((2, 3))))


def small_net(width: int = 8) -> SmallNet:
    """The factory that the manifest names."""
    return SmallNet(width)


class SmallNetOf:
    """A factory that says itself how it is called."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.arguments = arguments

    def __call__(self) -> nn.Module:
        return small_net(**self.arguments)

    def source(self) -> tuple[str, dict[str, Any]]:
        return "tests.delivered:small_net", self.arguments


@dataclass(frozen=True, kw_only=True)
class Sample:
    """A pruned network with what is needed to deliver it, and its delivered file's bytes."""

    original: nn.Module
    dense: nn.Module
    example: Tensor
    manifest: Manifest
    data: bytes
    graph: Any


@cache
def sample() -> Sample:
    """Made once: exporting takes seconds. Nobody changes what is in it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = small_net()
        with torch.no_grad():
            for tensor in original.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(
                        torch.rand_like(tensor) - 0.3 if tensor.dim() > 1 else torch.rand_like(tensor) + 0.5
                    )
        example = torch.randn(4, 1, 6, 6)
    original.eval()
    graph = trace(original, example)
    plan = PruningPlan.random(graph, 0.4, seed=0)
    dense = densify(original, graph, plan).eval()
    manifest = Manifest(
        name="small",
        architecture=architecture_of(original, SmallNetOf({"width": 8})),
        plan=plan,
        preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)),
        class_names=("a", "b", "c", "d", "e"),
        provenance=Provenance(run="small", target="macs=0.5", versions={"torch": torch.__version__}),
    )
    memory = _Path()
    full = write_artifact(memory.path, model=dense, example_inputs=example, manifest=manifest, graph=graph)
    return Sample(
        original=original, dense=dense, example=example, manifest=full, data=memory.take(), graph=graph
    )


class _Path:
    """A file of its own that is read once and removed."""

    def __init__(self) -> None:
        import tempfile

        self._folder = tempfile.TemporaryDirectory()
        self.path = Path(self._folder.name) / "model.autoprune"

    def take(self) -> bytes:
        data = self.path.read_bytes()
        self._folder.cleanup()
        return data


def without_source(manifest: Manifest) -> Architecture:
    """The same architecture, but nobody can import it."""
    return Architecture(class_name=manifest.architecture.class_name)


def members_of(data: bytes) -> dict[str, bytes]:
    """All members of a container."""
    container = Container(io.BytesIO(data), max_entries=100_000)
    return {name: container.read(name) for name in container.entries}


def container_of(members: dict[str, bytes]) -> bytes:
    """A container with these members, in this order."""
    return b"".join(container_chunks(members.items()))


def with_honest_digests(members: dict[str, bytes]) -> bytes:
    """A file whose manifest speaks of the members as they are: a forger can do as much."""
    import hashlib

    def change(manifest: dict[str, Any]) -> None:
        manifest["members"] = {
            name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            for name, data in members.items()
            if not name.startswith("manifest")
        }

    return container_of(members | {"manifest.json": changed_json(members["manifest.json"], change)})


def changed_json(data: bytes, change: Callable[[Any], None]) -> bytes:
    """JSON after a change in place."""
    document = json.loads(data)
    change(document)
    return json.dumps(document).encode()
