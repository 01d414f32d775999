"""The controller's settings: how deep does a run come inside its floor, for the same epochs?

    AUTOPRUNE_DATA=DIR python benchmarks/bench_controller.py
    AUTOPRUNE_DATA=DIR python benchmarks/bench_controller.py --pairs digits vgg --settings default first=0.35

The target is out of reach on purpose (8 % of the multiply-adds, at most one point of top-1), so that the
floor and the budget stop every run. The result is the share of the multiply-adds left; less is better. One
setting is changed at a time. Every run is whole, from analysis to the delivered file, on a tenth of
Fashion-MNIST's training images (`digits`: all of them). Rows go to a CSV and are not made twice.
"""

from __future__ import annotations

import argparse
import math
import os
import tempfile
import time
from pathlib import Path
from statistics import mean

import optuna
import torch
from machine import headline
from oneshot_models import load
from rows import append_row, read_rows

from autoprune.config import Control, Finetune, Protection, Study
from autoprune.pipeline.run import run

HERE = Path(__file__).resolve().parent
TARGET, MAX_DROP = "macs=0.08", 1.0
PAIRS = {"digits": (1.0, 60.0), "resnet8": (0.1, 30.0), "vgg": (0.1, 30.0)}  # share of the images, epochs
SETTINGS = {
    "default": {},
    "first=0.35": {"first_ceiling": 0.35},
    "first=0.5": {"first_ceiling": 0.5},
    "raise=1": {"raise_factor": 1.0},
    "raise=2": {"raise_factor": 2.0},
    "lower=0.3": {"lower_factor": 0.3},
    "lower=0.7": {"lower_factor": 0.7},
}
FIELDS = ("pair", "setting", "seed", "macs_share", "search_top1", "test_top1", "rounds", "trials", "seconds")


def main() -> None:
    """Make the rows that are missing, then the page."""
    args = _arguments()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    path = Path(args.out)
    done = {_key(row) for row in read_rows(path)}
    for seed in args.seeds:
        for pair in args.pairs:
            for setting in args.settings:
                if (pair, setting, str(seed)) not in done:
                    append_row(path, _row(pair, setting, seed, args.cache), FIELDS)
    path.with_suffix(".md").write_text(_page(read_rows(path)), encoding="utf-8")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), choices=list(PAIRS))
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "autoprune-bench")
    parser.add_argument("--out", default=str(HERE / "results" / "controller.csv"))
    return parser.parse_args()


def _row(pair: str, setting: str, seed: int, cache: Path) -> dict[str, str]:
    case, (share, epochs) = load(pair, Path(os.environ["AUTOPRUNE_DATA"]), cache), PAIRS[pair]
    study = Study(
        name="controller", model=case.model, data=case.data, target=TARGET, max_drop=MAX_DROP, seed=seed,
        budget=f"epochs={epochs}", device="cpu", round_to=1, finetune=Finetune(share=share),
        control=Control(**SETTINGS[setting]),
    )  # fmt: skip
    began = time.perf_counter()
    torch.manual_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        result = run(study, out=Path(folder) / "run", protection=Protection(plain=True))
    rounds = result.record.rounds
    row = {
        "pair": pair, "setting": setting, "seed": str(seed),
        "macs_share": f"{result.after.macs / result.before.macs:.4f}",
        "search_top1": f"{result.after.search_top1:.4f}", "test_top1": f"{result.after.top1:.4f}",
        "rounds": str(len(rounds)), "trials": str(sum(len(r.trials) for r in rounds)),
        "seconds": f"{time.perf_counter() - began:.0f}",
    }  # fmt: skip
    print(row, flush=True)
    return row


def _key(row: dict[str, str]) -> tuple[str, str, str]:
    return row["pair"], row["setting"], row["seed"]


def _page(rows: list[dict[str, str]]) -> str:
    """A row a setting: what is left for each pair, and the geometric mean beside the default's."""
    pairs = list(dict.fromkeys(r["pair"] for r in rows))
    lines = [
        "# The controller's settings", "", headline("torch", "optuna"),
        "Made by `python benchmarks/bench_controller.py`; its head says more.",
        f"Target {TARGET}, which no run reaches, max_drop {MAX_DROP:g} pp. Share of the multiply-adds left",
        "in percent, each run; less is better. *Beside default*: geometric mean over the runs of both.", "",
        "| setting | " + " | ".join(pairs) + " | beside default | rounds, trials |",
        "|---|" + "---:|" * (len(pairs) + 2),
    ]  # fmt: skip
    for setting in dict.fromkeys(r["setting"] for r in rows):
        mine = [r for r in rows if r["setting"] == setting]
        shares = {p: [100 * float(r["macs_share"]) for r in mine if r["pair"] == p] for p in pairs}
        cells = [", ".join(f"{share:.1f}" for share in shares[p]) for p in pairs]
        effort = f"{mean(int(r['rounds']) for r in mine):.1f}, {mean(int(r['trials']) for r in mine):.1f}"
        lines.append(f"| {setting} | " + " | ".join(cells) + f" | {_beside(mine, rows)} | {effort} |")
    return "\n".join(lines) + "\n"


def _beside(mine: list[dict[str, str]], rows: list[dict[str, str]]) -> str:
    default = {(r["pair"], r["seed"]): float(r["macs_share"]) for r in rows if r["setting"] == "default"}
    both = [(float(r["macs_share"]), default.get((r["pair"], r["seed"]))) for r in mine]
    logs = [math.log(share / other) for share, other in both if other is not None]
    return f"{math.exp(mean(logs)):.3f}" if logs else ""


if __name__ == "__main__":
    main()
