"""Top-1 at equal multiply-adds for equal training samples: autoprune beside four other ways to get there.

    AUTOPRUNE_DATA=DIR python benchmarks/bench_quality.py --cells resnet8:0.5 resnet8:0.3 --epochs 12
    AUTOPRUNE_DATA=DIR python benchmarks/bench_quality.py --cells resnet20:0.5 --epochs 10 --seeds 0 1

A cell is a network with its data and a target. Every way gets the same network, the same cut of the data
and the same number of training samples, those of its search included; it may look at the search split as it
likes. The test split is read once, at the end. Rows go to a CSV as they come, and a row that is there is
not made again, so that hours of it can be run in pieces. `quality_rivals.py` holds the other ways.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import mean

import optuna
import torch
from machine import commit, headline
from oneshot_models import load
from quality_rivals import RIVALS, Made, Task
from rows import append_row, read_rows

from autoprune import events as ev
from autoprune.config import Budget, Finetune, Protection, Search, Study
from autoprune.pipeline.run import run
from autoprune.training.evaluation import evaluate

HERE = Path(__file__).resolve().parent
OURS: dict[str, tuple[float, Search]] = {  # the share of the epochs, and how they are searched
    "autoprune": (1.0, Search()),
    "autoprune, half": (0.5, Search()),
    "autoprune, one trial": (1.0, Search(trials=1)),  # a round: what is left of it without its search
}
FIELDS = (
    "cell",
    "epochs",
    "method",
    "seed",
    "macs_share",
    "search_top1",
    "test_top1",
    "used_epochs",
    "seconds",
    "commit",
)
WEIGHT_DECAY = {"resnet20": 1e-4}
NEAR = 1.05  # times the target's share of the multiply-adds: Torch-Pruning's steps are coarse
MAX_DROP = 10.0  # percentage points: everyone shall get to the target


def main() -> None:
    """Make the rows that are missing, then the page."""
    args = _arguments()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(args.threads)
    path = Path(args.out)
    done = {_key(row) for row in read_rows(path)}
    for seed in args.seeds:
        for cell in args.cells:
            for method in args.methods:
                key = (cell, f"{args.epochs:g}", method, str(seed))
                if key not in done:
                    append_row(path, _row(cell, method, seed, args), FIELDS)
    path.with_suffix(".md").write_text(_page(read_rows(path)), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cells", nargs="+", default=["resnet8:0.5", "resnet8:0.3"], help="NETWORK:SHARE")
    parser.add_argument("--epochs", type=float, default=12.0, help="of the train split, for each way")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=[*RIVALS, *OURS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "autoprune-bench")
    parser.add_argument("--out", default=str(HERE / "results" / "quality.csv"))
    return parser.parse_args()


def _row(cell: str, method: str, seed: int, args: argparse.Namespace) -> dict[str, str]:
    name, _, share = cell.partition(":")
    part, search_settings = OURS.get(method, (1.0, Search()))
    case = load(name, Path(os.environ["AUTOPRUNE_DATA"]), args.cache)
    task = Task(
        model=case.model, data=case.data, share=float(share), seed=seed, max_drop=MAX_DROP,
        weight_decay=WEIGHT_DECAY.get(name, 5e-4), epochs=part * args.epochs,
    )  # fmt: skip
    began = time.perf_counter()
    torch.manual_seed(seed)
    if method in RIVALS:
        made = RIVALS[method](task)
        search, test = (evaluate(made.model, s).top1 for s in (task.data.search, task.data.test))
    else:
        made, search, test = _ours(task, search_settings)
    row = {
        "cell": cell, "epochs": f"{args.epochs:g}", "method": method, "seed": str(seed),
        "macs_share": f"{made.share:.4f}", "search_top1": f"{search:.4f}", "test_top1": f"{test:.4f}",
        "used_epochs": f"{made.epochs:.2f}", "seconds": f"{time.perf_counter() - began:.0f}",
        "commit": commit(),
    }  # fmt: skip
    print(row, flush=True)
    return row


def _ours(task: Task, search: Search) -> tuple[Made, float, float]:
    study = Study(
        name="quality", model=task.model, data=task.data, target=f"macs={task.share}", max_drop=task.max_drop,
        budget=f"epochs={task.epochs}", seed=task.seed, device="cpu", round_to=1,
        finetune=Finetune(weight_decay=task.weight_decay), search=search,
    )  # fmt: skip
    assert Budget.parse(study.budget).epochs == task.epochs
    used = 0.0

    def listen(event: ev.Event) -> None:
        nonlocal used
        if isinstance(event, ev.BudgetUsed):
            used = event.epochs
        if isinstance(event, ev.RoundDecided | ev.TrialFinished | ev.Note):
            print("   ", _short(event), flush=True)

    with tempfile.TemporaryDirectory() as folder:
        result = run(study, out=Path(folder) / "run", protection=Protection(plain=True), on_event=listen)
    share = result.after.macs / result.before.macs
    made = Made(model=task.model, share=share, epochs=used)
    return made, result.after.search_top1, result.after.top1


def _short(event: ev.RoundDecided | ev.TrialFinished | ev.Note) -> str:
    if isinstance(event, ev.TrialFinished):
        t = event.record
        rungs = [f"{r.top1:.4f}@{r.epochs:.1f}" for r in t.rungs]
        return f"trial {t.params} untuned {t.before_tuning} rungs {rungs}"
    return event.reason if isinstance(event, ev.RoundDecided) else event.message


def _key(row: dict[str, str]) -> tuple[str, str, str, str]:
    return row["cell"], row["epochs"], row["method"], row["seed"]


def _page(rows: list[dict[str, str]]) -> str:
    """The means of all ways in all cells, and below them every row."""
    cells = sorted({(r["cell"], r["epochs"]) for r in rows}, reverse=True)
    ways = [m for m in (*OURS, *RIVALS) if any(r["method"] == m for r in rows)]
    lines = [
        "# Top-1 at equal multiply-adds, for equal training samples", "",
        headline("torch", "torch-pruning", "optuna"),
        "Made by `python benchmarks/bench_quality.py`, which its head explains; rows in the CSV beside it.",
        "What to make of it: [log.md](../../docs/log.md). Test top-1 in percent, means over seeds; the test",
        "split is read once a row. Where a way did not get to the target, what it left is told.", "",
        f"| way | {' | '.join(f'{cell}, {epochs} epochs' for cell, epochs in cells)} |",
        f"|---|{'---:|' * len(cells)}",
    ]  # fmt: skip
    for way in ways:
        lines.append(f"| {way} | {' | '.join(_cell(rows, cell, way) for cell in cells)} |")
    lines += [
        "", "| cell | epochs | way | seed | MACs left | search top-1 | test top-1 | minutes | commit |",
        "|---|---:|---|---:|---:|---:|---:|---:|---|",
    ]  # fmt: skip
    for cell in cells:
        for way in ways:
            lines += [
                f"| {r['cell']} | {r['epochs']} | {way} | {r['seed']} | {_percent(r, 'macs_share')} % "
                f"| {_percent(r, 'search_top1')} | {_percent(r, 'test_top1')} "
                f"| {float(r['seconds']) / 60:.1f} | {r['commit']} |"
                for r in sorted(_of(rows, cell, way), key=lambda r: int(r["seed"]))
            ]
    return "\n".join(lines) + "\n"


def _of(rows: list[dict[str, str]], cell: tuple[str, str], way: str) -> list[dict[str, str]]:
    return [r for r in rows if (r["cell"], r["epochs"], r["method"]) == (*cell, way)]


def _cell(rows: list[dict[str, str]], cell: tuple[str, str], way: str) -> str:
    found = _of(rows, cell, way)
    if not found:
        return ""
    left, wanted = mean(float(r["macs_share"]) for r in found), float(cell[0].partition(":")[2])
    seeds = "" if len(found) > 1 else ", one seed"
    off = "" if left <= NEAR * wanted else f" at {100 * left:.0f} %"
    return f"{100 * mean(float(r['test_top1']) for r in found):.2f}{off}{seeds}"


def _percent(row: dict[str, str], field: str) -> str:
    return f"{100 * float(row[field]):.2f}"


if __name__ == "__main__":
    main()
