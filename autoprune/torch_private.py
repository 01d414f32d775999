"""The private names of torch that this package uses, and the reasons; no other module uses any.

torch promises nothing about a name with an underscore in its path, so a release may move or change it. This
is why such names stand in one place, and why `pyproject.toml` has an upper bound for torch: the first
release that was not tried. To raise it, run `make test` with the new release and mend here what breaks.

Names of ATen operators that begin with an underscore (`aten._softmax`) are not names of Python modules. A
recorded network consists of these operators, and the rules' tables list them.
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
    """Return the operator's schema: names and aliases of arguments and results, and the overload's name."""
    return operator._schema


def leave_fused_encoder_path_(module: nn.MultiheadAttention) -> None:
    """Keep `nn.TransformerEncoderLayer` from running this attention by its fused operator.

    The operator computes the width of a head as the model's width over the number of heads, which is wrong
    once heads are removed. The layer reads this private attribute, and no public one, before it decides.
    """
    module._qkv_same_embed_dim = False
