"""`autoprune groups`, `analyze` and `doctor`: look at a network or the machine before anything is pruned."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from autoprune.cli_run import AsJson, DataSpec, Device, Model, Name, Quiet, Weights, choose_study
from autoprune.config import check_study
from autoprune.events import OnEvent, StageProgress, StageStarted
from autoprune.tables import findings_text, groups_table, sensitivity_text
from autoprune.terminal import listener

if TYPE_CHECKING:
    from autoprune.config import Study
    from autoprune.sensitivity import SensitivityTable


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(rich_help_panel="Look", epilog="Example: autoprune groups digits")(groups)
    app.command(rich_help_panel="Look", epilog="Example: autoprune analyze digits --ratio 0.5")(analyze)
    app.command(rich_help_panel="Look", epilog="Example: autoprune doctor")(doctor)


def doctor(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where runs would be written.")] = Path("runs"),
    as_json: AsJson = False,
) -> int:
    """Say what a run would find on this machine, and what is missing; exits 1 if something is."""
    from autoprune.doctor import examine

    findings = examine(out)
    if as_json:
        sys.stdout.write(json.dumps([asdict(f) for f in findings], indent=1) + "\n")
    else:
        Console(highlight=False).print(findings_text(findings))
    return 0 if all(f.ok for f in findings) else 1


def groups(
    study: Name = None,
    model: Model = None,
    weights: Weights = None,
    data: DataSpec = None,
    as_json: AsJson = False,
) -> None:
    """Show which channels must shrink together, what they cost, and what may not shrink and why."""
    chosen = choose_study(study, model, weights, data)
    from autoprune.preflight import understand

    graph = understand(chosen).graph
    if as_json:
        rows = [
            {"name": g.name, "num_units": g.num_units, "macs": g.macs, "layers": g.layers}
            for g in graph.groups
        ]
        document = {"groups": rows, "frozen": [asdict(f) for f in graph.frozen], "cost": asdict(graph.cost())}
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        Console(highlight=False).print(groups_table(graph))


def analyze(
    study: Name = None,
    model: Model = None,
    weights: Weights = None,
    data: DataSpec = None,
    ratio: Annotated[
        list[float] | None, typer.Option(metavar="R", help="Share of a group's channels removed; repeatable.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(metavar="S", help="Part of the search split used, 0.5 to 1.", show_default="1.0"),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure how much accuracy each group of channels is worth, alone and before any fine-tuning.

    A study that trains its own baseline trains it first.
    """
    with listener(quiet=quiet) as on_event:
        chosen = choose_study(study, model, weights, data)
        usual = chosen.analysis
        asked = replace(
            usual,
            ratios=tuple(ratio) if ratio else usual.ratios,
            share=usual.share if share is None else share,
        )
        chosen = replace(chosen, analysis=asked, device=device or chosen.device)
        table = _measure(chosen, on_event)
    if as_json:
        sys.stdout.write(table.to_json() + "\n")
    else:
        Console(highlight=False).print(sensitivity_text(table))


def _measure(study: Study, on_event: OnEvent) -> SensitivityTable:
    from autoprune.evaluation import resolve_device
    from autoprune.preflight import understand
    from autoprune.sensitivity import planned_points, sensitivity
    from autoprune.train import train_baseline_

    check_study(study)
    known, device = understand(study), resolve_device(study.device)
    if study.baseline is not None:
        total = study.baseline.epochs
        on_event(StageStarted(stage="baseline", round=0, detail="train"))
        train_baseline_(
            known.model, known.data.train, study.baseline, seed=study.seed, device=device, loss=study.loss,
            on_epoch=lambda e: on_event(StageProgress(stage="baseline", round=0, done=e.epoch, total=total)),
        )  # fmt: skip
    planned = len(planned_points(known.graph, study.analysis.ratios))
    on_event(StageStarted(stage="analysis", round=0, detail=f"{len(known.graph.groups)} groups"))
    measured = count(1)
    return sensitivity(
        known.model, known.graph, known.data.search, ratios=study.analysis.ratios, share=study.analysis.share,
        calibration=known.data.train, device=device, loss=study.loss, score=study.evaluate,
        on_point=lambda p: on_event(
            StageProgress(stage="analysis", round=0, done=next(measured), total=planned, detail=p.group)
        ),
    )  # fmt: skip
