"""The events of a run as JSON lines, one event each, for programs that watch (`autoprune run --events`).

Each line is an object: `event` (the event's name in snake_case), `time` (UTC), and the fields of
`events`. The last line is `result`. A reader MUST ignore events and fields that it does not know.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any, TextIO

from autoprune.events import Event, OnEvent
from autoprune.serialization import json_text, to_plain


def event_writer(stream: TextIO, beside: OnEvent) -> OnEvent:
    """Return an `on_event` that writes every event to a stream at once, and then calls `beside` with it."""

    def write(event: Event) -> None:
        write_line(stream, re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower(), event)
        beside(event)

    return write


def write_line(stream: TextIO, name: str, values: Any) -> None:
    """Write one line: the fields of a dataclass or a dict; a number that is not finite becomes null."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    stream.write(json_text({"event": name, "time": now, **to_plain(values)}) + "\n")
    stream.flush()
