"""Layer norms and means over fewer channels that still compute what the masked original does.

A layer norm divides by the number of its channels. With some of them removed, their zeros still count in the
masked network: mean and variance are sums over what is left, divided by the original number. So a patched
module (`forward_mode`) normalises that way (Ba et al. 2016, "Layer Normalization", equation 3, with a fixed
H). It is slower than the fused operator, which is why widths behind a layer norm stay unless the user asks
for them (`norms="rescale"`).

The same goes for a mean over channels that are zero where they are removed, as in global response
normalisation (Woo et al. 2023, "ConvNeXt V2", section 3.1). There it costs nothing, and is always done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.structure.patches.forward_mode import PatchMode, mix_in_

PASSES_CALLS_ON = True  # see `recorder.source_line`

MEANS = (torch.mean, Tensor.mean)


class NormPatch:
    """A class that is mixed in before the user's: statistics count `autoprune_norm_width` channels."""

    autoprune_norm_width: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the user's forward under the mode."""
        with _NormMode(self.autoprune_norm_width, is_norm=isinstance(self, nn.LayerNorm)):
            return super().forward(*args, **kwargs)  # type: ignore[misc]


class _NormMode(PatchMode):
    """The mode that replaces layer norm over the last axis, and means over what is left of the channels."""

    def __init__(self, width: int, *, is_norm: bool) -> None:
        super().__init__()
        self.width, self.is_norm = width, is_norm

    def replace(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Make means and layer norms count the original width."""
        if func is F.layer_norm and self.is_norm:  # not those of modules in a module that takes a mean
            return layer_norm_of_width(*args, width=self.width, **kwargs)
        if func in MEANS:
            return mean_of_width(*args, width=self.width, **kwargs)
        return func(*args, **kwargs)


def mean_of_width(x: Tensor, dim: Any = None, keepdim: bool = False, *, width: int) -> Tensor:
    """Return the mean over an axis of `x` as if it held `width` channels, the missing ones zero."""
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
    """Normalise the last axis of (..., C) as if there were `width` channels, the missing ones zero."""
    mean = x.sum(-1, keepdim=True) / width
    centred = x - mean
    missing = width - x.shape[-1]
    variance = ((centred * centred).sum(-1, keepdim=True) + missing * mean * mean) / width
    normalised = centred * (variance + eps).rsqrt()
    scaled = normalised if weight is None else normalised * weight
    return scaled if bias is None else scaled + bias


def patch_norm_(module: nn.Module, width: int) -> None:
    """Change a module with sliced parameters, so that its statistics count `width` channels."""
    if not isinstance(module, NormPatch):  # one of an earlier pruning counts the original's width for good
        vars(module)["autoprune_norm_width"] = width
        mix_in_(module, NormPatch)
    if isinstance(module, nn.LayerNorm):
        module.normalized_shape = (len(module.weight),)
