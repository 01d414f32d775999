"""Small networks, one for each pattern that makes structure hard, with what must be free and what stuck."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A network, its inputs, and a module whose output channels must (or must not) be prunable."""

    build: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Any, ...]] = lambda: (torch.randn(2, 3, 8, 8),)
    free: tuple[str, ...] = ()
    stuck: tuple[str, ...] = ()
    reason: str = ""
    extra: dict[str, int] = field(default_factory=dict)


PATTERNS: dict[str, Pattern] = {}


def pattern(name: str, **keys: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def add(cls: type[nn.Module]) -> type[nn.Module]:
        PATTERNS[name] = Pattern(build=cls, **keys)
        return cls

    return add


class Net(nn.Module):
    """Stem of 8 channels, the part under test, pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 5)

    def body(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(F.relu(self.bn(self.stem(x))))
        return self.head(x.mean((2, 3)))


@pattern("sequential", free=("0", "3"))
class _Sequential(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Sigmoid(), nn.Conv2d(8, 12, 3), nn.Hardswish(),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(48, 5),
        )  # fmt: skip


@pattern("residual", free=("stem", "a"))
class _Residual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return x + self.b(torch.sigmoid(self.a(x)))


@pattern("reused_module", free=("stem", "shared"))
class _Reused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Conv2d(8, 8, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return self.shared(F.relu(self.shared(x)))


@pattern("tied_weights", inputs=lambda: (torch.randn(2, 6),), free=("up",))
class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 10, bias=False), nn.Linear(10, 6)
        self.mid = nn.Linear(10, 10)
        self.again = nn.Linear(6, 10, bias=False)
        self.again.weight = self.up.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(torch.tanh(self.mid(self.up(x))))
        return self.down(self.again(x))


@pattern("direct_parameters", free=("stem",))
class _Direct(Net):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(8, 1, 1) + 0.5)
        self.register_buffer("shift", torch.randn(1, 8, 1, 1))

    def body(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


@pattern("conv_transpose", free=("stem", "up"))
class _Transposed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.back = nn.ConvTranspose2d(8, 6, 2, stride=2), nn.Conv2d(6, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.back(self.up(x))


@pattern("conv_transpose_grouped", free=("stem",))
class _TransposedGrouped(Net):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.back = nn.ConvTranspose2d(8, 16, 2, stride=2, groups=4), nn.Conv2d(16, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.back(F.relu(self.up(x)))


@pattern("conv_transpose_depthwise", free=("stem",))
class _TransposedDepthwise(Net):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2, groups=8)

    def body(self, x: Tensor) -> Tensor:
        return self.up(x)


@pattern("conv1d", inputs=lambda: (torch.randn(2, 4, 16),), free=("0", "3"))
class _Conv1d(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8), nn.MaxPool1d(2), nn.Conv1d(8, 6, 3),
            nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip


@pattern("conv3d", inputs=lambda: (torch.randn(2, 2, 6, 6, 6),), free=("0", "3"))
class _Conv3d(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(
            nn.Conv3d(2, 8, 3), nn.BatchNorm3d(8), nn.MaxPool3d(2), nn.Conv3d(8, 6, 1),
            nn.AdaptiveAvgPool3d(1), nn.Flatten(), nn.Linear(6, 3),
        )  # fmt: skip


@pattern("group_norm", free=("stem",))
class _GroupNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.GroupNorm(4, 8)


@pattern("group_norm_of_one", stuck=("stem",), reason="normalised over all channels")
class _GroupNormOne(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.GroupNorm(1, 8)


@pattern("layer_norm", inputs=lambda: (torch.randn(2, 6),), free=("b",), stuck=("a",), reason="layer norm")
class _LayerNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b, self.c = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 9), nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(F.gelu(self.b(self.norm(self.a(x)))))


@pattern("instance_norm", free=("stem",))
class _InstanceNorm(Net):
    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.InstanceNorm2d(8)
        self.more = nn.InstanceNorm2d(8, affine=True, track_running_stats=True)

    def body(self, x: Tensor) -> Tensor:
        return self.more(x)


@pattern("pixel_shuffle", free=("grow",))
class _PixelShuffle(Net):
    def __init__(self) -> None:
        super().__init__()
        self.grow, self.back = nn.Conv2d(8, 24, 1), nn.Conv2d(6, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.back(F.pixel_shuffle(self.grow(x), 2))


@pattern("pixel_unshuffle", free=("stem",))
class _PixelUnshuffle(Net):
    def __init__(self) -> None:
        super().__init__()
        self.back = nn.Conv2d(32, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.back(F.pixel_unshuffle(x, 2))


@pattern("channel_shuffle", free=("wide",))
class _Shuffle(Net):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.back = nn.Conv2d(8, 12, 1), nn.Conv2d(12, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        return self.back(x)


@pattern("channel_shuffle_module", free=("wide",))
class _ShuffleModule(_Shuffle):
    def __init__(self) -> None:
        super().__init__()
        self.shuffle = nn.ChannelShuffle(3)

    def body(self, x: Tensor) -> Tensor:
        return self.back(self.shuffle(self.wide(x)))


@pattern("shuffled_trunk", free=("stem", "blocks.0.mid", "blocks.0.out", "blocks.2.out"))
class _ShuffledTrunk(nn.Module):
    """ShuffleNetV2's trunk of odd halves: ties alone would leave one unit of it."""

    class _Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.mid, self.out = nn.Conv2d(width // 2, 6, 1), nn.Conv2d(6, width // 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            b, c, h, w = x.shape
            left, right = x.chunk(2, 1)
            x = torch.cat([left, self.out(torch.sigmoid(self.mid(right)))], 1)
            return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 14, 3, padding=1)
        self.blocks = nn.Sequential(*(self._Block(14) for _ in range(3)))
        self.head = nn.Linear(14, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.relu(self.blocks(F.relu(self.stem(x)))).mean((2, 3)))


@pattern("shuffled_trunk_by_module", free=("stem", "blocks.0.mid", "blocks.0.out", "blocks.2.out"))
class _ShuffledTrunkModule(_ShuffledTrunk):
    """The same with torch's own shuffle, sizes from a list, and halves in one line."""

    class _Block(_ShuffledTrunk._Block):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.shuffle, self.parts = nn.ChannelShuffle(2), [width // 2, width // 2]

        def forward(self, x: Tensor) -> Tensor:
            left, right = torch.split(x, self.parts, dim=1)
            return self.shuffle(torch.cat([left, self.out(torch.sigmoid(self.mid(right)))], 1))


@pattern("flip", free=("wide",))
class _Flip(_Shuffle):
    def body(self, x: Tensor) -> Tensor:
        return self.back(self.wide(x).flip(1))


@pattern("roll", stuck=("wide",), reason="shifted")
class _Roll(_Shuffle):
    def body(self, x: Tensor) -> Tensor:
        return self.back(self.wide(x).roll(3, 1))


@pattern("gather_by_index", stuck=("wide",), reason="by index")
class _Gather(_Shuffle):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(12))

    def body(self, x: Tensor) -> Tensor:
        return self.back(self.wide(x)[:, self.order])


@pattern("weight_norm", free=("wide",))
class _WeightNorm(_Shuffle):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.utils.parametrizations.weight_norm(self.wide)

    def body(self, x: Tensor) -> Tensor:
        return self.back(F.relu(self.wide(x)))


@pattern("functional_weight", free=("wide",))
class _Functional(_Shuffle):
    def body(self, x: Tensor) -> Tensor:
        return self.back(F.conv2d(x, self.wide.weight * 2.0, self.wide.bias))


@pattern("functional_standardised", free=("wide",))
class _Standardised(_Shuffle):
    def body(self, x: Tensor) -> Tensor:
        weight = self.wide.weight
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        return self.back(F.conv2d(x, weight, self.wide.bias))


@pattern("chunk_gate", free=("wide",))
class _Chunk(_Shuffle):
    def __init__(self) -> None:
        super().__init__()
        self.back = nn.Conv2d(6, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        a, b = self.wide(x).chunk(2, 1)
        return self.back(a * torch.sigmoid(b))


@pattern("glu", free=("wide",))
class _Glu(_Chunk):
    def body(self, x: Tensor) -> Tensor:
        return self.back(F.glu(self.wide(x), 1))


@pattern("split_by_constant", free=("wide",))
class _SplitConstant(_Chunk):
    def body(self, x: Tensor) -> Tensor:
        a, b = self.wide(x).split(6, 1)
        return self.back(a * torch.sigmoid(b))


@pattern("split_uneven", free=("wide",))
class _SplitUneven(_Shuffle):
    def body(self, x: Tensor) -> Tensor:
        a, b = self.wide(x).split([4, 8], 1)
        return self.back(torch.cat([b, a], 1))


@pattern("slice_of_constant_size", stuck=("wide",), reason="")
class _SliceConstant(_Shuffle):
    def body(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        return self.back(torch.cat([x[:, 5:], x[:, :5] * 2], 1))


@pattern("slice_in_halves", free=("wide",))
class _SliceHalves(_Chunk):
    def body(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        half = x.shape[1] // 2
        return self.back(x[:, :half] * torch.sigmoid(x[:, half:]))


@pattern("unbind_channels", stuck=("stem",), reason="by position")
class _Unbind(Net):
    def body(self, x: Tensor) -> Tensor:
        return torch.stack(x.unbind(1)[::-1], 1)


@pattern("einsum", inputs=lambda: (torch.randn(2, 7, 6),), free=("a",))
class _Einsum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(6, 8)
        self.mix = nn.Parameter(torch.randn(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnc,cd->bnd", torch.relu(self.a(x)), self.mix)


@pattern(
    "product_of_activations", inputs=lambda: (torch.randn(2, 7, 6),), stuck=("a",), reason="two activations"
)
class _Gram(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.c(torch.sigmoid(self.a(x)) @ torch.sigmoid(self.b(x)).transpose(1, 2))


class _Attention(nn.Module):
    def __init__(self, heads: int = 4, width: int = 16) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(b, n, -1))


@pattern("fused_attention", inputs=lambda: (torch.randn(2, 5, 16),), free=("0.qkv",), extra={"0.qkv": 4})
class _FusedAttention(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(_Attention(), nn.Linear(16, 3))


@pattern("written_out_attention", inputs=lambda: (torch.randn(2, 5, 16),), free=("0.q",), extra={"0.q": 4})
class _WrittenOut(nn.Sequential):
    class _Core(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = 4
            self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

        def split(self, x: Tensor) -> Tensor:
            return x.view(len(x), -1, self.heads, x.shape[-1] // self.heads).transpose(1, 2)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.split(self.q(x)), self.split(self.k(x)), self.split(self.v(x))
            weights = (q @ k.transpose(-1, -2) / 2.0).softmax(-1)
            return self.o((weights @ v).transpose(1, 2).flatten(2))

    def __init__(self) -> None:
        super().__init__(self._Core(), nn.Linear(16, 3))


@pattern("multihead_attention", inputs=lambda: (torch.randn(2, 5, 16),), free=("att",), extra={"att": 4})
class _Multihead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.att, self.out = nn.MultiheadAttention(16, 4, batch_first=True), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.att(x, x, x)[0])


@pattern(
    "multihead_weights_returned", inputs=lambda: (torch.randn(2, 5, 16),), stuck=("att",), reason="mean over"
)
class _MultiheadWeights(_Multihead):
    def forward(self, x: Tensor) -> Tensor:
        mixed, weights = self.att(x, x, x)
        return self.out(mixed) + weights.sum()


@pattern("transformer_encoder", inputs=lambda: (torch.randn(2, 5, 16),), free=("0.linear1", "0.self_attn"))
class _Encoder(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), nn.Linear(16, 3))


@pattern("reshape_hard_coded", free=("wide",))
class _HardReshape(_Shuffle):
    def body(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        return self.back(x.view(2, 12, 64).softmax(-1).reshape(2, 12, 8, 8))


@pattern("heads_hard_coded", inputs=lambda: (torch.randn(2, 5, 16),), free=("qkv", "up"))
class _HardHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(2, 5, 3, 4, 4).permute(2, 0, 3, 1, 4)
        x = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 16))
        return self.down(F.gelu(self.up(x)))


@pattern("lstm", inputs=lambda: (torch.randn(2, 5, 6),), free=("inp", "rnn"))
class _Lstm(nn.Module):
    kind: type[nn.RNNBase] = nn.LSTM

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.rnn, self.out = nn.Linear(6, 8), self.kind(8, 10, batch_first=True), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(torch.relu(self.inp(x)))[0][:, -1])


@pattern("gru", inputs=lambda: (torch.randn(2, 5, 6),), free=("inp", "rnn"))
class _Gru(_Lstm):
    kind = nn.GRU


@pattern("few_groups", free=("wide", "grouped"))
class _FewGroups(_Shuffle):
    def __init__(self) -> None:
        super().__init__()
        self.wide, self.grouped, self.back = (
            nn.Conv2d(8, 12, 1),
            nn.Conv2d(12, 18, 3, padding=1, groups=2),
            nn.Conv2d(18, 8, 1),
        )

    def body(self, x: Tensor) -> Tensor:
        return self.back(F.relu(self.grouped(F.relu(self.wide(x)))))


@pattern("many_groups", free=("wide",))
class _ManyGroups(_FewGroups):
    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv2d(12, 18, 3, padding=1, groups=6)


@pattern("depthwise_multiplier", free=("wide",))
class _Multiplier(_FewGroups):
    def __init__(self) -> None:
        super().__init__()
        self.grouped, self.back = nn.Conv2d(12, 24, 3, padding=1, groups=12), nn.Conv2d(24, 8, 1)


@pattern("squeeze_excite", free=("stem", "fc1"))
class _SqueezeExcite(Net):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(x.mean((2, 3), keepdim=True)))))


@pattern("spatial_attention", free=("stem",))
class _Spatial(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv2d(8, 1, 1)

    def body(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(x))


@pattern("channel_mean", stuck=("stem",), reason="mean")
class _ChannelMean(Net):
    def body(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


@pattern("concatenation", free=("a", "b", "stem"))
class _Concatenation(Net):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(8, 4, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(18, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.c(F.relu(torch.cat([self.a(x), x, self.b(x)], 1)))


@pattern("constant_added", stuck=("stem",), reason="size written in")
class _Constant(Net):
    def body(self, x: Tensor) -> Tensor:
        return x + torch.ones(8, 1, 1)


@pattern("option_a_shortcut", free=("stem", "wide"))
class _OptionA(nn.Module):
    class _Pad(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.wide = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.short, self.head = self._Pad(), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.wide(x) + self.short(x)).mean((2, 3)))


@pattern("option_a_inline", free=("stem",))
class _OptionAInline(_OptionA):
    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.head(F.relu(self.wide(x) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4))).mean((2, 3)))


@pattern("two_inputs", inputs=lambda: (torch.randn(2, 6), torch.randn(2, 4)), free=("a",))
class _TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        z = torch.relu(self.a(x) + self.b(y))
        return {"scores": self.c(z), "pair": (self.c(z * 2), z.sum(0).shape[0] * 0)}


@pattern("features_returned", stuck=("stem",), reason="output")
class _Returned(Net):
    def forward(self, x: Tensor) -> Any:
        x = self.stem(x)
        return self.head(F.relu(self.bn(x)).mean((2, 3))), x


@pattern("embedding", inputs=lambda: (torch.randint(0, 11, (2, 5)),), free=("emb",))
class _Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.out = nn.Embedding(11, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.emb(x).mean(1))


@pattern("prelu_and_unfold", free=("stem",))
class _Unfold(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act, self.mix = nn.PReLU(8), nn.Linear(72, 8)

    def body(self, x: Tensor) -> Tensor:
        x = F.unfold(self.act(x), 3, padding=1)
        return self.mix(x.transpose(1, 2)).transpose(1, 2).unflatten(2, (8, 8))


@pattern("data_dependent", free=("stem",))
class _DataDependent(Net):
    def body(self, x: Tensor) -> Tensor:
        return x * 2 if x.new_zeros(1).item() == 0 else x


@pattern("unknown_operator", stuck=("wide",), reason="not known")
class _Unknown(_Shuffle):
    def body(self, x: Tensor) -> Tensor:
        return self.back(torch.cdist(self.wide(x).flatten(2), x.flatten(2)[:, :1]).unsqueeze(3))


@pattern("fourier_across_channels", stuck=("wide",), reason="Fourier")
class _FourierAcross(_Shuffle):
    def body(self, x: Tensor) -> Tensor:
        return self.back(torch.fft.fft2(self.wide(x), dim=(1, 2)).real)


@pattern("fourier_over_space", free=("wide",))
class _Fourier(_Shuffle):
    """A global filter (Rao et al. 2021): complex weights kept as pairs of real ones."""

    def __init__(self) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(12, 8, 5, 2))

    def body(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft2(self.wide(x)) * torch.view_as_complex(self.filter)
        return self.back(torch.fft.irfft2(spectrum, s=x.shape[-2:]))


@pattern("width_in_arithmetic", stuck=("wide",), reason="follows a width")
class _Arithmetic(_Shuffle):
    def body(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        return self.back(x * x.shape[1] ** -0.5)


@pattern("token_mixer", inputs=lambda: (torch.randn(2, 6, 8),), free=("up",))
class _Mixer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.head = nn.Linear(6, 12), nn.Linear(12, 6), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.gelu(self.up(x.transpose(1, 2)))).transpose(1, 2)
        return self.head(x.mean(1))


@pattern("upsampled_skip", free=("stem", "down"))
class _Skip(Net):
    def __init__(self) -> None:
        super().__init__()
        self.down, self.merge = nn.Conv2d(8, 10, 3, stride=2, padding=1), nn.Conv2d(18, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        y = F.interpolate(self.down(x), scale_factor=2, mode="bilinear")
        return self.merge(torch.cat([x, y], 1))


@pattern("global_response_norm", free=("up",))
class _ResponseNorm(Net):
    """Divides by a mean over channels that are zero where they are removed (ConvNeXt V2)."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Conv2d(8, 12, 1), _Response(12), nn.Conv2d(12, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return x + self.down(self.norm(F.gelu(self.up(x))))


class _Response(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.rand(width, 1, 1)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        size = x.norm(dim=(2, 3), keepdim=True)
        return x + self.scale * (x * (size / (size.mean(dim=1, keepdim=True) + 1e-6))) + self.shift


@pattern("sum_over_zeros", free=("up",))
class _SumOverZeros(_ResponseNorm):
    """A sum over such channels is the same without them; a norm too."""

    def body(self, x: Tensor) -> Tensor:
        y = F.relu(self.up(x))
        return x * torch.sigmoid(y.sum(1, keepdim=True)) + self.down(y) / (1 + y.norm(dim=1, keepdim=True))


@pattern("mean_after_sigmoid", stuck=("up",), reason="mean over the channels")
class _MeanAfterSigmoid(_ResponseNorm):
    """Removed channels are one half there, and not zero."""

    def body(self, x: Tensor) -> Tensor:
        y = torch.sigmoid(self.up(x))
        return x + self.down(y) * y.mean(1, keepdim=True)


@pattern("heads_from_width", inputs=lambda: (torch.randn(2, 6, 16),), free=("kv",))
class _HeadsFromWidth(nn.Module):
    """The width of a head computed from the model's, and a length left open (PVT, Twins)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 4
        self.q, self.kv, self.proj = nn.Linear(16, 16), nn.Linear(16, 32), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q = self.q(x).reshape(batch, length, self.num_heads, width // self.num_heads).transpose(1, 2)
        kv = self.kv(x[:, ::2]).reshape(batch, -1, 2, self.num_heads, width // self.num_heads)
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        x = F.scaled_dot_product_attention(q, k, v, scale=0.5).transpose(1, 2)
        return self.proj(x.reshape(batch, length, width))


@pattern("lstm_of_several", inputs=lambda: (torch.randn(2, 5, 6),), free=("rnn",), extra={"rnn": 10})
class _SeveralLstm(nn.Module):
    """Layers and directions share one hidden size, so that their units go together."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(6, 10, num_layers=2, bidirectional=True), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, (hidden, _) = self.rnn(x)
        return self.out(y[-1]) + self.out(torch.cat([hidden[-1], hidden[-2]], 1))


@pattern("lstm_with_projection", inputs=lambda: (torch.randn(2, 5, 6),), stuck=("rnn",))
class _ProjectedLstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.LSTM(6, 10, proj_size=4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0][-1])


@pattern("recurrent_cell", inputs=lambda: (torch.randn(2, 5, 6),), free=("cell",))
class _Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(6, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.out(state)


@pattern(
    "padding_mask",
    inputs=lambda: (torch.randn(2, 5, 16), torch.ones(2, 5) > 0),
    free=("att",),
    extra={"att": 4},
)
class _PaddingMask(_Multihead):
    """The mask is expanded over the heads."""

    def forward(self, x: Tensor, is_there: Tensor) -> Tensor:
        return self.out(self.att(x, x, x, key_padding_mask=~is_there, need_weights=False)[0])


@pattern("unit_length", free=("wide",))
class _UnitLength(_Shuffle):
    """Each channel over the length of all, which is expanded over them."""

    def body(self, x: Tensor) -> Tensor:
        return self.back(F.normalize(self.wide(x), dim=1))


@pattern("state_of_zeros", free=("wide",))
class _ZeroState(_Shuffle):
    """Fresh tensors of the same value everywhere are as long as what they meet."""

    def body(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        return self.back(x * torch.ones(x.shape[1], 1, 1) + x.new_zeros(x.shape) + torch.full_like(x, 0.5))


@pattern("expanded_weight", inputs=lambda: (torch.randn(2, 6),), stuck=("a",), reason="two activations")
class _ExpandedWeight(nn.Module):
    """A weight that is expanded over what it reads cannot be masked there."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.w, self.out = nn.Linear(6, 8), nn.Parameter(torch.randn(1, 5)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(x))
        return self.out(torch.relu(x @ self.w.expand(x.shape[1], 5)))


@pattern("mixture_by_einsum", inputs=lambda: (torch.randn(2, 7, 12),), extra={"up": 3})
class _Mixture(nn.Module):
    """Experts and hidden units become one axis; with one unit left einsum would not multiply matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(12, 2)
        self.up, self.down = nn.Parameter(torch.randn(2, 12, 3)), nn.Parameter(torch.randn(2, 3, 12))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(torch.einsum("bnd,kdh->bnkh", x, self.up))
        return torch.einsum("bnkh,khd,bnk->bnd", hidden, self.down, torch.softmax(self.gate(x), -1))


@pattern("repeated_keys", inputs=lambda: (torch.randn(2, 7, 12),), free=("q", "k"), extra={"q": 2})
class _RepeatedKeys(nn.Module):
    """Grouped-query attention (Ainslie et al. 2023): four heads of queries share two of keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 16), nn.Linear(12, 8), nn.Linear(12, 8)
        self.out = nn.Linear(16, 3)

    def _heads(self, x: Tensor, times: int) -> Tensor:
        x = x.unflatten(-1, (-1, 4)).transpose(1, 2)
        batch, heads, length, width = x.shape
        return x[:, :, None].expand(batch, heads, times, length, width).reshape(batch, -1, length, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._heads(self.q(x), 1), self._heads(self.k(x), 2), self._heads(self.v(x), 2)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pattern("grouped_queries", inputs=lambda: (torch.randn(2, 7, 12),), free=("q", "k"), extra={"q": 2})
class _GroupedQueries(_RepeatedKeys):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (self._heads(layer(x), 1) for layer in (self.q, self.k, self.v))
        return self.out(F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).flatten(2))


@pattern("grid_sample", free=("wide",))
class _GridSample(_Shuffle):
    """Space is warped by what the network says, each channel alike."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Conv2d(8, 2, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        theta = torch.eye(2, 3, dtype=x.dtype).expand(len(x), 2, 3)
        grid = F.affine_grid(theta, x.shape, align_corners=False) + torch.tanh(self.shift(x)).permute(
            0, 2, 3, 1
        )
        return self.back(F.grid_sample(self.wide(x), grid, align_corners=False))


@pattern("bilinear", inputs=lambda: (torch.randn(2, 6), torch.randn(2, 5)), free=("a", "b", "both"))
class _Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.both, self.out = (
            nn.Linear(6, 8),
            nn.Linear(5, 7),
            nn.Bilinear(8, 7, 9),
            nn.Linear(9, 3),
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(torch.tanh(self.both(torch.tanh(self.a(x)), torch.tanh(self.b(y)))))


@pattern("embedding_bag", inputs=lambda: (torch.randint(0, 11, (3, 5)),), free=("bag",))
class _Bag(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(11, 8, mode="mean"), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.bag(x))


@pattern("multiplier_of_one_group", free=("stem",))
class _FewDepthwise(Net):
    """What is left of a depthwise convolution with a multiplier may be one group of several channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.deep, self.back = nn.Conv2d(3, 9, 3, padding=1, groups=3), nn.Conv2d(9, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.back(F.relu(self.deep(x)))


@pattern("first_pass_does_more", inputs=lambda: (torch.randn(2, 6, 16),), free=("kv",))
class _FirstPass(_HeadsFromWidth):
    """A table is made in the first pass and kept, so that later passes reshape less (ConViT)."""

    def forward(self, x: Tensor) -> Tensor:
        if not hasattr(self, "table"):
            self.table = torch.arange(36).view(6, 6).reshape(-1)
        return super().forward(x) + self.table.sum() * 0


@pattern("two_heads_by_einsum", inputs=lambda: (torch.randn(1, 12, 16),), free=("q",), extra={"q": 2})
class _TwoHeads(nn.Module):
    """Relative positions by einsum (MViT V2): with one head left, it puts the axis of length 1 elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.rows, self.columns = nn.Parameter(torch.randn(3, 3, 8)), nn.Parameter(torch.randn(4, 4, 8))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        grid = q.unflatten(2, (3, 4))
        rows = torch.einsum("byhwc,hkc->byhwk", grid, self.rows).unsqueeze(-1)
        columns = torch.einsum("byhwc,wkc->byhwk", grid, self.columns).unsqueeze(-2)
        scores = (q @ k.transpose(-2, -1)).unflatten(2, (3, 4)).unflatten(4, (3, 4)) + rows + columns
        return self.out((scores.flatten(4).flatten(2, 3).softmax(-1) @ v).transpose(1, 2).flatten(2))


@pattern("channel_maximum", free=("stem",))
class _ChannelMaximum(Net):
    """Attention over space from mean and maximum over channels (CBAM): neither misses channels of zeros."""

    class _Pool(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x.max(1, keepdim=True)[0], x.mean(1, keepdim=True)], 1)

    def __init__(self) -> None:
        super().__init__()
        self.pool, self.gate = self._Pool(), nn.Conv2d(2, 1, 7, padding=3)

    def body(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.gate(self.pool(x)))


@pattern("maximum_below_zero", stuck=("wide",), reason="max over")
class _MaximumBelowZero(_Shuffle):
    """Where all channels may be negative, zeros would win."""

    def body(self, x: Tensor) -> Tensor:
        x = self.wide(x)
        return self.back(x * x.amax(1, keepdim=True))


@pattern("means_of_both_kinds", stuck=("stem",), reason="mean over")
class _MeansOfBothKinds(Net):
    """A block that takes a mean over channels, and one over space in a module of its own."""

    class _Squeeze(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(x.mean((2, 3), keepdim=True))

    class _Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze = _MeansOfBothKinds._Squeeze()

        def forward(self, x: Tensor) -> Tensor:
            return self.squeeze(x) * torch.sigmoid(x.mean(1, keepdim=True))

    def __init__(self) -> None:
        super().__init__()
        self.block = self._Block()

    def body(self, x: Tensor) -> Tensor:
        return self.block(x)


@pattern("mean_beside_layer_norm", free=("stem",))
class _MeanBesideNorm(Net):
    """A module that takes a mean over channels and holds a layer norm over something else."""

    class _Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.sigmoid(self.norm(x.mean(1, keepdim=True)))

    def __init__(self) -> None:
        super().__init__()
        self.block = self._Block()

    def body(self, x: Tensor) -> Tensor:
        return self.block(x)


@pattern("width_of_another", inputs=lambda: (torch.randn(2, 5, 4, 4),), free=("inp", "att.out_proj"))
class _WidthOfAnother(nn.Module):
    """What comes out is reshaped to the width of what went in, which happens to be the same."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Conv2d(5, 8, 1), nn.Linear(8, 3)
        self.att = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        batch, width, rows, columns = x.shape
        x = x.permute(0, 2, 3, 1).reshape(batch * rows, columns, width)
        x = self.att(x, x, x, need_weights=False)[0].reshape(batch, rows, columns, width)
        return self.out(x.mean((1, 2)))


@pattern("outer_product", free=("stem", "back"))
class _OuterProduct(Net):
    """Two axes of channels become one; a later round keeps to the one that shrank."""

    def __init__(self) -> None:
        super().__init__()
        self.other, self.back = nn.Conv2d(8, 3, 1), nn.Conv2d(24, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.back((x[:, :, None] * F.relu(self.other(x))[:, None]).flatten(1, 2))


@pattern("unflattened", free=("fc", "up"))
class _Unflattened(Net):
    """A decoder's `nn.Unflatten`, in which channels and space are written."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.unflatten, self.up = nn.Linear(8, 96), nn.Unflatten(1, (6, 4, 4)), nn.Conv2d(6, 8, 1)

    def body(self, x: Tensor) -> Tensor:
        return self.up(self.unflatten(F.relu(self.fc(x.mean((2, 3))))))


@pattern("split_weight", inputs=lambda: (torch.randn(3, 5),), free=("inp", "out"))
class _SplitWeight(nn.Module):
    """One parameter holds the weights of two projections, cut and turned where they are used."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.weight = nn.Linear(5, 8), nn.Parameter(torch.randn(12, 8))
        self.out, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inp(x))
        left, right = self.weight.chunk(2)
        return self.head(F.relu(self.out((x @ left.T) * (x @ right.mT))))


@pattern("stacked_weights", inputs=lambda: (torch.randn(3, 5),), free=("inp", "out"))
class _StackedWeights(nn.Module):
    """The weights of two layers lie on each other in one parameter, taken by index and by unbinding."""

    def __init__(self) -> None:
        super().__init__()
        self.inp, self.weights = nn.Linear(5, 8), nn.Parameter(torch.randn(2, 6, 8))
        self.out, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.inp(x))
        left, right = self.weights.unbind()
        return self.head(F.relu(self.out(x @ left.T + x @ right.T + x @ self.weights[0].T)))
