"""Which units does autoprune remove, and which Torch-Pruning? Top-1 without any fine-tuning, at equal MACs.

For 30, 50 and 70 % of the multiply-adds removed: autoprune's decision (`screening.IterativeSearch`, its
parts in further rows), and Torch-Pruning's {global, local} x {magnitude L2, L1, Taylor, Hessian}. Both
sides see the same search and training images, and the test half is read only for the numbers of the page.
Every variant of the rival is tried on the screening's samples first, and its best three a cell go on to the
test, where the best of these counts. The rival's networks never cost less than autoprune's. Batch-norm
statistics are estimated anew on the same 20 batches of 128 augmented training images on both sides; the
result is the mean over three such sets.

    AUTOPRUNE_DATA=DIR python benchmarks/bench_oneshot.py [--networks resnet20 vgg mobile resnet8 digits]

DIR holds `cifar10/`, `weights/`, `FashionMNIST/raw/`. The small networks are trained at the first use,
which takes minutes, and kept in --cache. Results: results/oneshot_*.md
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import oneshot_models
import oneshot_rival
import torch
from machine import dated_page, headline
from oneshot_models import Case
from torch import nn

from autoprune.data.splits import Split
from autoprune.errors import UnreachableError
from autoprune.plan import PruningPlan
from autoprune.pruning import screening
from autoprune.pruning.allocation import allocate
from autoprune.pruning.sensitivity import SensitivityTable, sensitivity
from autoprune.pruning.variants import VariantSetup, evaluate_fast
from autoprune.structure.densify import densify
from autoprune.structure.graph import ChannelGraph
from autoprune.structure.tracing import trace
from autoprune.training.evaluation import recalibrate_

HERE = Path(__file__).resolve().parent
SHARES = (0.7, 0.5, 0.3)  # of the multiply-adds that are kept
SEEDS = (0, 1, 2)
BEST = 3  # of the rival's variants that go on to the test
PARTS = (("l1", "sensitivity"), ("jacobian", "sensitivity"), ("l2", "global"))


@dataclass(frozen=True, kw_only=True)
class Row:
    """One way to choose, on one network at one cost."""

    network: str
    share: float
    way: str
    macs_share: float
    top1: tuple[float, ...]
    seconds: float

    @property
    def mean(self) -> float:
        """Over the calibration seeds, in percent."""
        return 100 * float(np.mean(self.top1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A case, traced and analysed once, with the setup and the search that its rows share."""

    case: Case
    graph: ChannelGraph
    bench: VariantSetup
    table: SensitivityTable
    descent: screening.IterativeSearch
    test: Split

    @property
    def macs(self) -> int:
        """Of the whole network."""
        return self.graph.cost().macs


def main() -> None:
    """Measure, print and write the page; what an earlier process measured is taken from the cache."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--networks", nargs="*", default=["resnet20", "vgg"], choices=oneshot_models.NETWORKS)
    parser.add_argument("--cache", type=Path, default=HERE.parent / "runs" / "oneshot")
    parser.add_argument("--samples", type=int, default=5000, help="of the test split, at most")
    parser.add_argument("--shares", nargs="*", type=float, default=SHARES, help="of the MACs that are kept")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    pages = []
    for name in args.networks:
        subject = prepare(name, Path(os.environ["AUTOPRUNE_DATA"]), args.cache, args.samples)
        kept, rows = args.cache / f"rows-{name}.json", list[Row]()
        known = [Row(**r) for r in json.loads(kept.read_text())] if kept.exists() else []
        for share in args.shares:
            rows += [r for r in known if r.share == share] or measured(subject, share)
            kept.write_text(json.dumps([asdict(r) for r in rows]))
        pages.append(page(subject, rows, args.shares))
    write(args.out, pages, " ".join(args.networks))


def prepare(name: str, folder: Path, cache: Path, num_samples: int) -> Subject:
    """Load and analyse a network."""
    case = oneshot_models.load(name, folder, cache)
    graph, data = trace(case.model, case.example), case.data
    kept = cache / f"table-{name}.json"
    if not kept.exists():
        fresh = sensitivity(case.model, graph, data.search, calibration=data.train)
        kept.write_text(fresh.to_json())
    table = SensitivityTable.from_json(kept.read_text())
    bench = screening.make_setup(case.model, graph, data.search, calibration=data.train)
    descent = screening.IterativeSearch(
        bench, lambda m: trace(m, case.example).with_bounds_of(graph), table=table,
        finals=data.search,
    )  # fmt: skip
    test = data.test if len(data.test) <= num_samples else data.test.take(np.arange(num_samples))
    return Subject(case=case, graph=graph, bench=bench, table=table, descent=descent, test=test)


def measured(subject: Subject, share: float) -> list[Row]:
    """Both sides at one cost."""
    rows = [*ours(subject, share)]
    limit = max(r.macs_share for r in rows) * subject.macs
    rows += theirs(subject, share, limit)
    for row in rows:
        print(
            row.network, f"{row.share:.0%}", row.way, f"{row.mean:.2f}", f"{row.macs_share:.4f}", flush=True
        )
    return rows


def ours(subject: Subject, share: float) -> Iterator[Row]:
    """The product's decision, and what it would be without trying and without steps."""
    limit, graph, began = share * subject.macs, subject.graph, time.process_time()
    best = subject.descent.at(limit)
    yield row(subject, share, "autoprune", densified(subject, best.plan), time.process_time() - began)
    for criterion, strategy in PARTS:
        try:
            plan = allocate(
                graph,
                subject.descent.first.rankings[criterion],
                metric="macs",
                limit=limit,
                strategy=strategy,
                table=subject.table,
            )
        except UnreachableError:
            continue
        yield row(subject, share, f"untried, {strategy} {criterion}", densified(subject, plan), 0.0)


def densified(subject: Subject, plan: PruningPlan) -> tuple[nn.Module, float]:
    """The network that a plan leaves, and its multiply-adds."""
    return densify(subject.case.model, subject.graph, plan), float(subject.graph.cost(plan).macs)


def theirs(subject: Subject, share: float, limit: float) -> Iterator[Row]:
    """The rival's best three on the screening samples, measured on the test split."""
    base, train = oneshot_rival.prunable(subject.case.model), subject.case.data.train
    found = []
    for variant in oneshot_rival.variants(subject.case.model):
        began = time.process_time()
        oneshot_rival.fill_gradients_(base, variant, train, seed=0)
        model, macs = oneshot_rival.prune(base, subject.case.example, variant, limit)
        took = time.process_time() - began
        recalibrate_(model, train, num_batches=subject.bench.num_batches, batch_size=128)
        loss = evaluate_fast(subject.bench, model).top1
        found.append((-loss, str(variant), model, macs, took))
        print("  tried", variant, f"{100 * loss:.1f}", f"{macs / subject.macs:.4f}", flush=True)
    for _, name, model, macs, took in sorted(found, key=lambda f: f[:2])[:BEST]:
        yield row(subject, share, f"Torch-Pruning, {name}", (model, macs), took)


def row(subject: Subject, share: float, way: str, made: tuple[nn.Module, float], seconds: float) -> Row:
    """Recalibrate and evaluate on the test, once a seed."""
    (model, macs), top1 = made, []
    bench = screening.make_setup(
        subject.case.model, subject.graph, subject.test, calibration=None, num_samples=len(subject.test)
    )
    for seed in SEEDS:
        recalibrate_(model, subject.case.data.train, num_batches=20, batch_size=128, seed=1000 + seed)
        top1.append(evaluate_fast(bench, model).top1)
    return Row(
        network=subject.case.name, share=share, way=way, macs_share=macs / subject.macs, top1=tuple(top1),
        seconds=seconds,
    )  # fmt: skip


def page(subject: Subject, rows: list[Row], shares: Sequence[float]) -> str:
    """One network's table: a line a way, a column a cost, the rival's best of each cost in one line."""
    intact = evaluate_fast(
        screening.make_setup(
            subject.case.model, subject.graph, subject.test, calibration=None, num_samples=len(subject.test)
        ),
        subject.case.model,
    ).top1
    best = [max((r for r in rows if r.share == s and "Torch" in r.way), key=lambda r: r.mean) for s in shares]
    ways = list(dict.fromkeys(r.way for r in rows if "Torch" not in r.way))
    lines = [f"| {w} | {' | '.join(cell(rows, w, s) for s in shares)} |" for w in ways]
    rival = " | ".join(f"{cell(rows, b.way, b.share)}, {b.way.split(', ')[1]}" for b in best)
    lines.insert(1, f"| **Torch-Pruning's best** | {rival} |")
    lines[0] = lines[0].replace("| autoprune |", "| **autoprune** |")
    heads = " | ".join(f"{s:.0%} of the MACs kept".replace("%", " %") for s in shares)
    took = [f"{r.seconds:.0f}" for r in rows if r.way == "autoprune"]
    return "\n".join([
        f"## {subject.case.title}", "",
        f"Intact {100 * intact:.2f} %; n = {len(subject.test):,} test images, "
        f"{subject.macs / 1e6:.1f} million multiply-adds, {len(subject.graph.groups)} groups. "
        f"autoprune's decision took {', '.join(took)} CPU seconds after an analysis of "
        f"{subject.table.seconds:.0f} s.", "",
        f"| | {heads} |", "|---" * (len(shares) + 1) + "|", *lines, "",
    ])  # fmt: skip


def cell(rows: list[Row], way: str, share: float) -> str:
    """Mean and range over the seeds, and the cost where it is not what was asked for."""
    found = [r for r in rows if r.way == way and r.share == share]
    if not found:
        return "not reachable"
    one = found[0]
    spread = f"{100 * min(one.top1):.1f}-{100 * max(one.top1):.1f}"
    return f"{one.mean:.1f} ({spread}) at {one.macs_share:.3f}"


def write(folder: Path, pages: list[str], networks: str) -> None:
    """The page in results/."""
    head = (
        "# Pruned in one go, without fine-tuning: autoprune and Torch-Pruning at equal MACs\n\n"
        f"{headline('torch', 'torch-pruning')}\n\nTop-1 in percent on "
        "test images that no decision saw, mean and range over three calibration seeds. Command: "
        f"`AUTOPRUNE_DATA=DIR python benchmarks/bench_oneshot.py --networks {networks}`; its first lines say "
        'what is compared. "Untried" rows are single allocations, without screening and without steps.\n\n'
    )
    dated_page(folder, "oneshot").write_text(head + "\n".join(pages), encoding="utf-8")


if __name__ == "__main__":
    main()
