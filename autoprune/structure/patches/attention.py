"""Attention with fewer heads, where its own forward ties the number of heads to the model's width.

torch's and torchvision's attention compute the width of a head as the model's width over the number of
heads, so a module with some heads removed needs a forward that takes both as given. Each class is a
subclass of the original with the same parameters under the same names; a pruned module changes to it in
place and stays an instance of the user's class.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.torch_private import leave_fused_encoder_path_


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with any number of heads of one width (Vaswani et al. 2017, section 3.2.2)."""

    def forward(  # noqa: PLR0913 (the signature that it replaces)
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend as `nn.MultiheadAttention.forward` does, with any number of heads.

        The inputs are (B, N, E), (N, B, E) or (N, E). The result has the same shape; the attention weights
        come second.
        """
        is_batched = query.dim() == 3
        swap = is_batched and not self.batch_first
        query, key, value = (
            t.transpose(0, 1) if swap else t if is_batched else t.unsqueeze(0) for t in (query, key, value)
        )
        q, k, v = self._heads(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, q, k, is_causal and not need_weights)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * self.head_dim**-0.5
            weights = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            mixed = F.dropout(weights, dropout) @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out = self.out_proj(mixed.transpose(1, 2).flatten(2))
        if not is_batched:
            return out.squeeze(0), weights.squeeze(0) if weights is not None else None
        return out.transpose(0, 1) if swap else out, weights

    def _heads(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is not None:
            matrices = self.in_proj_weight.chunk(3)
        else:
            matrices = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        projected = [F.linear(x, w, b) for x, w, b in zip((query, key, value), matrices, biases, strict=True)]
        return [t.view(*t.shape[:2], -1, self.head_dim).transpose(1, 2) for t in projected]

    def _mask(
        self, attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, k: Tensor, is_causal: bool
    ) -> Tensor | None:
        """Merge all masks into one additive mask that broadcasts to (B, H, N, M)."""
        parts = []
        if attn_mask is not None:
            mask = _additive(attn_mask, q.dtype)
            parts.append(mask if mask.dim() == 2 else mask.view(len(q), -1, *mask.shape[1:]))
        elif is_causal:
            ones = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device)
            parts.append(_additive(ones.triu(1), q.dtype))
        if padding is not None:
            padding = padding if padding.dim() == 2 else padding.unsqueeze(0)
            parts.append(_additive(padding, q.dtype)[:, None, None, :])
        return sum(parts[1:], parts[0]) if parts else None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(mask, float("-inf"))


def _patch_multihead_(module: nn.MultiheadAttention) -> None:
    out_weight = module.out_proj.weight
    module.num_heads = out_weight.shape[1] // module.head_dim
    first = module.in_proj_weight if module.in_proj_weight is not None else module.q_proj_weight
    module.embed_dim = first.shape[1]
    leave_fused_encoder_path_(module)
    vars(module).pop("autoprune_split_axes", None)  # its reshapes are others now
    module.__class__ = PrunedMultiheadAttention


def patch_attention_(model: nn.Module, changed: Iterable[str]) -> None:
    """Mend the attention modules of a dense copy, given the names of the modules whose tensors shrank."""
    modules = dict(model.named_modules())
    owners = {name for n in changed for name in (n, n.rpartition(".")[0])}
    for name in sorted(owners & modules.keys()):
        module = modules[name]
        if isinstance(module, nn.MultiheadAttention):
            _patch_multihead_(module)
        elif type(module).__module__.startswith("torchvision."):
            from autoprune.structure.patches.window_attention import patch_window_attention_

            patch_window_attention_(module)
