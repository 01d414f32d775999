"""A copy of a module tree whose tensors are changed on the way.

`copy.deepcopy` spends its time on the dozen empty hook dictionaries of every module. Here modules are copied
by hand and only what they hold besides numbers, tensors and modules goes through `deepcopy`, as do classes
that say themselves how they are copied.
"""

from __future__ import annotations

import copy
import copyreg
import gc
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

Change = Callable[[str, Tensor], Tensor]
ATOMS = frozenset(
    {int, float, bool, str, bytes, complex, type(None), type, FunctionType, BuiltinFunctionType}
    | {torch.dtype, torch.device, torch.Size}
)
OWN_WAYS = ("__deepcopy__", "__copy__", "__reduce__", "__reduce_ex__", "__getstate__", "__getnewargs__")


def copy_model(model: nn.Module, change: Change) -> nn.Module:
    """A copy of the module tree whose tensors are `change`d on the way; tied ones stay tied."""
    memo: dict[int, Any] = {}
    parameters, buffers = named_tensors(model)
    for name, parameter in parameters:
        if id(parameter) not in memo:
            data = change(name, parameter.detach())
            memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for name, buffer in buffers:
        if id(buffer) not in memo:
            memo[id(buffer)] = change(name, buffer.detach())
    modules: list[nn.Module] = list(named_modules(model).values())
    for module in modules:
        for value in vars(module).values():
            if isinstance(value, Tensor) and id(value) not in memo:
                memo[id(value)] = value.detach().clone()
    plain = [m for m in modules if _is_plain(type(m))]  # type: ignore[arg-type]
    memo |= {id(m): type(m).__new__(type(m)) for m in plain}
    for module in plain:
        attributes = module.__getstate__()  # type: ignore[no-untyped-call]
        state = {name: _copied(value, memo) for name, value in attributes.items()}
        memo[id(module)].__setstate__(state)
    return copy.deepcopy(model, memo)


def named_tensors(model: nn.Module) -> tuple[list[tuple[str, Tensor]], list[tuple[str, Tensor]]]:
    """Parameters and buffers with their qualified names, a tied one under each of its names."""
    parameters: list[tuple[str, Tensor]] = []
    buffers: list[tuple[str, Tensor]] = []

    def visit(module: nn.Module, prefix: str) -> None:
        parameters.extend((prefix + n, p) for n, p in module._parameters.items() if p is not None)
        buffers.extend((prefix + n, b) for n, b in module._buffers.items() if b is not None)
        for name, child in module._modules.items():
            if child is not None:
                visit(child, f"{prefix}{name}.")

    visit(model, "")
    return parameters, buffers


def named_modules(model: nn.Module) -> dict[str, Any]:
    """Every module once under its first name, in the order of `nn.Module.named_modules`, but faster."""
    found: dict[str, Any] = {}
    seen: set[int] = set()

    def visit(module: nn.Module, name: str) -> None:
        if id(module) in seen:
            return
        seen.add(id(module))
        found[name] = module
        prefix = f"{name}." if name else ""
        for part, child in module._modules.items():
            if child is not None:
                visit(child, prefix + part)

    visit(model, "")
    return found


@contextmanager
def collector_paused() -> Iterator[None]:
    """Many small objects would wake Python's collector of cycles again and again, for nothing."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@cache
def _is_plain(cls: type[nn.Module]) -> bool:
    """Whether copying an instance means copying its attributes, and nothing else."""
    is_usual = all(getattr(cls, n, None) is getattr(nn.Module, n, None) for n in OWN_WAYS)
    is_container = issubclass(cls, (dict, list, tuple, set))
    return is_usual and not is_container and not copyreg._slotnames(cls)  # type: ignore[attr-defined]


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in ATOMS:
        return value
    if kind is OrderedDict and not value:
        return OrderedDict()
    known = memo.get(id(value))
    if known is not None:
        return known
    if kind in (dict, OrderedDict):
        mapping = memo[id(value)] = kind()
        for key, item in value.items():
            mapping[_copied(key, memo)] = _copied(item, memo)
        return mapping
    if kind is list:
        items: list[Any] = []
        memo[id(value)] = items
        items.extend(_copied(item, memo) for item in value)
        return items
    if kind in (tuple, set) and all(type(item) in ATOMS for item in value):
        return value if kind is tuple else memo.setdefault(id(value), set(value))
    return copy.deepcopy(value, memo)
