"""Running a recorded pass again, with other weights, from where these first matter.

A recording becomes a *program*: steps in which every value is made once (an operator in place makes a new
value). A step that depends on weights alone is *constant* and runs once per set of weights. For a change of
some weights, the *suffix* is what must run again: the constant steps and the others that these weights reach.
What such steps read besides is the *cut*, kept from one run of the whole program on the same batch.

A pass that draws random numbers, that reads values (`.item()`), or that writes into a tensor which is seen
through another cannot be replayed; `program` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from autoprune.structure import Op, Recording, Ref

aten = torch.ops.aten
Values = dict[int, Tensor]
VIEWS = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default}
BATCH_NORMS = (aten.native_batch_norm.default, aten._native_batch_norm_legit_no_training.default)


class NotReplayableError(Exception):
    """Why a recorded pass cannot be run again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One call: tensors among its arguments are Refs, `makes` are the values of its results."""

    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    makes: tuple[int | None, ...]
    reads: tuple[int, ...]

    def run(self, values: Values) -> None:
        """Compute the results from the values read, and add them."""
        args = [_filled(a, values) for a in self.args]
        kwargs = {n: _filled(a, values) for n, a in self.kwargs.items()}
        result = self.call(*args, **kwargs)
        results = result if isinstance(result, (tuple, list)) else (result,)
        for number, tensor in zip(self.makes, results, strict=False):
            if number is not None:
                values[number] = tensor


def step(call: Callable[..., Any], args: Sequence[Any], makes: Sequence[int | None], **kwargs: Any) -> Step:
    """A step that reads whatever tensors are among its arguments."""
    reads = tuple(dict.fromkeys(_refs([*args, *kwargs.values()])))
    return Step(call=call, args=tuple(args), kwargs=kwargs, makes=tuple(makes), reads=reads)


@dataclass(frozen=True, kw_only=True)
class Program:
    """A pass without writing in place.

    Attributes:
        parameters: value -> qualified name.
        shapes: of the values that the recording knows.
        num_values: all values are below.
    """

    steps: tuple[Step, ...]
    parameters: Mapping[int, str]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    shapes: Mapping[int, tuple[int, ...]]
    num_values: int

    def varying(self) -> set[int]:
        """The values that depend on the input."""
        return reached(self.steps, set(self.inputs))

    def makers(self) -> dict[int, Step]:
        """Which step makes each value."""
        return {v: s for s in self.steps for v in s.makes if v is not None}

    def readers(self) -> dict[int, int]:
        """How many steps read each value; an output has one reader more."""
        counts = dict.fromkeys(self.outputs, 1)
        for one in self.steps:
            for value in one.reads:
                counts[value] = counts.get(value, 0) + 1
        return counts

    def with_steps(self, steps: Iterable[Step], num_values: int) -> Program:
        """The same program by other steps; what no output needs is left out."""
        return replace(self, steps=_needed(tuple(steps), self.outputs), num_values=num_values)


@dataclass(frozen=True, kw_only=True)
class Suffix:
    """What must run again when some weights change.

    Attributes:
        constant: steps that depend on weights alone.
        steps: the others, each with the values that nobody needs after it.
        cut: values of the whole run that these read.
        outputs: the program's outputs that change, by position.
    """

    constant: tuple[Step, ...]
    steps: tuple[tuple[Step, tuple[int, ...]], ...]
    cut: frozenset[int]
    outputs: Mapping[int, int]


def program(recording: Recording, device: torch.device) -> Program:
    """Turn a recording into steps that can run on real tensors on `device`.

    Raises:
        NotReplayableError: the pass cannot be repeated from its operators alone.
    """
    if not recording.is_meta:
        raise NotReplayableError("its forward pass depends on the values in it")
    made = _Maker(recording, device)
    for position, op in enumerate(recording.ops):
        made.add(position, op)
    outputs = tuple(made.current.get(r.index, r.index) for r in recording.outputs)
    steps = _needed(tuple(made.steps), outputs)
    known = {*recording.parameters, *(r.index for r in recording.inputs)} | {
        v for s in steps for v in s.makes if v
    }
    if unknown := {v for s in steps for v in s.reads} - known:
        raise NotReplayableError(f"it reads {len(unknown)} tensors that are neither weights nor inputs")
    return Program(
        steps=steps, parameters=dict(recording.parameters), inputs=tuple(r.index for r in recording.inputs),
        outputs=outputs, shapes=made.shapes, num_values=made.num_values,
    )  # fmt: skip


def calibrating(program: Program) -> tuple[Program, dict[int, str]]:
    """The program whose batch norms use their batch's statistics, and give these out: value -> buffer name.

    Variances are unbiased, as running variances are. A suffix of it can start from what a run of the given
    program kept: then the norms above it stay as they are.
    """
    steps, names, number = [], dict[int, str](), program.num_values
    for one in program.steps:
        mean, var = (one.args[3], one.args[4]) if one.call in BATCH_NORMS else (None, None)
        if not (isinstance(mean, Ref) and isinstance(var, Ref)):
            steps.append(one)
            continue
        makes = (one.makes[0], number, number + 1)
        names |= {number: program.parameters[mean.index], number + 1: program.parameters[var.index]}
        steps.append(step(normalized, (*one.args[:3], one.args[-1]), makes))
        number += 2
    return replace(program, outputs=tuple(names)).with_steps(steps, number), names


def normalized(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """Batch norm by the batch's own statistics: the result, the mean (C,), the unbiased variance (C,)."""
    y, mean, deviation = torch.native_batch_norm(x, weight, bias, None, None, True, 0.0, eps)
    count = x.numel() // x.shape[1]
    return y, mean, (deviation**-2 - eps) * (count / max(count - 1, 1))


def suffix(program: Program, changed: Iterable[str]) -> Suffix:
    """What must run again when the weights of these names change."""
    names, varying = set(changed), program.varying()
    dirty = reached(program.steps, {v for v, n in program.parameters.items() if n in names})
    steps = [s for s in program.steps if any(v in dirty for v in s.reads)]
    moving = [s for s in steps if any(v in varying for v in s.reads)]
    cut = frozenset(v for s in moving for v in s.reads if v in varying and v not in dirty)
    outputs = {i: v for i, v in enumerate(program.outputs) if v in dirty}
    return Suffix(
        constant=tuple(s for s in steps if not any(v in varying for v in s.reads)),
        steps=_with_frees(moving, {*cut, *outputs.values()} | (dirty - varying)),
        cut=cut, outputs=outputs,
    )  # fmt: skip


class Replay:
    """A program with one set of weights; `run` it whole, or a suffix of it with some weights changed.

    Args:
        program: what to run.
        weights: by qualified name, on the device where it runs.
        keep: values to keep from a whole run: the cuts of the suffixes to come.
    """

    def __init__(self, program: Program, weights: Mapping[str, Tensor], keep: Iterable[int] = ()) -> None:
        self.program = program
        varying = program.varying()
        self.constants: Values = {v: weights[n] for v, n in program.parameters.items() if n in weights}
        for one in program.steps:
            if not any(v in varying for v in one.reads):
                one.run(self.constants)
        moving = [s for s in program.steps if any(v in varying for v in s.reads)]
        self.steps = _with_frees(moving, {*keep, *program.outputs, *self.constants})

    def narrowed(self, values: Iterable[int]) -> Replay:
        """The same with fewer steps: those that these values need."""
        less, wanted = copy(self), set(values)
        less.steps = _with_frees(_needed(tuple(s for s, _ in self.steps), wanted), {*wanted, *self.constants})
        return less

    def run(self, *inputs: Tensor) -> Values:
        """Every output and every value that is to be kept."""
        values = dict(zip(self.program.inputs, inputs, strict=True))
        return _run(self.steps, {**self.constants, **values})

    def bind(self, suffix: Suffix, weights: Mapping[str, Tensor]) -> Values:
        """The constants that change with these weights."""
        values = {**self.constants}
        values |= {v: weights[n] for v, n in self.program.parameters.items() if n in weights}
        for one in suffix.constant:
            one.run(values)
        return values

    def rerun(self, suffix: Suffix, bound: Values, kept: Values) -> dict[int, Tensor]:
        """The outputs that change, by position."""
        values = _run(suffix.steps, {**bound, **{v: kept[v] for v in suffix.cut}})
        return {i: values[v] for i, v in suffix.outputs.items()}


def reached(steps: Iterable[Step], start: set[int]) -> set[int]:
    """All values that depend on these."""
    found = set(start)
    for one in steps:
        if any(v in found for v in one.reads):
            found.update(v for v in one.makes if v is not None)
    return found


def _run(steps: Iterable[tuple[Step, tuple[int, ...]]], values: Values) -> Values:
    for one, frees in steps:
        one.run(values)
        for value in frees:
            del values[value]
    return values


def _with_frees(steps: Sequence[Step], keep: set[int]) -> tuple[tuple[Step, tuple[int, ...]], ...]:
    """Each step with the values that nobody needs after it."""
    seen, found = set(keep), []
    for one in reversed(steps):
        mine = {v for v in (*one.reads, *one.makes) if v is not None}
        found.append((one, tuple(mine - seen)))
        seen |= mine
    return tuple(reversed(found))


def _needed(steps: tuple[Step, ...], outputs: Iterable[int]) -> tuple[Step, ...]:
    needed, found = set(outputs), []
    for one in reversed(steps):
        if any(v in needed for v in one.makes):
            found.append(one)
            needed.update(one.reads)
    return tuple(reversed(found))


class _Maker:
    """Rewrites a recording's operators, one after the other."""

    def __init__(self, recording: Recording, device: torch.device) -> None:
        self.recording, self.device = recording, device
        self.steps: list[Step] = []
        self.current: dict[int, int] = {}  # Ref -> its value now, where that is not the Ref's own
        self.root: dict[int, int] = {}  # view -> what it looks into
        self.num_values = len(recording.shapes)
        self.shapes = dict(enumerate(recording.shapes))
        self.last_read = {r.index: i for i, op in enumerate(recording.ops) for r in op.inputs}
        self.last_read |= dict.fromkeys((r.index for r in recording.outputs), len(recording.ops))

    def add(self, position: int, op: Op) -> None:
        if torch.Tag.nondeterministic_seeded in op.call.tags:
            raise NotReplayableError(f"{op.name} in {op.module or 'the network'} is random")
        if op.call is aten.as_strided.default:
            raise NotReplayableError(f"as_strided in {op.module or 'the network'} asks for one memory layout")
        schema = op.call._schema
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
        self.steps.append(step(call, args, makes, **kwargs))

    def _call(self, op: Op) -> tuple[Any, list[Any], dict[str, Any]]:
        """The operator, its positional arguments and the others, in terms of values."""
        args, kwargs, is_positional = [], {}, True
        for argument in op.call._schema.arguments:
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
        """The operator that gives its result out where this one writes it into its first input."""
        packet = getattr(aten, op.name, None)
        if written != [op.call._schema.arguments[0].name] or not hasattr(packet, op.overload):
            raise NotReplayableError(f"{op.name} in {op.module or 'the network'} writes in place")
        target = op.inputs[0].index
        root = self.root.get(target, target)
        others = ({r for r, to in self.root.items() if to == root} | {root}) - {target}
        if any(self.last_read.get(r, -1) > position for r in others) or root in self.recording.parameters:
            raise NotReplayableError(
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
