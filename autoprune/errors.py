"""Every error meant for people: what was given, what is allowed, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def escape_control(text: str) -> str:
    """Text for a terminal: what could steer one, or hide in it, is spelled out; files may hold anything."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _rebuild_error(kind: type[AutopruneError], message: str) -> AutopruneError:
    """Make an error without its initialiser; pickle sets its attributes afterwards."""
    return kind.__new__(kind, message)


class AutopruneError(Exception):
    """Base of all errors that a user can act on.

    Args:
        message: what is wrong, with the offending value and where it came from.
        hint: what to do next, as an instruction.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str) -> None:
        self.message, self.hint = escape_control(message), escape_control(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is rebuilt from `args` by default, which would call __init__ without the hint: the
        # error of a data loader's process would then arrive as a TypeError about a missing argument.
        return _rebuild_error, (type(self), self.message), self.__dict__


class UsageError(AutopruneError):
    """The command, the study, the data or a key is wrong; nothing was started or written."""

    exit_code = 2


class ConfigError(UsageError):
    """One or more settings of a study are wrong; all of them are listed together."""

    def __init__(self, problems: Sequence[AutopruneError]) -> None:
        self.problems = tuple(problems)
        lines = [p.message for p in problems]
        message = (
            lines[0]
            if len(lines) == 1
            else "the study has several problems:\n" + "\n".join(f"  - {line}" for line in lines)
        )
        super().__init__(message, "; ".join(dict.fromkeys(p.hint for p in problems)))


class TraceError(UsageError):
    """The network cannot be traced to an operator graph."""


class DataError(UsageError):
    """A data set is missing, damaged, overlapping or too small."""


class ArtifactError(AutopruneError):
    """A delivered or stored file is damaged, unknown, or cannot be decrypted."""


class VerificationError(AutopruneError):
    """The dense network does not compute what the masked original computes."""


class RunError(AutopruneError):
    """A run cannot go on; everything finished so far is kept."""


class UnreachableError(UsageError):
    """No plan costs what was asked for; `nearest_cost` is the nearest that one costs."""

    def __init__(self, message: str, hint: str, *, nearest_cost: float) -> None:
        super().__init__(message, hint)
        self.nearest_cost = nearest_cost


class TrialError(AutopruneError):
    """One trial failed (its training diverged, for instance); the run goes on without it."""
