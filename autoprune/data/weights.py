"""Load trained weights into a network, without running anything that a file could smuggle in.

Weights come as `.safetensors`, which holds tensors alone, or as a file that `torch.save` wrote. The latter
is a pickle; it is read with `weights_only=True`, torch's restricted unpickler, which builds tensors and
plain containers and calls nothing else. That is as safe as torch's allow-list; where a file's origin is in
doubt, prefer `.safetensors`. Two usual wrappings are removed: a checkpoint dict around the state dict, and
key prefixes left by wrappers.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from autoprune.errors import UsageError

# What torch.load and load_file raise for bytes that are no weights; the unpickler runs whatever opcodes the
# first bytes happen to be, and so fails on its empty stack or memo before it sees that this is no pickle.
UNREADABLE = (
    SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError,
    TypeError, struct.error,
)  # fmt: skip
WRAPPERS = ("state_dict", "model_state_dict", "model")
Network = TypeVar("Network", bound=nn.Module)
COUNTER = ".num_batches_tracked"  # weights from before PyTorch 0.4.1 lack it, and nothing here reads it
PREFIXES = ("module.", "_orig_mod.")  # DataParallel and DistributedDataParallel; torch.compile


def load_weights_(model: Network, path: str | Path) -> Network:
    """Load the weights in the file `path` into `model`, in place, and return it; every key has to fit.

    Only `num_batches_tracked` may be missing: weights from before PyTorch 0.4.1 lack it.

    Raises:
        UsageError: the file is missing or no weights file, or its keys do not fit the model's; the message
            names the first missing, unexpected and mis-shaped key.
    """
    own, weights = model.state_dict(), read_weights(path)
    weights |= {n: own[n] for n in own if n.endswith(COUNTER) and n not in weights}
    problem = _misfit(own, weights)
    if problem:
        raise UsageError(
            f"the weights in {path} do not fit the network: {problem}",
            "check the network's name, its number of classes, and that the file belongs to it",
        )
    model.load_state_dict(weights)
    return model


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return the state dict in a `.safetensors` file or a `torch.save` checkpoint, unwrapped, on the CPU.

    Raises:
        UsageError: there is no such file, or it holds no state dict that is safe to read.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UsageError(f"there is no weights file {path}", "give a .safetensors, .pt or .pth file")
    weights = _unwrapped(_read(file))
    if weights is None:
        raise UsageError(
            f"{path} holds no state dict",
            "save one: torch.save(model.state_dict(), FILE), or safetensors.torch.save_file",
        )
    return _without_prefixes(weights)


def _read(file: Path) -> object:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{file} cannot be read as weights: {first_line[:160]}",
            "a state dict is needed, not a pickled module: torch.save(model.state_dict(), FILE)",
        ) from error


def _unwrapped(content: object) -> Mapping[str, Tensor] | None:
    while isinstance(content, Mapping):
        inner = next((content[w] for w in WRAPPERS if isinstance(content.get(w), Mapping)), None)
        if inner is None:
            break
        content = inner
    if isinstance(content, Mapping) and content and all(isinstance(v, Tensor) for v in content.values()):
        return content
    return None


def _without_prefixes(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weights_by_name = dict(weights)
    for prefix in PREFIXES * 2:
        if all(name.startswith(prefix) for name in weights_by_name):
            weights_by_name = {name.removeprefix(prefix): value for name, value in weights_by_name.items()}
    return weights_by_name


def _misfit(state: Mapping[str, Any], weights: Mapping[str, Tensor]) -> str:
    missing = [n for n in state if n not in weights]
    unexpected = [n for n in weights if n not in state]
    shapes = {n: (tuple(weights[n].shape), tuple(w.shape)) for n, w in state.items() if n in weights}
    misshaped = [f"{n} is {list(g)} in the file, {list(w)} in the network"
                 for n, (g, w) in shapes.items() if g != w]  # fmt: skip
    kinds = (("missing", missing), ("unexpected", unexpected), ("mis-shaped", misshaped))
    return "; ".join(f"{len(names)} {kind}, first {names[0]}" for kind, names in kinds if names)
