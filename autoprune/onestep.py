"""How far a network can be pruned in one step, without fine-tuning: measured, not predicted.

For falling shares of its multiply-adds the network is pruned as a trial would prune it, its batch-norm
statistics are estimated anew, and it is evaluated. What the numbers mean is in `outlook`.
"""

from __future__ import annotations

import torch
from torch import nn

from autoprune.allocation import allocate
from autoprune.criteria import score as score_units
from autoprune.densify import densify
from autoprune.errors import UnreachableError
from autoprune.evaluation import Loss, Score, evaluate, recalibrate_
from autoprune.graph import ChannelGraph
from autoprune.outlook import Prospect, region
from autoprune.sensitivity import SensitivityTable
from autoprune.splits import Split

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2)
RECALIBRATE_BATCHES = 10


def prospects(  # noqa: PLR0913 - where and on what to measure are the caller's to say
    model: nn.Module, graph: ChannelGraph, split: Split, table: SensitivityTable, *,
    calibration: Split, num_classes: int, criterion: str = "l2", device: torch.device | str = "cpu",
    loss: Loss | None = None, score: Score | None = None,
) -> tuple[Prospect, ...]:  # fmt: skip
    """Prune to ever smaller shares of the multiply-adds and measure, until it is hopeless."""
    scores = score_units(model, graph, criterion, split=calibration, device=device, loss=loss)
    whole, found = graph.cost().macs, list[Prospect]()
    for share in SHARES:
        try:
            plan = allocate(graph, scores, metric="macs", limit=share * whole, table=table)
        except UnreachableError:
            continue
        pruned = densify(model, graph, plan)
        recalibrate_(pruned, calibration, num_batches=RECALIBRATE_BATCHES, device=device)
        after = evaluate(pruned, split, device=device, loss=loss, score=score)
        found.append(
            Prospect(
                macs_share=graph.cost(plan).macs / whole, top1=after.top1, low=after.interval.low,
                high=after.interval.high, region=region(after.top1, table.baseline.top1, num_classes),
            )
        )  # fmt: skip
        if found[-1].region == "hopeless":
            break
    return tuple(found)
