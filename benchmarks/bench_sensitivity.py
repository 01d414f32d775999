"""How much cheaper is `sensitivity` than the plain loop, and does it say the same?

The plain loop is what tools do: each group masked at nine ratios, the whole network evaluated on the whole
search split for each, 9 x groups + 1 evaluations. All of them cost the same, so some are timed, before and
after the run of the other side, and the sum is reported. The loop gets the batch size that suits it best;
its time with the product's own (512) is reported beside it. Both sides run in one process on one thread;
CPU seconds are compared, since other work on the machine does not count in them. Curves are compared at the
points that both measured.

    AUTOPRUNE_DATA=DIR python benchmarks/bench_sensitivity.py            # a quarter of an hour on one core

Results: results/sensitivity_*.md
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from machine import dated_page, headline
from torch import nn

from autoprune.data.sources import load_data
from autoprune.data.splits import IMAGENET, Split
from autoprune.metrics import Evaluation
from autoprune.plan import PruningPlan
from autoprune.pruning.criteria import Scores, score
from autoprune.pruning.sensitivity import ANALYSIS, SensitivityTable, sensitivity
from autoprune.structure.densify import masked
from autoprune.structure.graph import ChannelGraph
from autoprune.structure.tracing import trace
from autoprune.training.evaluation import evaluate

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "studies"))
from models import resnet20, resnet56  # noqa: E402 - a study's file, not a package

NETWORKS = {"resnet20": (resnet20, "resnet20-12fca82f.th"), "resnet56": (resnet56, "resnet56-4bfd9763.th")}
CASES = (("resnet20", 1.0), ("resnet20", 0.5), ("resnet20", 0.25), ("resnet56", 0.25))
BATCHES = (64, 128, 512)  # that the plain loop is tried with


@dataclass
class Clock:
    """CPU and wall seconds."""

    cpu_s: float = 0.0
    wall_s: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens inside."""
        cpu, wall = time.process_time(), time.perf_counter()
        yield
        self.cpu_s += time.process_time() - cpu
        self.wall_s += time.perf_counter() - wall


@dataclass(frozen=True, kw_only=True)
class Row:
    """One network on one amount of data."""

    network: str
    num_groups: int
    num_samples: int
    num_points: int
    batch: int
    slower: float
    plain: Clock
    ours: Clock
    recalibrated: Clock
    apart_pp: float
    num_compared: int

    def line(self) -> str:
        """One row of the page."""
        plain, ours, again = self.plain, self.ours, self.recalibrated
        cells = (
            self.network, self.num_groups, f"{self.num_samples:,}", 9 * self.num_groups, self.num_points,
            f"{plain.cpu_s:.0f} (batch {self.batch})", f"{ours.cpu_s:.1f}",
            f"**{plain.cpu_s / ours.cpu_s:.1f}x**", f"{plain.wall_s / ours.wall_s:.1f}x",
            f"{self.slower * plain.cpu_s / ours.cpu_s:.1f}x", f"{plain.cpu_s / again.cpu_s:.1f}x",
            f"{self.apart_pp:.2f} pp ({self.num_compared})",
        )  # fmt: skip
        return f"| {' | '.join(str(c) for c in cells)} |"


COLUMNS = (
    "network", "groups", "samples", "plain evaluations", "points", "plain loop, CPU s", "autoprune, CPU s",
    "ratio, CPU", "ratio, wall", "ratio at batch 512", "ratio, ours recalibrated",
    "largest difference (points)",
)  # fmt: skip


def main() -> None:
    """Measure every case, print and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=[f"{n}:{s:g}" for n, s in CASES])
    parser.add_argument("--plain", type=int, default=12, help="evaluations of the plain loop that are timed")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(os.environ["AUTOPRUNE_DATA"])
    data = load_data(f"cifar10:{folder / 'cifar10'}", search_from="test", normalization=IMAGENET)
    rows = []
    for case in [c for c in args.cases for _ in range(args.repeats)]:
        name, share = case.split(":")
        build, weights = NETWORKS[name]
        split = data.search.take(np.arange(round(float(share) * len(data.search))))
        rows.append(measure(name, build(folder / "weights" / weights), split, data.train, args.plain))
        print(rows[-1].line(), flush=True)
    write(args.out, rows, " ".join(args.cases))


def measure(name: str, model: nn.Module, split: Split, train: Split, num_plain: int) -> Row:
    """Both sides of one case, the plain loop's evaluations before and after the other's."""
    graph = trace(model, torch.zeros(1, 3, 32, 32))
    scores, (batch, slower) = score(model, graph, "l2"), best_batch(model, split)
    probes = [(g.name, r) for g in graph.groups for r in ANALYSIS.ratios]
    picked = [probes[i] for i in np.linspace(0, len(probes) - 1, num_plain).round().astype(int)]
    clock, ours, again = Clock(), Clock(), Clock()
    with ours.running():
        table = sensitivity(model, graph, split)
    measured = list(table.points)
    compared = [(p.group, p.ratio) for p in measured[:: max(1, len(measured) // num_plain)]]
    for group, ratio in picked[: num_plain // 2]:
        plain(model, graph, scores, split, batch, clock, group, ratio)
    found = {key: plain(model, graph, scores, split, batch, clock, *key) for key in compared}
    with again.running():
        sensitivity(model, graph, split, calibration=train)
    for group, ratio in picked[num_plain // 2 :]:
        plain(model, graph, scores, split, batch, clock, group, ratio)
    per_evaluation = (9 * len(graph.groups) + 1) / (num_plain + len(compared))
    return Row(
        network=name, num_groups=len(graph.groups), num_samples=len(split), num_points=len(measured),
        batch=batch, slower=slower, ours=ours, recalibrated=again,
        plain=Clock(clock.cpu_s * per_evaluation, clock.wall_s * per_evaluation),
        apart_pp=largest(table, found), num_compared=len(found),
    )  # fmt: skip


def plain(  # noqa: PLR0913 - everything that one evaluation needs
    model: nn.Module, graph: ChannelGraph, scores: Scores, split: Split, batch: int, clock: Clock,
    group: str, ratio: float,
) -> Evaluation:  # fmt: skip
    """One evaluation of the plain loop."""
    width = graph.group(group).num_units
    removed = min(width - 1, max(1, round(ratio * width)))
    keep = np.sort(np.argsort(scores[group], kind="stable")[removed:])
    with clock.running():
        pruned = masked(model, graph, PruningPlan(keep={group: keep}, num_units={group: width}))
        return evaluate(pruned, split, batch_size=batch)


def best_batch(model: nn.Module, split: Split) -> tuple[int, float]:
    """The batch size at which the plain loop is fastest here, and how much slower the largest is."""
    part, clocks = split.take(np.arange(512)), {b: Clock() for b in BATCHES}
    for _ in range(4):
        for batch, clock in clocks.items():
            with clock.running():
                evaluate(model, part, batch_size=batch)
    best = min(clocks, key=lambda b: clocks[b].cpu_s)
    return best, clocks[BATCHES[-1]].cpu_s / clocks[best].cpu_s


def largest(table: SensitivityTable, found: dict[tuple[str, float], Evaluation]) -> float:
    """Largest difference of top-1 at the points that both measured, in percentage points."""
    top1 = {(p.group, p.ratio): p.top1 for p in table.points}
    return max(100 * abs(top1[key] - e.top1) for key, e in found.items())


def write(folder: Path, rows: list[Row], cases: str) -> None:
    """The page in results/."""
    text = (
        f"# Sensitivity against the plain loop\n\n{headline('torch')}\n\n"
        "Other work may have run on the machine, so CPU seconds are compared. "
        "Command: "
        f"`python benchmarks/bench_sensitivity.py --cases {cases}`; its first lines say what columns mean. "
        '"Ours recalibrated": with batch-norm recalibration before every point, as a run does it, still '
        "against the plain loop without.\n\n"
    )
    lines = [f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|", *(r.line() for r in rows)]
    dated_page(folder, "sensitivity").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
