"""What happens in a run as JSON lines, one event each, for programs that watch (`autoprune run --events`).

Each line is an object: `event` (the event's name in snake_case), `time` (UTC), and the fields of
`events`. The last line is `result`. A reader MUST ignore events and fields that it does not know.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from autoprune.events import Event, OnEvent


def event_writer(stream: TextIO, beside: OnEvent) -> OnEvent:
    """A event_display that writes every event to a stream at once, and tells `beside` too."""

    def write(event: Event) -> None:
        write_line(stream, re.sub(r"(?<!^)(?=[A-Z])", "_", type(event).__name__).lower(), asdict(event))
        beside(event)

    return write


def write_line(stream: TextIO, name: str, values: Mapping[str, Any]) -> None:
    """One line; a number that is not finite becomes null."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    stream.write(json.dumps({"event": name, "time": now, **_plain(values)}, allow_nan=False) + "\n")
    stream.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value
