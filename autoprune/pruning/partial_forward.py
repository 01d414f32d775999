"""Partial forward passes: a recorded network runs again from the first steps that changed weights reach.

`make_program` turns a recording into a *program*: steps in which every value is made once (an operator in
place makes a new value). A step that depends on weights alone is *constant* and runs once per set of
weights. When some weights change, the *suffix* must run again: all steps, constant or not, that these
weights reach. The values that the suffix reads from outside itself are the *cut*; they are taken from one
run of the whole program on the same batch. An `Executor` runs a program or a suffix.

`fuse` returns a program that computes the same in fewer and faster steps, in float32:

* A batch norm behind a convolution is folded into the convolution's weights (Jacob et al. 2018, section
  3.2). Folding is a constant step, so it runs again by itself when the weights or the statistics change.
* On a CPU, the activation and the addition behind a convolution run inside the convolution (oneDNN's
  post-operations).
* Convolutions keep channels last in memory.

Figures: docs/log.md, 2026-11-28.

A pass cannot be repeated if it draws random numbers, reads values (`.item()`), or writes into a tensor that
has another view; `make_program` then says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from autoprune.structure import Op, Recording, Ref
from autoprune.torch_private import schema_of

aten = torch.ops.aten
Values = dict[int, Tensor]
VIEWS = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
BATCH_NORMS = (aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default)


class NotRepeatableError(Exception):
    """The reason why a recorded pass cannot be run again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """A call of one operator within a program.

    Attributes:
        args, kwargs: the arguments, in which tensors are Refs.
        makes: the values of the results; None for a result without one.
        reads: the values among the arguments.
    """

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    makes: tuple[int | None, ...]
    reads: tuple[int, ...]

    def run(self, values: Values) -> None:
        """Compute the results from the values that the step reads, and add them to `values`."""
        args = [_filled(a, values) for a in self.args]
        kwargs = {n: _filled(a, values) for n, a in self.kwargs.items()}
        result = self.call(*args, **kwargs)
        results = result if isinstance(result, (tuple, list)) else (result,)
        for number, tensor in zip(self.makes, results, strict=False):
            if number is not None:
                values[number] = tensor


def make_step(
    call: Callable[..., Any], args: Sequence[Any], makes: Sequence[int | None], **kwargs: Any
) -> Step:
    """Return a step that reads all tensors among its arguments."""
    reads = tuple(dict.fromkeys(_refs([*args, *kwargs.values()])))
    return Step(call=call, args=tuple(args), kwargs=kwargs, makes=tuple(makes), reads=reads)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A forward pass without writing in place, as steps in the order in which they run.

    Attributes:
        parameters: value -> the qualified name of its parameter or buffer.
        shapes: the shapes of the values that the recording has.
        num_values: a bound that all values are below.
    """

    steps: tuple[Step, ...]
    parameters: Mapping[int, str]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shapes: Mapping[int, tuple[int, ...]]
    num_values: int

    def varying(self) -> set[int]:
        """Return the values that depend on the input."""
        return dependent_values(self.steps, set(self.inputs))

    def makers(self) -> dict[int, Step]:
        """Return the step that makes each value."""
        return {v: s for s in self.steps for v in s.makes if v is not None}

    def readers(self) -> dict[int, int]:
        """Return the number of steps that read each value; an output has one reader more."""
        counts = dict.fromkeys(self.outputs, 1)
        for step in self.steps:
            for value in step.reads:
                counts[value] = counts.get(value, 0) + 1
        return counts

    def with_steps(self, steps: Iterable[Step], num_values: int) -> Program:
        """Return the same program with other steps, without those that no output needs."""
        return replace(self, steps=_needed(tuple(steps), self.outputs), num_values=num_values)


@dataclass(frozen=True, kw_only=True)
class Suffix:
    """The steps of a program that must run again when some weights change.

    Attributes:
        constant: the steps that depend on weights alone.
        steps: the other steps, each with the values that no later step needs.
        cut: the values of the whole run that `steps` read.
        outputs: the program's outputs that change, by position.
    """

    constant: tuple[Step, ...]
    steps: tuple[tuple[Step, tuple[int, ...]], ...]
    cut: frozenset[int]
    outputs: Mapping[int, int]


def make_program(recording: Recording, device: torch.device) -> Program:
    """Turn a recording into steps that can run on real tensors on `device`.

    Raises:
        NotRepeatableError: the pass cannot be repeated from its operators alone.
    """
    if not recording.is_meta:
        raise NotRepeatableError("its forward pass depends on the values in it")
    builder = _ProgramBuilder(recording, device)
    for position, op in enumerate(recording.ops):
        builder.add(position, op)
    outputs = tuple(builder.current.get(r.index, r.index) for r in recording.outputs)
    steps = _needed(tuple(builder.steps), outputs)
    available = {*recording.parameters, *(r.index for r in recording.inputs)} | {
        v for s in steps for v in s.makes if v
    }
    if unknown := {v for s in steps for v in s.reads} - available:
        raise NotRepeatableError(f"it reads {len(unknown)} tensors that are neither weights nor inputs")
    return Program(
        steps=steps, parameters=dict(recording.parameters), inputs=tuple(r.index for r in recording.inputs),
        outputs=outputs, shapes=builder.shapes, num_values=builder.num_values,
    )  # fmt: skip


def make_calibration_program(program: Program) -> tuple[Program, dict[int, str]]:
    """Return a program whose batch norms use their batch's statistics, and whose outputs these are.

    Variances are unbiased, as running variances are. A suffix of the new program can start from the values
    that a run of the given program kept: then the norms before the suffix keep their statistics.

    Returns:
        The program, and the name of the buffer of each output value.
    """
    steps, names, number = [], dict[int, str](), program.num_values
    for step in program.steps:
        mean, var = (step.args[3], step.args[4]) if step.call in BATCH_NORMS else (None, None)
        if not (isinstance(mean, Ref) and isinstance(var, Ref)):
            steps.append(step)
            continue
        makes = (step.makes[0], number, number + 1)
        names |= {number: program.parameters[mean.index], number + 1: program.parameters[var.index]}
        steps.append(make_step(batch_normalize, (*step.args[:3], step.args[-1]), makes))
        number += 2
    return replace(program, outputs=tuple(names)).with_steps(steps, number), names


def batch_normalize(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """Return the batch norm of x by its own statistics, the mean (C,) and the unbiased variance (C,)."""
    y, mean, deviation = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    count = x.numel() // x.shape[1]
    return y, mean, (deviation**-2 - eps) * (count / max(count - 1, 1))


def find_suffix(program: Program, changed: Iterable[str]) -> Suffix:
    """Return the suffix that must run again when the weights of these names change."""
    names, varying = set(changed), program.varying()
    dirty = dependent_values(program.steps, {v for v, n in program.parameters.items() if n in names})
    steps = [s for s in program.steps if any(v in dirty for v in s.reads)]
    moving = [s for s in steps if any(v in varying for v in s.reads)]
    cut = frozenset(v for s in moving for v in s.reads if v in varying and v not in dirty)
    outputs = {i: v for i, v in enumerate(program.outputs) if v in dirty}
    return Suffix(
        constant=tuple(s for s in steps if not any(v in varying for v in s.reads)),
        steps=_with_releases(moving, {*cut, *outputs.values()} | (dirty - varying)),
        cut=cut, outputs=outputs,
    )  # fmt: skip


class Executor:
    """A program with one set of weights, which runs whole or as a suffix with some weights changed.

    Args:
        program: the program to run.
        weights: the weights by qualified name, on the device where the program runs.
        keep: the values that a whole run keeps: the cuts of the suffixes to come.
    """

    def __init__(self, program: Program, weights: Mapping[str, Tensor], keep: Iterable[int] = ()) -> None:
        self.program = program
        varying = program.varying()
        self.constants: Values = {v: weights[n] for v, n in program.parameters.items() if n in weights}
        for step in program.steps:
            if not any(v in varying for v in step.reads):
                step.run(self.constants)
        moving = [s for s in program.steps if any(v in varying for v in s.reads)]
        self.steps = _with_releases(moving, {*keep, *program.outputs, *self.constants})

    def restricted_to(self, values: Iterable[int]) -> Executor:
        """Return an executor of only the steps that these values need."""
        restricted, targets = copy(self), set(values)
        restricted.steps = _with_releases(
            _needed(tuple(s for s, _ in self.steps), targets), {*targets, *self.constants}
        )
        return restricted

    def run(self, *inputs: Tensor) -> Values:
        """Run the program on these inputs, and return all outputs and all values to keep."""
        values = dict(zip(self.program.inputs, inputs, strict=True))
        return _run(self.steps, {**self.constants, **values})

    def bind(self, suffix: Suffix, weights: Mapping[str, Tensor]) -> Values:
        """Return all constants, computed anew where they depend on these changed weights."""
        values = {**self.constants}
        values |= {v: weights[n] for v, n in self.program.parameters.items() if n in weights}
        for step in suffix.constant:
            step.run(values)
        return values

    def run_suffix(self, suffix: Suffix, bound: Values, cut_values: Values) -> dict[int, Tensor]:
        """Run a suffix, and return the outputs that change, by position."""
        values = _run(suffix.steps, {**bound, **{v: cut_values[v] for v in suffix.cut}})
        return {i: values[v] for i, v in suffix.outputs.items()}


def dependent_values(steps: Iterable[Step], start: set[int]) -> set[int]:
    """Return all values that depend on the values of `start`, these included."""
    values = set(start)
    for step in steps:
        if any(v in values for v in step.reads):
            values.update(v for v in step.makes if v is not None)
    return values


def _run(steps: Iterable[tuple[Step, tuple[int, ...]]], values: Values) -> Values:
    for step, releases in steps:
        step.run(values)
        for value in releases:
            del values[value]
    return values


def _with_releases(steps: Sequence[Step], keep: set[int]) -> tuple[tuple[Step, tuple[int, ...]], ...]:
    """Return each step with the values that no later step needs, except those to keep."""
    needed_later, result = set(keep), []
    for step in reversed(steps):
        touched = {v for v in (*step.reads, *step.makes) if v is not None}
        result.append((step, tuple(touched - needed_later)))
        needed_later |= touched
    return tuple(reversed(result))


def _needed(steps: tuple[Step, ...], outputs: Iterable[int]) -> tuple[Step, ...]:
    needed, result = set(outputs), []
    for step in reversed(steps):
        if any(v in needed for v in step.makes):
            result.append(step)
            needed.update(step.reads)
    return tuple(reversed(result))


class _ProgramBuilder:
    """The steps of a program, made from a recording's operators one after the other."""

    def __init__(self, recording: Recording, device: torch.device) -> None:
        self.recording, self.device = recording, device
        self.steps: list[Step] = []
        self.current: dict[int, int] = {}  # Ref -> its value now, where that is not the Ref's own
        self.root: dict[int, int] = {}  # view -> the tensor whose memory it shows
        self.num_values = len(recording.shapes)
        self.shapes = dict(enumerate(recording.shapes))
        self.last_read = {r.index: i for i, op in enumerate(recording.ops) for r in op.inputs}
        self.last_read |= dict.fromkeys((r.index for r in recording.outputs), len(recording.ops))

    def add(self, position: int, op: Op) -> None:
        if torch.Tag.nondeterministic_seeded in op.call.tags:
            raise NotRepeatableError(f"{op.name} in {op.module or 'the network'} is random")
        if op.call is aten.as_strided.default:
            raise NotRepeatableError(f"as_strided in {op.module or 'the network'} asks for one memory layout")
        schema = schema_of(op.call)
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        call, args, kwargs = self._call(op)
        if written:
            call = self._functional(op, written, position)
            first = op.inputs[0].index
            self.current[first] = self._new(self.recording.shapes[first])
        elif any(r.alias_info is not None for r in schema.returns) and op.inputs:
            source = op.inputs[0].index
            root = self.root.get(source, source)
            views = (r.index for r in op.outputs if r is not None)
            self.root |= {view: root for view in views if view != source}
        makes = [None if r is None else self.current.get(r.index, r.index) for r in op.outputs]
        self.steps.append(make_step(call, args, makes, **kwargs))

    def _call(self, op: Op) -> tuple[Any, list[Any], dict[str, Any]]:
        """Return the operator, its positional and its other arguments, with values in the place of Refs."""
        args, kwargs, is_positional = [], {}, True
        for argument in schema_of(op.call).arguments:
            if argument.name not in op.arguments:
                is_positional = False
                continue
            value = self._value(op.arguments[argument.name])
            if is_positional and not argument.kwarg_only:
                args.append(value)
            else:
                kwargs[argument.name] = value
        return VIEWS.get(op.call, op.call), args, kwargs

    def _value(self, argument: Any) -> Any:
        if isinstance(argument, Ref):
            return Ref(self.current.get(argument.index, argument.index))
        if isinstance(argument, list):
            return [self._value(a) for a in argument]
        return self.device if argument == torch.device("meta") else argument

    def _functional(self, op: Op, written: list[str], position: int) -> Any:
        """Return the operator that returns the result which this operator writes into its first input."""
        packet = getattr(aten, op.name, None)
        if written != [schema_of(op.call).arguments[0].name] or not hasattr(packet, op.overload):
            raise NotRepeatableError(f"{op.name} in {op.module or 'the network'} writes in place")
        target = op.inputs[0].index
        root = self.root.get(target, target)
        others = ({r for r, to in self.root.items() if to == root} | {root}) - {target}
        if any(self.last_read.get(r, -1) > position for r in others) or root in self.recording.parameters:
            raise NotRepeatableError(
                f"{op.name} in {op.module or 'the network'} writes into a tensor that has another view"
            )
        return getattr(packet, op.overload)

    def _new(self, shape: tuple[int, ...]) -> int:
        self.num_values += 1
        self.shapes[self.num_values - 1] = shape
        return self.num_values - 1


def _filled(argument: Any, values: Values) -> Any:
    if isinstance(argument, Ref):
        return values[argument.index]
    if isinstance(argument, (list, tuple)):
        return [_filled(a, values) for a in argument]
    return argument


def _refs(arguments: Any) -> Iterator[int]:
    for argument in arguments:
        if isinstance(argument, Ref):
            yield argument.index
        elif isinstance(argument, (list, tuple)):
            yield from _refs(argument)


CONVOLUTION = aten.convolution.default
ACTIVATIONS: dict[Any, Callable[[Step], tuple[str, list[float]]]] = {
    aten.relu.default: lambda s: ("relu", []),
    aten.silu.default: lambda s: ("swish", []),
    aten.hardswish.default: lambda s: ("hardswish", []),
    aten.hardtanh.default: lambda s: ("hardtanh", [float(v) for v in (s.args[1:] or (-1, 1))]),
}


def fuse(program: Program, weights: dict[str, Tensor], device: torch.device) -> Program:
    """Return a faster program whose results differ by rounding only; float32 on a CPU fuses most."""
    rewriting = _Fuser(program)
    rewriting.fold_norms()
    is_float32 = all(w.dtype == torch.float32 for w in weights.values() if w.is_floating_point())
    if device.type == "cpu" and is_float32 and torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        rewriting.fuse_convolutions()
    return rewriting.result()


def to_channels_last(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the same weights, those of two-dimensional convolutions with channels last in memory."""
    return {
        n: w.contiguous(memory_format=torch.channels_last) if w.ndim == 4 else w for n, w in weights.items()
    }


@dataclass(eq=False)
class _Convolution:
    """A convolution that is becoming one fused step.

    Attributes:
        value: the result of the parts that are fused so far.
        other: the value that is added to the convolution's result; None for no addition.
    """

    step: Step
    value: int
    weight: Any
    bias: Any
    other: int | None = None
    activation: tuple[str, list[float]] = field(default_factory=lambda: ("none", []))


class _Fuser:
    def __init__(self, program: Program) -> None:
        self.program, self.varying = program, program.varying()
        self.steps = list(program.steps)
        self.num_values = program.num_values

    def result(self) -> Program:
        return self.program.with_steps(self.steps, self.num_values)

    def fold_norms(self) -> None:
        """Fold each batch norm that is the only reader of a convolution with constant weights."""
        makers, readers, folded = self.program.makers(), self.program.readers(), dict[int, list[Step]]()
        for step in self.steps:
            before = makers.get(step.reads[0]) if step.call in BATCH_NORMS and step.reads else None
            if before is None or not self._folds(before, step) or readers[step.reads[0]] > 1:
                continue
            weight, bias, self.num_values = self.num_values, self.num_values + 1, self.num_values + 2
            args = [before.args[1], before.args[2], *step.args[1:5], step.args[-1]]
            rest = (before.args[0], Ref(weight), Ref(bias), *before.args[3:])
            folded[id(step)] = [
                make_step(fold_weights, args, (weight, bias)),
                make_step(CONVOLUTION, rest, step.makes[:1]),
            ]
        self.steps = [new for step in self.steps for new in folded.get(id(step), [step])]

    def _folds(self, convolution: Step, norm: Step) -> bool:
        if convolution.call is not CONVOLUTION or convolution.args[6]:
            return False
        constants = [*convolution.args[1:3], *norm.args[1:5]]
        is_training = norm.call is aten.native_batch_norm.default and norm.args[5]
        return not is_training and not any(isinstance(a, Ref) and a.index in self.varying for a in constants)

    def fuse_convolutions(self) -> None:
        """Fuse convolutions of images with the additions and activations that follow them."""
        program = self.result()
        self.steps, readers = list(program.steps), program.readers()
        growing: dict[int, _Convolution] = {}
        steps: list[Step | _Convolution] = []
        for step in self.steps:
            if self._is_plain(step):
                convolution = _Convolution(
                    step=step, value=_made(step), weight=step.args[1], bias=step.args[2]
                )
                growing[convolution.value] = convolution
                steps.append(convolution)
                continue
            earlier = next((c for c in self._grown(step, growing, readers)), None)
            if earlier is None:
                steps.append(step)
                continue
            steps.remove(earlier)  # it runs where its last part ran: by then all values that it reads exist
            steps.append(earlier)
            del growing[earlier.value]
            earlier.value = _made(step)
            if earlier.activation[0] == "none":
                growing[earlier.value] = earlier
        self.steps = [_pointwise(c) if isinstance(c, _Convolution) else c for c in steps]

    def _is_plain(self, step: Step) -> bool:
        if step.call is not CONVOLUTION or step.args[6] or any(step.args[7]):
            return False
        x, weight = step.args[0], step.args[1]
        shape = self.program.shapes.get(x.index, ())
        return len(shape) == 4 and x.index in self.varying and weight.index not in self.varying

    def _grown(
        self, step: Step, candidates: dict[int, _Convolution], readers: dict[int, int]
    ) -> Iterator[_Convolution]:
        """Give the convolution that can include this step, after changing it so that it does."""
        for value in step.reads:
            convolution = candidates.get(value)
            if convolution is None or readers[value] > 1:
                continue
            if step.call in ACTIVATIONS and (convolution.other is None or step.call is aten.relu.default):
                convolution.activation = ACTIVATIONS[step.call](step)
                yield convolution
            elif self._adds(step) and convolution.other is None:
                convolution.other = step.reads[1] if step.reads[0] == value else step.reads[0]
                yield convolution

    def _adds(self, step: Step) -> bool:
        """Return whether a step adds two different activations of one shape."""
        if step.call is not aten.add.Tensor or step.kwargs or len(step.reads) != 2 or len(step.args) != 2:
            return False
        shapes = [self.program.shapes.get(v) for v in step.reads]
        return shapes[0] == shapes[1] and shapes[0] is not None and all(v in self.varying for v in step.reads)


def fold_weights(  # noqa: PLR0913 - a convolution's and a norm's own arguments
    weight: Tensor, bias: Tensor | None, scale: Tensor | None, shift: Tensor | None, mean: Tensor,
    var: Tensor, eps: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the weight and bias of the convolution that equals a convolution and a batch norm behind it.

    Jacob et al. 2018, section 3.2.
    """
    factor = torch.rsqrt(var + eps) if scale is None else scale * torch.rsqrt(var + eps)
    offset = -mean * factor if bias is None else (bias - mean) * factor
    return (
        weight * factor.view(-1, *[1] * (weight.ndim - 1)),
        offset if shift is None else offset + shift,
    )


def _made(step: Step) -> int:
    value = step.makes[0]
    assert value is not None
    return value


def _pointwise(convolution: _Convolution) -> Step:
    """Return the fused step, or the unchanged convolution where nothing was fused into it."""
    (name, scalars), old = convolution.activation, convolution.step
    if name == "none" and convolution.other is None:
        return old
    stride, padding, dilation, groups = old.args[3], old.args[4], old.args[5], old.args[8]
    settings = [list(padding), list(stride), list(dilation), groups]
    head = [old.args[0], convolution.weight, convolution.bias]
    if convolution.other is None:
        args = [*head, *settings, name, scalars, ""]
        return make_step(torch.ops.mkldnn._convolution_pointwise.default, args, (convolution.value,))
    after: list[Any] = [None if name == "none" else name, [], None]
    args = [head[0], Ref(convolution.other), *head[1:], *settings, "add", 1.0, *after]
    return make_step(torch.ops.mkldnn._convolution_pointwise.binary, args, (convolution.value,))
