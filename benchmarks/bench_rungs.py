"""Does the end of the first rung tell how a trial ends? Rank correlation, from the trials of finished runs.

    python benchmarks/bench_rungs.py runs/*

A trial climbs complete schedules (docs/search.md); those that left the ladder on the first rung have no later
score and are counted, not correlated. Trials are compared within their round, where network and floor are the
same: the correlation is Spearman's, of scores with their round's mean taken off, over all rounds of a run.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from statistics import mean

from scipy.stats import spearmanr

from autoprune.record import RoundRecord
from autoprune.search.history import read_run
from autoprune.storage.run_store import RunStore, quiet_optuna, run_name_at

FEW = 4  # pairs; fewer say nothing


def main() -> None:
    """One line a run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    print("| run | trials | climbed on | gain on the second rung, pp (least to most) | rank correlation |")
    print("|---|---:|---:|---:|---:|")
    for folder in parser.parse_args().runs:
        print(_line(folder))


def _line(folder: Path) -> str:
    with quiet_optuna(), closing(RunStore(folder, run_name_at(folder))) as store:
        rounds = read_run(store).rounds
    trials = [t for r in rounds for t in r.trials if t.rungs]
    pairs = [pair for r in rounds for pair in _pairs(r)]
    gains = sorted(100 * (t.rungs[1].top1 - t.rungs[0].top1) for t in trials if len(t.rungs) > 1)
    told = f"{gains[0]:+.2f} to {gains[-1]:+.2f}" if gains else "none"
    rho = f"{spearmanr(*zip(*pairs, strict=True)).statistic:.2f}" if len(pairs) >= FEW else "too few"
    return f"| {folder.name} | {len(trials)} | {len(gains)} | {told} | {rho} |"


def _pairs(one: RoundRecord) -> list[tuple[float, float]]:
    """(first rung, second rung) of the round's trials, each without the round's mean."""
    both = [(t.rungs[0].top1, t.rungs[1].top1) for t in one.trials if len(t.rungs) > 1]
    if len(both) < 2:
        return []
    first, second = (mean(pair[i] for pair in both) for i in (0, 1))
    return [(a - first, b - second) for a, b in both]


if __name__ == "__main__":
    main()
