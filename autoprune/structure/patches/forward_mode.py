"""The parts that all patches of a forward pass share: a mode that replaces calls, and call sites.

A patched module keeps the user's class and parameters. It becomes an instance of a subclass (`mix_in_`)
whose forward runs the user's own forward under a `PatchMode`, a `torch.overrides.TorchFunctionMode` that
sees every torch function before it runs and may run another one instead.

A *call site* identifies a call: the line of source on which it is written, and how many watched calls the
pass has made from that line before. The line is the same in the recorded pass (`recorder`) and in every
later one, whatever module the call passes through on its way. A compiler cannot see lines; there the number
of the call in the pass identifies it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from autoprune.structure.recorder import CALL_MARKER, source_line

CallSite = tuple[str, int]  # a line, and how many watched calls of this pass came from it before

PASSES_CALLS_ON = True  # see `recorder.source_line`


class PatchMode(TorchFunctionMode):
    """A mode that gives every torch function of one forward pass to `replace`.

    The modules that define subclasses must set `PASSES_CALLS_ON`, or the calls that they pass on would seem
    to be written in them; a subclass in a module without it is refused when it is defined.

    Attributes:
        num_calls: watched calls of this pass so far.
    """

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        assert CALL_MARKER in vars(sys.modules[cls.__module__]), f"{cls.__module__} lacks {CALL_MARKER}"

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0
        self._turns: Counter[str] = Counter()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return self.replace(func, args, kwargs or {})

    def replace(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return the result of the call, or of what runs in its place."""
        raise NotImplementedError

    def count_call(self) -> CallSite:
        """Count a watched call and return its site; the line is empty under a compiler."""
        self.num_calls += 1
        line = "" if torch.compiler.is_dynamo_compiling() else source_line(sys._getframe(1))
        turn, self._turns[line] = self._turns[line], self._turns[line] + 1
        return line, turn


def mix_in_(module: nn.Module, mixin: type) -> None:
    """Change a module to a subclass of its class that has `mixin` before it, unless it is one already."""
    if not isinstance(module, mixin):
        module.__class__ = _mixed(mixin, type(module))  # type: ignore[arg-type]


@cache
def _mixed(mixin: type, cls: type[nn.Module]) -> type[nn.Module]:
    return type(cls.__name__, (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})
