"""The private names of torch that this package uses, and why; no other module uses any.

torch promises nothing about a name with an underscore in its path, so a release may move or change it. Hence
this one place, and an upper bound for torch in `pyproject.toml`: the first release that was not tried. To
raise it, run `make test` with the new release; what breaks is mended here.

Names of ATen operators that begin with an underscore (`aten._softmax`) are no names of Python modules: they
are what a recorded network consists of, and stand in the tables that speak of them.
"""

from __future__ import annotations

from typing import Any

# What `torch.ops.aten.NAME` and `torch.ops.aten.NAME.OVERLOAD` are. Loading a program checks that it names
# operators and nothing else.
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket

# Tensors without storage that remember their device: for networks that do not run on the `meta` device.
from torch._subclasses.fake_tensor import FakeTensorMode

# The common base classes of torch's convolutions and of its norms over batches; the public classes would have
# to be listed one by one.
from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
from torch.nn.modules.batchnorm import _NormBase as NormBase
from torch.nn.modules.conv import _ConvNd as ConvBase

# Sees every ATen operator that a forward pass runs. torch documents it ("Extending PyTorch", section
# "Extending all torch API with Modes"), but under this private path alone.
from torch.utils._python_dispatch import TorchDispatchMode

# Nested tuples, lists and dicts of tensors, flattened in the order that torch itself uses for outputs.
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map_only, tree_unflatten

__all__ = [
    "BatchNormBase",
    "ConvBase",
    "FakeTensorMode",
    "NormBase",
    "OpOverload",
    "OpOverloadPacket",
    "TorchDispatchMode",
    "leave_fused_encoder_path_",
    "schema_of",
    "tree_flatten",
    "tree_leaves",
    "tree_map_only",
    "tree_unflatten",
]


def schema_of(operator: OpOverload) -> Any:
    """The operator's schema: names and aliases of its arguments and results, its overload's name."""
    return operator._schema


def leave_fused_encoder_path_(module: nn.MultiheadAttention) -> None:
    """Keep `nn.TransformerEncoderLayer` from running this attention by its fused operator.

    That operator takes the width of a head for the model's width over the number of heads, which is wrong
    once heads are gone. The layer asks this attribute, and nothing public.
    """
    module._qkv_same_embed_dim = False
