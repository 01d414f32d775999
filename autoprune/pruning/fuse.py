"""A program that computes the same in fewer and faster steps, for evaluation in float32.

* A batch norm behind a convolution is folded into its weights (Jacob et al. 2018, section 3.2). Folding is a
  constant step, so it runs again by itself when the weights or the statistics change.
* On a CPU, the activation and the addition behind a convolution run inside it (oneDNN's post-operations).
* Convolutions keep channels last in memory.

Measured on ResNet-20 with images of 32 x 32: benchmarks/results.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autoprune.pruning.replay import BATCH_NORMS, Program, Step, aten, step
from autoprune.structure import Ref

CONVOLUTION = aten.convolution.default
ACTIVATIONS: dict[Any, Callable[[Step], tuple[str, list[float]]]] = {
    aten.relu.default: lambda s: ("relu", []),
    aten.silu.default: lambda s: ("swish", []),
    aten.hardswish.default: lambda s: ("hardswish", []),
    aten.hardtanh.default: lambda s: ("hardtanh", [float(v) for v in (s.args[1:] or (-1, 1))]),
}


def fused(program: Program, weights: dict[str, Tensor], device: torch.device) -> Program:
    """The faster program; results differ by rounding only. float32 on a CPU fuses most."""
    rewriting = _Rewriting(program)
    rewriting.fold_norms()
    is_float32 = all(w.dtype == torch.float32 for w in weights.values() if w.is_floating_point())
    if device.type == "cpu" and is_float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        rewriting.fuse_convolutions()
    return rewriting.result()


def channels_last(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights, those of two-dimensional convolutions with channels last."""
    return {
        n: w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for n, w in weights.items()
    }


@dataclass(eq=False)
class _Convolution:
    """A convolution on its way to be one fused step; `value` is what it makes so far."""

    step: Step
    value: int
    weight: Any
    bias: Any
    other: int | None = None
    activation: tuple[str, list[float]] = field(default_factory=lambda: ("none", []))


class _Rewriting:
    def __init__(self, program: Program) -> None:
        self.program, self.varying = program, program.varying()
        self.steps = list(program.steps)
        self.num_values = program.num_values

    def result(self) -> Program:
        return self.program.with_steps(self.steps, self.num_values)

    def fold_norms(self) -> None:
        """Fold every batch norm that alone reads a convolution with constant weights."""
        makers, readers, folded = self.program.makers(), self.program.readers(), dict[int, list[Step]]()
        for one in self.steps:
            before = makers.get(one.reads[0]) if one.call in BATCH_NORMS and one.reads else None
            if before is None or not self._folds(before, one) or readers[one.reads[0]] > 1:
                continue
            weight, bias, self.num_values = self.num_values, self.num_values + 1, self.num_values + 2
            args = [before.args[1], before.args[2], *one.args[1:5], one.args[-1]]
            rest = (before.args[0], Ref(weight), Ref(bias), *before.args[3:])
            folded[id(one)] = [
                step(folded_weights, args, (weight, bias)),
                step(CONVOLUTION, rest, one.makes[:1]),
            ]
        self.steps = [new for one in self.steps for new in folded.get(id(one), [one])]

    def _folds(self, convolution: Step, norm: Step) -> bool:
        if convolution.call is not CONVOLUTION or convolution.args[6]:
            return False
        constants = [*convolution.args[1:3], *norm.args[1:5]]
        is_training = norm.call is aten.native_batch_norm.default and norm.args[5]
        return not is_training and not any(isinstance(a, Ref) and a.index in self.varying for a in constants)

    def fuse_convolutions(self) -> None:
        """Give convolutions of images the additions and activations that follow them."""
        program = self.result()
        self.steps, readers = list(program.steps), program.readers()
        open_ones: dict[int, _Convolution] = {}
        done: list[Step | _Convolution] = []
        for one in self.steps:
            if self._is_plain(one):
                made = _Convolution(step=one, value=_made(one), weight=one.args[1], bias=one.args[2])
                open_ones[made.value] = made
                done.append(made)
                continue
            grown = next((c for c in self._grown(one, open_ones, readers)), None)
            if grown is None:
                done.append(one)
                continue
            done.remove(grown)  # it runs where its last part ran: by then all that it reads is there
            done.append(grown)
            del open_ones[grown.value]
            grown.value = _made(one)
            if grown.activation[0] == "none":
                open_ones[grown.value] = grown
        self.steps = [_pointwise(c) if isinstance(c, _Convolution) else c for c in done]

    def _is_plain(self, one: Step) -> bool:
        if one.call is not CONVOLUTION or one.args[6] or any(one.args[7]):
            return False
        x, weight = one.args[0], one.args[1]
        shape = self.program.shapes.get(x.index, ())
        return len(shape) == 4 and x.index in self.varying and weight.index not in self.varying

    def _grown(
        self, one: Step, known: dict[int, _Convolution], readers: dict[int, int]
    ) -> Iterator[_Convolution]:
        """The convolution that can do this step as well, changed so that it does."""
        for value in one.reads:
            convolution = known.get(value)
            if convolution is None or readers[value] > 1:
                continue
            if one.call in ACTIVATIONS and (convolution.other is None or one.call is aten.relu.default):
                convolution.activation = ACTIVATIONS[one.call](one)
                yield convolution
            elif self._adds(one) and convolution.other is None:
                convolution.other = one.reads[1] if one.reads[0] == value else one.reads[0]
                yield convolution

    def _adds(self, one: Step) -> bool:
        """Whether a step adds two different activations of one shape."""
        if one.call is not aten.add.Tensor or one.kwargs or len(one.reads) != 2 or len(one.args) != 2:
            return False
        shapes = [self.program.shapes.get(v) for v in one.reads]
        return shapes[0] == shapes[1] and shapes[0] is not None and all(v in self.varying for v in one.reads)


def folded_weights(  # noqa: PLR0913 - a convolution's and a norm's own arguments
    weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, mean: Tensor,
    var: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Weight and bias of the one convolution that does what a convolution and a batch norm do."""
    factor = torch.rsqrt(var + eps) if scale is None else scale * torch.rsqrt(var + eps)
    offset = -mean * factor if bias is None else (bias - mean) * factor
    return (
        weight * factor.view(-1, *[1] * (weight.ndim - 1)),
        offset if shift is None else offset + shift,
    )


def _made(one: Step) -> int:
    value = one.makes[0]
    assert value is not None
    return value


def _pointwise(convolution: _Convolution) -> Step:
    """The fused step, or the convolution as it was where nothing was fused into it."""
    (name, scalars), old = convolution.activation, convolution.step
    if name == "none" and convolution.other is None:
        return old
    stride, padding, dilation, groups = old.args[3], old.args[4], old.args[5], old.args[8]
    settings = [list(padding), list(stride), list(dilation), groups]
    head = [old.args[0], convolution.weight, convolution.bias]
    if convolution.other is None:
        args = [*head, *settings, name, scalars, ""]
        return step(torch.ops.mkldnn._convolution_pointwise.default, args, (convolution.value,))
    after: list[Any] = [None if name == "none" else name, [], None]
    args = [head[0], Ref(convolution.other), *head[1:], *settings, "add", 1.0, *after]
    return step(torch.ops.mkldnn._convolution_pointwise.binary, args, (convolution.value,))
