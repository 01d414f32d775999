"""The errors meant for people: each says what was given, what is allowed, and what to do next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def escape_control(text: str) -> str:
    """Return a text for a terminal, in which characters that could steer a terminal are spelled out.

    A file may hold any text; what is not printable could also hide something from the reader.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode() for c in text)


def _rebuild_error(kind: type[AutopruneError], message: str) -> AutopruneError:
    """Make an error without its initialiser; pickle sets its attributes afterwards."""
    return kind.__new__(kind, message)


class AutopruneError(Exception):
    """The base of all errors that a user can act on.

    Args:
        message: the problem, with the offending value and where it came from.
        hint: the next step, as an instruction.
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
    """An error in the command, the study, the data or a key; nothing was started or written."""

    exit_code = 2


class ConfigError(UsageError):
    """An error in one or more settings of a study; all of them are listed together."""

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
    """The error of a network that cannot be traced to an operator graph."""


class DataError(UsageError):
    """The error of a data set that is missing, damaged, overlapping or too small."""


class ArtifactError(AutopruneError):
    """The error of a delivered or stored file that is damaged, unknown, or cannot be decrypted."""


class VerificationError(AutopruneError):
    """The error of a dense network that does not compute what the masked original computes."""


class RunError(AutopruneError):
    """The error of a run that cannot go on; everything finished so far is kept."""


class UnreachableError(UsageError):
    """The error of a cost that no plan has; `nearest_cost` is the nearest that a plan has."""

    def __init__(self, message: str, hint: str, *, nearest_cost: float) -> None:
        super().__init__(message, hint)
        self.nearest_cost = nearest_cost


class TrialError(AutopruneError):
    """The failure of one trial (a diverged training, for instance); the run goes on without the trial."""
