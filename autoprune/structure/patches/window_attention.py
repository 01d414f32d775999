"""The window attention of torchvision (Swin, Swin V2, MaxViT) with any number of heads.

`attention` has the same for torch's own. These classes are apart so that torchvision is only imported for
networks that come from it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.maxvit import RelativePositionalMultiHeadAttention
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

LOG_100 = 4.605170185988092  # the cap of Swin V2's logit scale


def _swin_forward(self: Any, x: Tensor) -> Any:
    """Attend in shifted windows (Liu et al. 2021, section 3.2) on (B, H, W, C), any number of heads."""
    batch, height, width, channels = x.shape
    size = self.window_size
    pad_h, pad_w = -height % size[0], -width % size[1]
    x = F.pad(x, (0, 0, 0, pad_w, 0, pad_h))
    rows, columns = (height + pad_h) // size[0], (width + pad_w) // size[1]
    shift = [0 if s >= n else k for s, n, k in zip(size, x.shape[1:3], self.shift_size, strict=True)]
    if any(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    windows = x.view(batch, rows, size[0], columns, size[1], channels).transpose(2, 3)
    tokens = windows.reshape(batch * rows * columns, size[0] * size[1], channels)
    mixed = self.attend_(tokens, _shift_mask(x, size, shift) if any(shift) else None)
    mixed = F.dropout(self.proj(mixed), p=self.dropout, training=self.training)
    windows = mixed.view(batch, rows, columns, size[0], size[1], channels).transpose(2, 3)
    x = windows.reshape(batch, rows * size[0], columns * size[1], channels)
    if any(shift):
        x = torch.roll(x, (shift[0], shift[1]), (1, 2))
    return x[:, :height, :width, :].contiguous()


def _shift_mask(x: Tensor, size: list[int], shift: list[int]) -> Tensor:
    """Return the mask of shifted windows, (windows, 1, tokens, tokens).

    It is -100 between tokens that were not neighbours before the shift, and 0 elsewhere.
    """
    _, height, width, _ = x.shape
    bands = []
    for length, window, step in ((height, size[0], shift[0]), (width, size[1], shift[1])):
        position = torch.arange(length, device=x.device)
        bands.append((position >= length - window).long() + (position >= length - step).long() * (step > 0))
    region = bands[0][:, None] * 3 + bands[1][None, :]
    blocks = region.view(height // size[0], size[0], width // size[1], size[1]).transpose(1, 2)
    flat = blocks.reshape(-1, size[0] * size[1])
    apart = flat[:, None, :] != flat[:, :, None]
    return torch.zeros(apart.shape, dtype=x.dtype, device=x.device).masked_fill(apart, -100.0).unsqueeze(1)


def _swin_attend(self: Any, tokens: Tensor, mask: Tensor | None) -> Any:
    """Attend inside windows: (windows, tokens, C) -> (windows, tokens, heads x head_dim)."""
    qkv = self._qkv(tokens).unflatten(-1, (3, self.num_heads, self.head_dim))
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    scores = self._scores(q, k) + self.get_relative_position_bias()
    if mask is not None:
        split = scores.unflatten(0, (-1, len(mask))) + mask
        scores = split.flatten(0, 1)
    weights = F.dropout(torch.softmax(scores, dim=-1), p=self.attention_dropout, training=self.training)
    return (weights @ v).transpose(1, 2).flatten(2)


class PrunedShiftedWindowAttention(ShiftedWindowAttention):  # type: ignore[misc]
    """Swin attention with any number of heads."""

    attend_ = _swin_attend
    forward = _swin_forward

    def _qkv(self, tokens: Tensor) -> Tensor:
        return self.qkv(tokens)  # type: ignore[no-any-return]

    def _scores(self, q: Tensor, k: Tensor) -> Any:
        return (q * self.head_dim**-0.5) @ k.transpose(-2, -1)


class PrunedShiftedWindowAttentionV2(ShiftedWindowAttentionV2):  # type: ignore[misc]
    """Swin V2 attention (Liu et al. 2022, section 3.3): cosine scores, no bias on the keys."""

    attend_ = _swin_attend
    forward = _swin_forward

    def _qkv(self, tokens: Tensor) -> Tensor:
        bias = self.qkv.bias
        if bias is not None:
            third = len(bias) // 3
            bias = torch.cat([bias[:third], torch.zeros_like(bias[:third]), bias[2 * third :]])
        return F.linear(tokens, self.qkv.weight, bias)

    def _scores(self, q: Tensor, k: Tensor) -> Any:
        cosine = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        return cosine * torch.clamp(self.logit_scale, max=LOG_100).exp()


class PrunedRelativeAttention(RelativePositionalMultiHeadAttention):  # type: ignore[misc]
    """MaxViT attention (Tu et al. 2022, section 3.1) with any number of heads."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend inside groups: (B, G, P, D) -> (B, G, P, D)."""
        qkv = self.to_qkv(x).unflatten(-1, (3, self.n_heads, self.head_dim))
        q, k, v = qkv.permute(3, 0, 1, 4, 2, 5)
        scores = q @ (k * self.scale_factor).transpose(-2, -1) + self.get_relative_positional_bias()
        mixed = torch.softmax(scores, dim=-1) @ v
        return self.merge(mixed.transpose(2, 3).flatten(3))  # type: ignore[no-any-return]


PRUNED: dict[type[nn.Module], type[nn.Module]] = {
    ShiftedWindowAttention: PrunedShiftedWindowAttention,
    ShiftedWindowAttentionV2: PrunedShiftedWindowAttentionV2,
    RelativePositionalMultiHeadAttention: PrunedRelativeAttention,
}


def patch_window_attention_(module: Any) -> None:
    """Change a module with fewer heads, whose head count is set already, to the class that allows that."""
    pruned = PRUNED.get(type(module))
    if pruned is None:
        return
    into, out = (
        (module.to_qkv, module.merge) if pruned is PrunedRelativeAttention else (module.qkv, module.proj)
    )
    if out.weight.shape[1] != into.weight.shape[1]:
        if pruned is not PrunedRelativeAttention:
            module.head_dim = out.weight.shape[1] // module.num_heads
        vars(module).pop("autoprune_split_axes", None)  # its reshapes are others now
        module.__class__ = pruned
