"""The forms in which people see numbers: one for each kind, in the terminal and in the report alike.

Percentages of a whole are written with a space before the sign, differences of percentages are `pp`, counts
have SI prefixes and three digits, and a minus is a minus, not a hyphen. A missing number is a dash.
"""

from __future__ import annotations

MISSING = "–"  # noqa: RUF001 an en dash, the usual sign for "no value" in a table
MINUS = "−"  # noqa: RUF001
METRICS = {"macs": "MACs", "params": "parameters", "size": "size of the weights", "memory": "memory",
           "latency": "latency"}  # fmt: skip
ACTIONS = {
    "promote": "promoted",
    "lower": "ceiling lowered",
    "go_back": "went back",
    "finish": "target reached",
    "stop": "stopped",
}


def percent(share: float | None, digits: int = 1) -> str:
    """Return a share in [0, 1] as a percentage: 0.9173 -> `91.7 %`."""
    return MISSING if share is None else f"{100 * share:.{digits}f} %"


def signed(value: float, digits: int = 1) -> str:
    """Return a difference with its sign, and none on a zero: -0.23 -> `−0.2`."""
    text = f"{abs(value):.{digits}f}"
    if float(text) == 0:
        return text
    return f"{MINUS if value < 0 else '+'}{text}"


def count(value: float | None) -> str:
    """Return a count with three digits and an SI prefix: 40813184 -> `40.8 M`."""
    return MISSING if value is None else _scaled(value, ("", "k", "M", "G", "T"))


def size(num_bytes: float | None) -> str:
    """Return a file size in decimal units: 1085000 -> `1.09 MB`."""
    return MISSING if num_bytes is None else _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB"))


def _scaled(value: float, units: tuple[str, ...]) -> str:
    step = 0
    while abs(value) >= 999.5 and step < len(units) - 1:
        value, step = value / 1000, step + 1
    digits = 0 if step == 0 else max(0, 3 - len(str(int(abs(value)))))
    return f"{value:.{digits}f} {units[step]}".rstrip()


def milliseconds(value: float | None) -> str:
    """Return a latency with three digits: 4.187 -> `4.19 ms`."""
    if value is None:
        return MISSING
    return f"{value:.{max(0, 3 - len(str(int(value))))}f} ms"


def duration(seconds: float) -> str:
    """Return a time span: 83 -> `1:23 min`, 4.2 -> `4.2 s`, 7325 -> `2:02 h`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    minutes = rounded // 60
    return f"{minutes}:{rounded % 60:02d} min" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d} h"


def clock(seconds: float) -> str:
    """Return a running time in a form whose width does not change every second: 83 -> `0:01:23`."""
    total = int(seconds)
    return f"{total // 3600}:{total // 60 % 60:02d}:{total % 60:02d}"


def plural(number: int, noun: str) -> str:
    """Return a number with the name of its things: `1 trial`, `3 trials`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def setting(value: object) -> str:
    """Return a trial parameter or setting as text: floats with three digits, everything else as it is."""
    return f"{value:.3g}" if isinstance(value, float) else str(value)
