"""One recorded forward pass: the operators that a network runs, with every parameter under its name.

The network runs once, on tensors without storage (the `meta` device), under a dispatch mode that notes each
ATen operator with its arguments. No weight is read and nothing is computed, so this costs milliseconds
where `torch.export` costs seconds, and `forward` may be any Python. A network that cannot run without
values (`.item()`, tensors kept outside the module's registry) is recorded with fake tensors, and if that
fails with real ones.

A tensor of the recorded pass is a `Ref`, an index into `Recording.shapes`. An operator that works in place
returns the Ref that it was given.
"""

from __future__ import annotations

import linecache
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from torch import Tensor, nn

from autoprune.errors import TraceError
from autoprune.structure.meta_shapes import ShapeRule, shape_rule
from autoprune.torch_private import FakeTensorMode, TorchDispatchMode, schema_of, tree_leaves, tree_map_only

TORCH_FOLDER = str(Path(torch.__file__).parent) + "/"
CALL_MARKER = "PASSES_CALLS_ON"  # a global of modules whose functions pass the user's calls on
META = torch.device("meta")
UNSAFE_VIEW = torch.ops.aten._unsafe_view.default  # a view, though its schema does not say so


@dataclass(frozen=True, slots=True)
class Ref:
    """A tensor of the recorded pass."""

    index: int


@dataclass(slots=True)
class Op:
    """One operator call.

    Attributes:
        name: the operator's name without namespace, overload and in-place underscore (`add`,
            `convolution`).
        overload: the overload of the schema (`Tensor`, `default`).
        arguments: by the schema's names, tensors as `Ref`.
        outputs: the results in order, None where an output is no tensor.
        module: qualified name of the innermost module whose forward was running.
        where: `file:line` of the innermost frame outside torch, see `source_line`.
        is_pointwise: whether torch tags the operator as computed position by position.
        is_in_place: whether it writes into one of its inputs.
        makes: whether its results are new tensors, neither views nor what it was given.
        call: the operator itself, so that it can be run again.
        inputs: all tensor arguments, in order.
    """

    name: str
    overload: str
    arguments: dict[str, Any]
    outputs: tuple[Ref | None, ...]
    module: str
    where: str
    is_pointwise: bool
    is_in_place: bool
    makes: bool
    call: Any = field(repr=False, compare=False)
    inputs: list[Ref] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.inputs = list(_refs(self.arguments.values()))

    def arg(self, name: str, default: Any = None) -> Any:
        """Return the argument called `name`, or `default` where the call left it out."""
        return self.arguments.get(name, default)


@dataclass(slots=True)
class Recording:
    """A recorded forward pass.

    Attributes:
        ops: the operators, in the order in which they ran.
        shapes: shape of every Ref; `strides` and `dtypes` likewise.
        parameters: Ref index -> qualified name of the parameter or buffer, the first name where it is tied.
        inputs: Refs of the example inputs' tensors.
        outputs: Refs of the result's tensors.
        calls: module name -> how often its forward ran.
        constants: Ref index -> indices that the program holds and that have values.
        is_meta: whether it ran without values at all.
    """

    ops: list[Op] = field(default_factory=list)
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    strides: list[tuple[int, ...]] = field(default_factory=list)
    dtypes: list[torch.dtype] = field(default_factory=list)
    parameters: dict[int, str] = field(default_factory=dict)
    inputs: list[Ref] = field(default_factory=list)
    outputs: list[Ref] = field(default_factory=list)
    calls: dict[str, int] = field(default_factory=dict)
    constants: dict[int, Tensor] = field(default_factory=dict)
    is_meta: bool = True

    def readers(self) -> dict[int, list[int]]:
        """Return for each Ref index the positions of the operators that read it, in order."""
        readers: dict[int, list[int]] = {}
        for position, op in enumerate(self.ops):
            for index in {r.index for r in op.inputs}:
                readers.setdefault(index, []).append(position)
        return readers

    def live(self) -> list[bool]:
        """Return for each operator whether its result reaches an output; one in place always counts."""
        needed = {r.index for r in self.outputs}
        live = []
        for op in reversed(self.ops):
            is_live = op.is_in_place or any(r is not None and r.index in needed for r in op.outputs)
            live.append(is_live)
            if is_live:
                needed.update(r.index for r in op.inputs)
        return live[::-1]


def record(model: nn.Module, example_inputs: tuple[Any, ...]) -> Recording:
    """Run `model` once in evaluation mode and record its operators.

    The model is left as it was: modes, parameters, buffers, attributes. Cost: one pass without arithmetic,
    and without memory for tensors, where the forward runs without values.

    Args:
        example_inputs: the tuple of forward's arguments.

    Raises:
        TraceError: the forward pass fails on these inputs, with the module and the line.
    """
    recorder: _Recorder | None = None
    error: Exception | None = None
    for run in (_run_meta, _run_fake, _run_real):
        recorder = _Recorder(model)
        try:
            with _evaluating(model):
                run(model, example_inputs, recorder)
            recorder.recording.is_meta = run is _run_meta
            return recorder.recording
        except Exception as caught:
            error = caught
    assert recorder is not None
    raise TraceError(
        f"the network's forward pass fails on the example input in {recorder.location()}: "
        f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else _last_line(error)}",
        "run model(example_input) yourself; give an input of the shape and type that the network takes (with "
        "--data, `size=` and `channels=` after the folder say which)",
    ) from error


def record_on_meta(model: nn.Module, example_inputs: tuple[Any, ...]) -> Recording:
    """Record a network whose parameters are on the meta device, as `record` does.

    Errors of its forward pass through. The network is a throw-away copy: it is left in evaluation mode,
    without gradients, with whatever attributes its forward has set.
    """
    recorder = _Recorder(model)
    recorder.is_meta = True
    moved = tree_map_only(Tensor, lambda t: t.to(META), example_inputs)
    state = dict(_named_tensors(model))
    for tensor in state.values():
        tensor.requires_grad_(False)  # torch multiplies by other operators where gradients may be wanted
    for module in model.modules():
        module.training = False
    with torch.no_grad(), _unfused_attention():
        recorder.run(lambda: model(*moved), state, moved)
    return recorder.recording


def _run_meta(model: nn.Module, inputs: tuple[Any, ...], recorder: _Recorder) -> None:
    state: dict[str, Tensor] = {}
    copies: dict[int, Tensor] = {}
    for name, tensor in _named_tensors(model):
        state[name] = copies.setdefault(id(tensor), tensor.detach().to("meta"))
    moved = tree_map_only(Tensor, lambda t: t.to("meta"), inputs)
    recorder.is_meta = True
    with torch.no_grad():
        recorder.run(lambda: torch.func.functional_call(model, state, moved, tie_weights=False), state, moved)


def _run_fake(model: nn.Module, inputs: tuple[Any, ...], recorder: _Recorder) -> None:
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    copies: dict[int, Tensor] = {}
    state = {
        name: copies.setdefault(id(tensor), fake.from_tensor(tensor.detach()))
        for name, tensor in _named_tensors(model)
    }
    moved = tree_map_only(Tensor, fake.from_tensor, inputs)
    with torch.no_grad(), fake:
        recorder.run(lambda: torch.func.functional_call(model, state, moved, tie_weights=False), state, moved)


def _run_real(model: nn.Module, inputs: tuple[Any, ...], recorder: _Recorder) -> None:
    state = dict(_named_tensors(model))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        recorder.run(lambda: model(*inputs), state, inputs)


def _named_tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode without fused attention, and then restore every module's attributes.

    The flags are set directly, as a user's `train` may do more. A forward pass may keep tensors on its
    modules (weight_norm's weight, a cached position table); here these have no values, so they must not
    stay.
    """
    before = [(module, _attributes(module)) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        with _unfused_attention():
            yield
    finally:
        for module, attributes in before:
            _put_back(module, attributes)


@contextmanager
def _unfused_attention() -> Iterator[None]:
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def _attributes(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """Return every attribute, and a copy of the contents of those that are containers."""
    return {n: (v, copy(v) if type(v) in (dict, list, set) else None) for n, v in vars(module).items()}


def _put_back(module: nn.Module, attributes: dict[str, tuple[Any, Any]]) -> None:
    for name in vars(module).keys() - attributes.keys():
        del module.__dict__[name]
    for name, (value, contents) in attributes.items():
        module.__dict__[name] = value
        if contents is not None:
            value.clear()
            value.extend(contents) if type(value) is list else value.update(contents)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The dispatch mode that notes every operator of one forward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recording = Recording()
        self.names = {id(m): name for name, m in model.named_modules()}
        self.is_meta = False
        self.stack: list[str] = [""]
        self.refs: dict[int, Ref] = {}
        self.alive: list[Tensor] = []  # an id is only unique while its tensor lives

    def run(self, forward: Callable[[], Any], state: Mapping[str, Tensor], inputs: tuple[Any, ...]) -> None:
        for name, tensor in state.items():
            if id(tensor) not in self.refs:
                self.recording.parameters[self.ref(tensor).index] = name
        self.recording.inputs = [self.ref(t) for t in tree_leaves(inputs) if isinstance(t, Tensor)]
        with ExitStack() as hooks:
            before = nn.modules.module.register_module_forward_pre_hook(self._enter)
            after = nn.modules.module.register_module_forward_hook(self._leave)
            hooks.callback(before.remove)
            hooks.callback(after.remove)
            hooks.enter_context(self)
            result = forward()
        self.recording.outputs = [self.ref(t) for t in tree_leaves(result) if isinstance(t, Tensor)]

    def location(self) -> str:
        """Return the module that the pass was in when it ended, in words."""
        return f"module {self.stack[-1]!r}" if self.stack[-1] else "the network's own forward"

    def ref(self, tensor: Tensor) -> Ref:
        ref = self.refs.get(id(tensor))
        if ref is None:
            ref = self.refs[id(tensor)] = Ref(len(self.recording.shapes))
            self.recording.shapes.append(tuple(tensor.shape))
            self.recording.strides.append(tuple(tensor.stride()) if tensor.layout is torch.strided else ())
            self.recording.dtypes.append(tensor.dtype)
            self.alive.append(tensor)
        return ref

    def _enter(self, module: nn.Module, _: Any) -> None:
        name = self.names.get(id(module), self.stack[-1])
        self.stack.append(name)
        self.recording.calls[name] = self.recording.calls.get(name, 0) + 1

    def _leave(self, _module: nn.Module, _args: Any, _result: Any) -> None:
        self.stack.pop()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        kind = _kind(func)
        arguments = {n: self._note(v) for n, v in zip(kind.arguments, args, strict=False)}
        arguments |= {n: self._note(v) for n, v in kwargs.items()}
        result: Any = None
        if kind.shape_rule is not None and self.is_meta:
            result = kind.shape_rule(*args, **kwargs)
        if result is None:
            result = self._called(func, kind, args, kwargs)
        if not kind.is_prim:
            outputs = result if isinstance(result, (tuple, list)) else (result,)
            self.recording.ops.append(
                Op(
                    name=kind.name,
                    overload=kind.overload,
                    arguments=arguments,
                    outputs=tuple(self.ref(t) if isinstance(t, Tensor) else None for t in outputs),
                    module=self.stack[-1],
                    where=source_line(sys._getframe(1)),
                    is_pointwise=kind.is_pointwise,
                    is_in_place=kind.is_in_place,
                    makes=kind.makes,
                    call=func,
                )
            )
        return result

    def _called(self, func: Any, kind: _Kind, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Return the operator's own result.

        Without values, new tensors have none, and constants lose theirs. A constant that the program keeps
        to itself is computed as it is, until it meets a tensor without values.
        """
        if not self.is_meta:
            return func(*args, **kwargs)
        tensors = list(_tensors([*args, *kwargs.values()]))
        if not tensors and kind.makes_new:
            return func(*args, **{**kwargs, "device": META})
        if len({t.is_meta for t in tensors}) > 1:
            indices = [t for t in tensors if not t.is_meta and t.dtype == torch.int64 and t.dim() == 1]
            self.recording.constants.update({self.ref(t).index: t for t in indices})
            args, kwargs = tree_map_only(Tensor, lambda t: t if t.is_meta else t.to(META), (args, kwargs))
        return func(*args, **kwargs)

    def _note(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.ref(value)
        if isinstance(value, (list, tuple)):
            return [self._note(v) for v in value]
        return value


@dataclass(frozen=True, slots=True)
class _Kind:
    """The facts that are the same for all calls of an operator; see `Op`.

    Attributes:
        is_prim: whether it is no ATen operator, and is not recorded.
        makes_new: whether it makes a tensor from nothing, on a device that it is given.
        shape_rule: the function that makes its result without values, if there is one.
    """

    name: str
    overload: str
    arguments: tuple[str, ...]
    is_pointwise: bool
    is_in_place: bool
    makes: bool
    is_prim: bool
    makes_new: bool
    shape_rule: ShapeRule | None


@cache
def _kind(func: Any) -> _Kind:
    schema, name = schema_of(func), cast("str", func.overloadpacket.__name__)
    arguments = tuple(a.name for a in schema.arguments)
    return _Kind(
        name=name if name.startswith("__") else name.rstrip("_"),
        overload=schema.overload_name or "default",
        arguments=arguments,
        is_pointwise=torch.Tag.pointwise in func.tags,
        is_in_place=schema.is_mutable,
        makes=func is not UNSAFE_VIEW and any(r.alias_info is None for r in schema.returns),
        is_prim=func.namespace.startswith("prim"),
        makes_new="device" in arguments,
        shape_rule=shape_rule(name, schema.overload_name or "default") if func.namespace == "aten" else None,
    )


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def _refs(values: Any) -> Iterator[Ref]:
    for value in values:
        if isinstance(value, Ref):
            yield value
        elif isinstance(value, list):
            yield from _refs(value)


def _last_line(error: BaseException | None) -> str:
    """Return where an error without a message arose: the innermost line that is not torch's."""
    frames = list(traceback.walk_tb(error.__traceback__ if error else None))
    own = [(f, line) for f, line in frames if not _passes_on(f)] or frames
    if not own:
        return ""
    frame, line = own[-1]
    file = frame.f_code.co_filename
    return f"no message, at {Path(file).name}:{line}: {linecache.getline(file, line).strip()}"


def source_line(frame: FrameType) -> str:
    """Return `file:line` of the innermost frame that is neither torch's own nor passes a call on.

    Functions pass calls on if their module has a global `PASSES_CALLS_ON`: the modes that replace calls in
    a patched forward (`patches.forward_mode`). Without skipping them, all calls of such a module would seem
    to be on a few lines of ours. The result is "in torch" where no line of the user's is on the way.
    """
    while frame.f_back is not None and _passes_on(frame):
        frame = frame.f_back
    file = frame.f_code.co_filename
    return "in torch" if file == __file__ else f"{file.rpartition(os.sep)[2]}:{frame.f_lineno}"


def _passes_on(frame: FrameType) -> bool:
    return frame.f_code.co_filename.startswith(TORCH_FOLDER) or CALL_MARKER in frame.f_globals
