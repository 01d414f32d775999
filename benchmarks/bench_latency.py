"""The latency that is predicted for randomly pruned networks, against the measured one.

    OMP_NUM_THREADS=2 python benchmarks/bench_latency.py         # results to benchmarks/results/
    python benchmarks/bench_latency.py resnet20 --plans 3 --cpu-time --out /tmp/few

Each plan keeps a random allowed count, from a fifth of its units up, in every group. A share is the part of
the original's latency that is left. "Measured" is the share of the least times of runs in turns with the
original, and its spread is how far their lower quartiles lie above that (`measure_latency_share`). The
error is predicted over measured, less one; the error of a prediction by multiply-adds stands beside it.
`--cpu-time` takes the thread's CPU seconds for the wall clock's, on one thread, for machines that do other
work meanwhile.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import headline
from torch import nn
from torchvision import models

from autoprune.plan import PruningPlan
from autoprune.structure import timings
from autoprune.structure.densify import densify
from autoprune.structure.graph import ChannelGraph
from autoprune.structure.latency import measure_latency_share, with_latency_model
from autoprune.structure.timings import Timings
from autoprune.structure.tracing import trace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "studies"))
from models import resnet20

NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "resnet20": (resnet20, 32),
    "resnet18": (models.resnet18, 224),
    "mobilenet_v2": (models.mobilenet_v2, 224),
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One plan of one network."""

    network: str
    round_to: int
    macs: float
    predicted: float
    measured: float
    spread: float

    @property
    def error(self) -> float:
        """Of the predicted share, relative to the measured one."""
        return self.predicted / self.measured - 1


def random_plan(graph: ChannelGraph, rng: np.random.Generator) -> PruningPlan:
    """Any allowed count in every group, from a fifth of its units up."""
    keep = {}
    for group in graph.groups:
        counts = group.allowed_counts[group.allowed_counts >= 0.2 * group.num_units]
        kept = rng.permutation(group.num_units)[: int(rng.choice(counts))]
        keep[group.name] = np.sort(kept).astype(np.int64)
    return PruningPlan(keep=keep, num_units={g.name: g.num_units for g in graph.groups})


def rows(name: str, round_to: int, num_plans: int, device: torch.device) -> list[Row]:
    """Predict and measure some plans of one network."""
    build, size = NETWORKS[name]
    torch.manual_seed(0)
    model, x = build().eval(), (torch.randn(1, 3, size, size),)
    graph = trace(model, x, round_to=round_to)
    graph = with_latency_model(graph, model, x, device, timings=Timings(path=None))
    full, rng, found = graph.cost(), np.random.default_rng(0), []
    for _ in range(num_plans):
        plan = random_plan(graph, rng)
        cost = graph.cost(plan)
        share, spread = measure_latency_share(model, densify(model, graph, plan), x, device)
        found.append(
            Row(network=name, round_to=round_to, macs=cost.macs / full.macs, measured=share, spread=spread,
                predicted=cost.of("latency") / full.of("latency"))
        )  # fmt: skip
        print(f"{name} round_to={round_to}: predicted {found[-1].predicted:.3f}, measured {share:.3f}")
    return found


def page(found: list[Row], command: str, device: torch.device) -> str:
    """The tables, with what the numbers depend on in the first lines."""
    kinds = dict.fromkeys((r.network, r.round_to) for r in found)
    return "\n".join(
        [
            "# Latency: predicted against measured" + (", CPU seconds" if "--cpu-time" in command else ""),
            "",
            headline("torch", device=str(device)),
            "",
            f"    {command}",
            "",
            "| network | round_to | plans | error, median | largest | of MACs as prediction | spread |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(summary([r for r in found if (r.network, r.round_to) == kind]) for kind in kinds),
            "",
            "| network | round_to | MACs left | predicted | measured | spread | error |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(line(r) for r in found),
            "",
        ]
    )


def summary(rows: list[Row]) -> str:
    """The plans of one network in one line; medians of absolute values."""
    errors, by_macs = [abs(r.error) for r in rows], [abs(r.macs / r.measured - 1) for r in rows]
    spread = np.median([r.spread / r.measured for r in rows])
    numbers = (np.median(errors), max(errors), np.median(by_macs), spread)
    told = " | ".join(f"{100 * n:.1f} %" for n in numbers)
    return f"| {rows[0].network} | {rows[0].round_to} | {len(rows)} | {told} |"


def line(row: Row) -> str:
    """One plan."""
    shares = " | ".join(f"{n:.3f}" for n in (row.macs, row.predicted, row.measured, row.spread))
    return f"| {row.network} | {row.round_to} | {shares} | {100 * row.error:+.1f} % |"


def cpu_seconds(call: Callable[[], object], _device: torch.device, repeats: int) -> float:
    """In place of `timings._seconds`: what the thread itself used."""
    began = time.thread_time()
    for _ in range(repeats):
        call()
    return (time.thread_time() - began) / repeats


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("networks", nargs="*", help=f"of {', '.join(NETWORKS)}; all if none is named")
    parser.add_argument("--plans", type=int, default=8)
    parser.add_argument("--round-to", type=int, nargs="*", default=[8, 1])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--cpu-time", action="store_true")
    asked = parser.parse_args()
    if asked.cpu_time:
        torch.set_num_threads(1)
        timings._seconds = cpu_seconds
    device = torch.device(asked.device)
    names = asked.networks or list(NETWORKS)
    found = [r for n in names for k in asked.round_to for r in rows(n, k, asked.plans, device)]
    threads = os.environ.get("OMP_NUM_THREADS")
    command = f"OMP_NUM_THREADS={threads} " if threads else ""
    command += shlex.join(["python", "benchmarks/bench_latency.py", *sys.argv[1:]])
    asked.out.mkdir(parents=True, exist_ok=True)
    text = page(found, command, device)
    name = "latency_cpu_time.md" if asked.cpu_time else "latency.md"
    (asked.out / name).write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
