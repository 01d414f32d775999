"""Means over fewer channels that still compute what the masked original does.

A layer norm divides by the number of its channels. With some of them removed, their zeros still count in the
masked network: mean and variance are sums over what is left, divided by the original number. So a pruned
module changes to a subclass whose layer norm does that (Ba et al. 2016, equation 3, with a fixed H). It is
slower than the fused operator, which is why widths behind a layer norm stay as they are unless asked for.

The same goes for a mean over channels that are zero where they are removed, as in global response
normalisation (Woo et al. 2023, section 3.1): there it costs nothing, and is always done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoprune.structure.patches.reshape_patch import mix_in_


class NormPatch:
    """Mixed in before a module's class: statistics are taken over `autoprune_norm_width` channels."""

    autoprune_norm_width: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own forward."""
        with _NormMode(self.autoprune_norm_width, is_norm=isinstance(self, nn.LayerNorm)):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _NormMode(TorchFunctionMode):
    """Replaces layer norm over the last axis, and means over what is left of the channels."""

    def __init__(self, width: int, *, is_norm: bool) -> None:
        super().__init__()
        self.width, self.is_norm = width, is_norm

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is F.layer_norm and self.is_norm:  # not those of modules in a module that takes a mean
            return layer_norm_of_width(*args, width=self.width, **(kwargs or {}))
        if func in MEANS:
            return mean_of_width(*args, width=self.width, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


MEANS = (torch.mean, Tensor.mean)


def mean_of_width(x: Tensor, dim: Any = None, keepdim: bool = False, *, width: int) -> Tensor:
    """Mean over an axis of `x` as if it held `width` channels, the missing ones zero."""
    return x.sum(dim, keepdim=keepdim) / width


def layer_norm_of_width(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    width: int,
) -> Tensor:
    """Layer norm of (..., C) as if there were `width` channels, the missing ones zero."""
    mean = x.sum(-1, keepdim=True) / width
    centred = x - mean
    missing = width - x.shape[-1]
    variance = ((centred * centred).sum(-1, keepdim=True) + missing * mean * mean) / width
    normalised = centred * (variance + eps).rsqrt()
    scaled = normalised if weight is None else normalised * weight
    return scaled if bias is None else scaled + bias


def patch_norm_(module: nn.Module, width: int) -> None:
    """Change a module whose parameters are sliced already, so that its statistics count `width` channels."""
    if not isinstance(module, NormPatch):
        vars(module)["autoprune_norm_width"] = width
        mix_in_(module, NormPatch)
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (len(module.weight),)
