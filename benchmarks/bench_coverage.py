"""Which networks does autoprune understand, how exactly, and how fast? Torch-Pruning takes the same ones.

    python benchmarks/bench_coverage.py torchvision                # 80 classifiers, both tools
    python benchmarks/bench_coverage.py timm --no-peer             # the list in coverage_models.py
    python benchmarks/bench_coverage.py 'torchvision:resnet*' levit_128s --out /tmp/few
    python benchmarks/bench_coverage.py 'torchvision:convnext*' --norms rescale --no-peer

Every network runs in a process of its own, per tool, with a time and a memory limit. Results go to OUT.csv
as they come; networks that are in it already are skipped. OUT.md is made from it at the end (`--page`: only
that).
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import coverage_models
from coverage_table import OURS, PEER, Row, Rows, page, read_rows, write_rows
from machine import commit, memory_gb, processor, versions

HERE = Path(__file__).resolve().parent
WORKER = HERE / "coverage_worker.py"
POLL_S = 0.1
TIMED = ("trace", "plan", "densify")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Of one process."""

    wall_s: float
    memory_gb: float


def main() -> None:
    """Measure what is missing, then write the page."""
    args = _arguments()
    try:
        names = coverage_models.select(args.models)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if not args.no_peer and find_spec("torch_pruning") is None:
        sys.exit("error: torch-pruning is not installed\nhint: pip install -e '.[bench]', or give --no-peer")
    out = args.out or HERE / "results" / f"coverage_{_title(args)}"
    csv_path = out.with_name(out.name + ".csv")
    csv_path.parent.mkdir(parents=True, exist_ok=True)
    rows = read_rows(csv_path)
    tools = [OURS] if args.no_peer else [OURS, PEER]
    jobs = [(n, t) for n in names for t in tools if _is_wanted(rows.get((n, t)), args.again)]
    lock = threading.Lock()

    def run(job: tuple[str, str]) -> None:
        row = measure(*job, Limits(wall_s=args.limit_s, memory_gb=args.limit_gb), norms=args.norms)
        with lock:
            rows[job] = row
            write_rows(csv_path, rows)
            print(_line(row), flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for _ in pool.map(run, [] if args.page else jobs):
            pass
    out.with_name(out.name + ".md").write_text(page(rows, _environment(args, rows)), encoding="utf-8")
    print(f"{csv_path} and {out.name}.md: {len(rows)} rows")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Coverage benchmark: which networks, how exactly, how fast.",
        epilog="models: torchvision, segmentation, video, timm, family:GLOB, or single names",
    )
    parser.add_argument("models", nargs="+", help="families or names")
    parser.add_argument("--out", type=Path, help="path without suffix; default results/coverage_FAMILY")
    parser.add_argument("--limit-s", type=float, default=300, help="wall seconds of one process")
    parser.add_argument("--limit-gb", type=float, default=16, help="memory of one process")
    parser.add_argument(
        "--norms", choices=("keep", "rescale"), default="keep", help="what autoprune does behind layer norms"
    )
    parser.add_argument("--no-peer", action="store_true", help="without Torch-Pruning")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time; 1 for times worth quoting")
    parser.add_argument(
        "--again", nargs="?", const="all", choices=("all", "failed"), help="measure what is there already"
    )
    parser.add_argument("--page", action="store_true", help="measure nothing, write the page")
    return parser.parse_args()


def _title(args: argparse.Namespace) -> str:
    """The default page's name: of what was asked for, or what is special about it."""
    families = dict.fromkeys(spec.partition(":")[0].replace("/", "_") for spec in args.models)
    named = "_".join(f for f in families if f in coverage_models.FAMILIES) or next(iter(families))
    return "rescaled" if args.norms == "rescale" else named


def _is_wanted(row: Row | None, again: str | None) -> bool:
    return row is None or again == "all" or (again == "failed" and not row.is_done)


def measure(name: str, tool: str, limits: Limits, *, norms: str = "keep") -> Row:
    """One network under one tool, in a process that is ended at its limits."""
    with tempfile.TemporaryDirectory() as folder:
        out, errors = Path(folder) / "findings", Path(folder) / "stderr"
        out.touch()
        began = time.time()
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, str(WORKER), tool, name, str(out), norms],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env={"OMP_NUM_THREADS": "1", "TIMM_FUSED_ATTN": "0" if tool == PEER else "1", **os.environ},
                start_new_session=True,
            )
            ended, cpu_s, peak = _watch(process, limits)
        findings: dict[str, Any] = {}
        for line in out.read_text("utf-8").splitlines():
            findings.update(json.loads(line))
        if process.returncode and not ended:
            last = errors.read_text("utf-8", "replace").strip().splitlines()
            findings |= {
                "outcome": "crash",
                "detail": f"exit {process.returncode}: {last[-1] if last else ''}"[:300],
            }
    if ended:
        findings |= {"outcome": ended, "detail": f"in the phase {findings.get('phase', 'start')}"}
    _add_up(findings, cpu_s if ended else None)
    known = {k: v for k, v in findings.items() if k in Row.__dataclass_fields__}
    return Row(
        model=name,
        tool=tool,
        process_s=time.time() - began,
        process_peak_mb=peak / 1e6,
        commit=commit(),
        date=date.today().isoformat(),
        **known,
    )


def _watch(process: subprocess.Popen[bytes], limits: Limits) -> tuple[str, float, int]:
    """Wait; ('timeout' or 'memory' if ended, CPU seconds as last seen, largest resident bytes)."""
    end = time.monotonic() + limits.wall_s
    cpu_s, peak = 0.0, 0
    while True:
        try:
            process.wait(POLL_S)
            return "", cpu_s, peak
        except subprocess.TimeoutExpired:
            cpu_s, resident = _usage(process.pid, cpu_s)
            peak = max(peak, resident)
        ended = "timeout" if time.monotonic() > end else "memory" if resident > limits.memory_gb * 1e9 else ""
        if ended:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return ended, cpu_s, peak


def _usage(pid: int, cpu_s: float) -> tuple[float, int]:
    """CPU seconds and resident bytes of a process (Linux; elsewhere the memory limit does not act)."""
    try:
        values = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    except OSError:
        return cpu_s, 0
    ticks = int(values[11]) + int(values[12])
    return ticks / os.sysconf("SC_CLK_TCK"), int(values[21]) * os.sysconf("SC_PAGE_SIZE")


def _add_up(findings: dict[str, Any], cpu_at_end: float | None) -> None:
    """Seconds spent in the timed phases; one that was cut short counts up to its end."""
    wall = [findings[f"{p}_s"] for p in TIMED if f"{p}_s" in findings]
    cpu = [findings[f"{p}_cpu_s"] for p in TIMED if f"{p}_cpu_s" in findings]
    if cpu_at_end is not None and findings.get("phase") in TIMED and f"{findings['phase']}_s" not in findings:
        wall.append(time.time() - findings["phase_began"])
        cpu.append(max(0.0, cpu_at_end - findings["phase_began_cpu"]))
    if wall:
        findings |= {"spent_s": sum(wall), "spent_cpu_s": sum(cpu)}


def _line(row: Row) -> str:
    numbers = [
        f"{row.groups} groups" if row.groups is not None else "",
        f"reach {row.reach:.1%}" if row.reach is not None else "",
        f"apart {row.difference:.0e}" if row.difference is not None else "",
        f"{row.spent_cpu_s:.2f} CPU s" if row.spent_cpu_s is not None else "",
        f"{row.process_s:.0f} s in all",
    ]
    told = " ".join(t for t in (", ".join(n for n in numbers if n), row.detail, row.note) if t)
    return f"{row.tool:14} {row.model:45} {row.outcome:11} {told}"


def _environment(args: argparse.Namespace, rows: Rows) -> list[str]:
    options = ["--no-peer"] if args.no_peer else []
    options += ["--norms", args.norms] if args.norms != "keep" else []
    command = " ".join(["python benchmarks/bench_coverage.py", *args.models, *options])
    commits = ", ".join(sorted({r.commit for r in rows.values()}))
    return [
        f"hardware: {processor()}, {os.cpu_count()} cores, {memory_gb():.0f} GB; "
        f"{os.environ.get('OMP_NUM_THREADS', '1')} thread, {args.jobs} process at a time",
        f"versions: {versions('torch', 'torchvision', 'timm', 'torch-pruning')}",
        f"autoprune at {commits}; limits {args.limit_s:.0f} s wall and {args.limit_gb:.0f} GB a process",
        f"command: `{command}`, {date.today().isoformat()}, weights and units removed from seed 0",
    ]


if __name__ == "__main__":
    main()
