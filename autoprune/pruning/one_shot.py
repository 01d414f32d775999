"""How far a network can be pruned in one step, without fine-tuning: measured, not predicted.

For falling shares of its multiply-adds the network is pruned as a trial would prune it: several criteria make
a plan each, and the one that is best on a part of the samples is measured on all of them, with batch-norm
statistics estimated anew. What the numbers mean is in `outlook`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from autoprune.data import Split
from autoprune.errors import UnreachableError
from autoprune.pruning import screening
from autoprune.pruning.criteria import score as score_units
from autoprune.pruning.prunability import Prospect, region
from autoprune.pruning.sensitivity import SensitivityTable
from autoprune.structure import ChannelGraph, densify
from autoprune.tasks import CLASSIFICATION, Task
from autoprune.training import evaluate, recalibrate_

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
RECALIBRATE_BATCHES = 10


def prospects(  # noqa: PLR0913 - where and on what to measure are the caller's to say
    model: nn.Module, graph: ChannelGraph, split: Split, table: SensitivityTable, *,
    calibration: Split, num_classes: int, criteria: Sequence[str] = screening.CRITERIA,
    device: torch.device | str = "cpu", task: Task = CLASSIFICATION,
) -> tuple[Prospect, ...]:  # fmt: skip
    """Prune to ever smaller shares of the multiply-adds and measure, until it is hopeless."""
    rankings = {
        c: score_units(model, graph, c, split=calibration, device=device, task=task) for c in criteria
    }
    bench = screening.bench(model, graph, split, calibration=calibration, device=device, task=task)
    whole, found = graph.cost().macs, list[Prospect]()
    for share in SHARES:
        try:
            plan = screening.refine(
                bench, rankings, metric="macs", limit=share * whole, table=table, tries=0
            ).plan
        except UnreachableError:
            continue
        pruned = densify(model, graph, plan)
        recalibrate_(pruned, calibration, num_batches=RECALIBRATE_BATCHES, device=device)
        after = evaluate(pruned, split, device=device, task=task)
        found.append(
            Prospect(
                macs_share=graph.cost(plan).macs / whole, top1=after.top1, low=after.interval.low,
                high=after.interval.high, region=region(after.top1, table.baseline.top1, num_classes),
            )
        )  # fmt: skip
        if found[-1].region == "hopeless":
            break
    return tuple(found)
