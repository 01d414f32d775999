"""The delivered weights in the original's shapes, zero where something was removed.

The result loads into the user's untouched class. It needs neither that class nor its graph: the manifest
says, per parameter and dimension, which of the original's indices are gone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor, nn

from autoprune.artifact.loader import read_weights
from autoprune.artifact.reader import WEIGHTS, Artifact
from autoprune.errors import ArtifactError
from autoprune.plan import PruningPlan

if TYPE_CHECKING:
    from autoprune.structure import ChannelGraph

Removed = dict[str, dict[str, tuple[int, ...]]]
MAX_GROWTH = 1000  # times the delivered weights, and at least a mebibyte; a guess, far above any pruning


def removed_indices(graph: ChannelGraph, plan: PruningPlan, dense: nn.Module) -> Removed:
    """Return the original's indices that the plan removes, per parameter and dimension."""
    indices: dict[tuple[str, int], set[int]] = {}
    for group in graph.groups:
        keep = set(plan.kept(group.name, group.num_units).tolist())
        units = [u for u in range(group.num_units) if u not in keep]
        for member in group.members:
            positions = member.index[units].ravel().tolist()
            indices.setdefault((member.name, member.dim), set()).update(positions)
    result: Removed = {}
    names = dense.state_dict().keys()
    for (name, dim), removed in indices.items():
        for alias in _aliases(dense, name):
            if removed and alias in names:
                result.setdefault(alias, {})[str(dim)] = tuple(sorted(removed))
    return result


def _aliases(model: nn.Module, name: str) -> list[str]:
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(
        model.named_buffers(remove_duplicate=False)
    )
    return [other for other, tensor in tensors.items() if tensor is tensors.get(name)]


def sparse_weights(weights: Mapping[str, Tensor], removed: Removed) -> dict[str, Tensor]:
    """Return the delivered weights in the original's shapes, zero where something was removed.

    Raises:
        ArtifactError: the indices do not belong to these weights.
    """
    room = MAX_GROWTH * max(1 << 10, sum(t.numel() for t in weights.values()))
    try:
        return {name: _fill_zeros(tensor, removed.get(name, {}), room) for name, tensor in weights.items()}
    except (ValueError, IndexError, RuntimeError):
        raise ArtifactError("the removed indices do not fit the weights", "get the file again") from None


def _fill_zeros(tensor: Tensor, removed: Mapping[str, tuple[int, ...]], room: int) -> Tensor:
    """Insert zeros along the dimensions, after a check that the indices do not ask for too much.

    A few indices in a hostile file could ask for any amount of memory.
    """
    for text, indices in removed.items():
        dim = int(text)
        size = tensor.shape[dim] + len(indices)
        if tensor.numel() // max(1, tensor.shape[dim]) * size > room:
            raise ValueError("it grows without measure")
        if list(indices) != sorted(set(indices)) or (indices and not 0 <= indices[0] <= indices[-1] < size):
            raise ValueError("the indices are not ascending, or beyond the end")
        remaining = sorted(set(range(size)) - set(indices))
        shape = list(tensor.shape)
        shape[dim] = size
        index = torch.tensor(remaining, dtype=torch.int64)
        tensor = torch.zeros(shape, dtype=tensor.dtype).index_copy_(dim, index, tensor)
    return tensor


def sparse_safetensors(artifact: Artifact) -> bytes:
    """Return an opened file's weights in the original's shapes, zeros in between, as safetensors.

    Raises:
        ArtifactError: the file does not say which indices were removed.
    """
    manifest = artifact.manifest
    if manifest.plan is not None and not manifest.removed:
        raise ArtifactError("the file does not say which indices were removed", "write it with graph=...")
    weights = sparse_weights(read_weights(artifact.member(WEIGHTS)), manifest.removed)
    return bytes(save(weights))
