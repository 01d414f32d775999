"""The commands `autoprune groups` and `autoprune analyze`, for a network before anything is pruned."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from autoprune.cli import completion
from autoprune.cli.live_view import event_display
from autoprune.cli.options import (
    DATA,
    SHOW,
    AsJson,
    DataSpec,
    Device,
    Exclude,
    KeepNorms,
    Model,
    Name,
    Only,
    Quiet,
    RoundTo,
    Weights,
    changed,
    choose_study,
)
from autoprune.cli.tables import graph_document, groups_tree, sensitivity_text
from autoprune.config import check_study
from autoprune.errors import UsageError
from autoprune.events import OnEvent, StageProgress, StageStarted
from autoprune.serialization import json_text

if TYPE_CHECKING:
    from autoprune.config import Study
    from autoprune.pipeline import TracedStudy
    from autoprune.pruning import Prospect, SensitivityTable
    from autoprune.structure import ChannelGraph


HOW = "How to measure"


def register(app: typer.Typer) -> None:
    """Add the commands of this module."""
    app.command(
        rich_help_panel="Look",
        epilog=completion.examples(
            "groups digits",
            "groups --model torchvision:vit_b_16 --input 3x224x224",
            "groups --model net.py:MyNet --input 1x28x28 --exclude 'head.*'",
        ),
    )(groups)
    app.command(
        rich_help_panel="Look",
        epilog=completion.examples("analyze digits", "analyze my_study.py --share 0.5 --json"),
    )(analyze)


def groups(
    study: Name = None,
    model: Model = None,
    weights: Weights = None,
    data: DataSpec = None,
    exclude: Exclude = None,
    only: Only = None,
    norms: KeepNorms = None,
    round_to: RoundTo = None,
    size: Annotated[str | None, typer.Option(
        "--input", metavar="SHAPE", rich_help_panel=DATA, show_default="3x224x224",
        help="One example's shape, for --model without --weights and --data.")] = None,
    as_json: AsJson = False,
) -> None:  # fmt: skip
    """Show which channels must shrink together, what they cost, and what may not shrink and why.

    Structure does not depend on weights, so --model alone is enough here.
    """
    if study is None and model is not None and weights is None and data is None:
        wishes = {"exclude": exclude or [], "only": only or [], "norms": norms or "keep"}
        graph = _bare_graph(model, size or "3x224x224", round_to=round_to, **wishes)
    else:
        if size is not None:
            raise UsageError("--input is given beside data", "the data's own shape is used; leave it out")
        from autoprune.pipeline import trace_study

        chosen = choose_study(study, model, weights, data)
        graph = trace_study(changed(chosen, exclude, only, norms=norms, round_to=round_to)).graph
    if as_json:
        sys.stdout.write(json_text(graph_document(graph), indent=1) + "\n")
    else:
        Console(highlight=False).print(groups_tree(graph))


def _bare_graph(model: str, size: str, *, round_to: int | None, **wishes: Any) -> ChannelGraph:
    """Return the graph of a network with random weights."""
    import torch

    from autoprune.cli.study_flags import build_network, find_factory
    from autoprune.heuristics import DEFAULTS
    from autoprune.structure import trace

    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise UsageError(f"--input {size!r} is not a shape", "write for example 3x224x224")
    example = torch.zeros(1, *map(int, size.split("x")))
    return trace(
        build_network(find_factory(model), None), example, round_to=round_to or DEFAULTS.round_to, **wishes
    )


def analyze(
    study: Name = None,
    model: Model = None,
    weights: Weights = None,
    data: DataSpec = None,
    exclude: Exclude = None,
    only: Only = None,
    norms: KeepNorms = None,
    round_to: RoundTo = None,
    ratio: Annotated[
        list[float] | None,
        typer.Option(
            metavar="R", rich_help_panel=HOW, help="Share of a group's channels removed; repeatable."
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            metavar="S",
            rich_help_panel=HOW,
            help="Part of the search split used, 0.5 to 1.",
            show_default="1.0",
        ),
    ] = None,
    device: Device = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    exact: Annotated[
        bool,
        typer.Option(
            "--exact", rich_help_panel=HOW, help="Measure every ratio with the network's own arithmetic."
        ),
    ] = False,
    tries: Annotated[
        int,
        typer.Option(
            metavar="N",
            rich_help_panel=HOW,
            min=0,
            help="Search for better plans, N more at every share: tens of times slower.",
        ),
    ] = 0,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", rich_help_panel=SHOW, help="Where analysis.json and pictures go."),
    ] = None,
) -> None:
    """Say how far a network can be pruned, and which groups of channels are fragile or free.

    All before any fine-tuning. A study that trains its own baseline trains it first. The table, what is
    left at several costs, and two pictures are written to a folder, NAME-analysis by default.
    """
    with event_display(quiet=quiet) as on_event:
        chosen = choose_study(study, model, weights, data)
        chosen = changed(chosen, exclude, only, norms=norms, round_to=round_to, device=device)
        defaults = chosen.analysis
        analysis = replace(
            defaults,
            ratios=tuple(ratio) if ratio else defaults.ratios,
            share=defaults.share if share is None else share,
            exact=exact or defaults.exact,
        )
        chosen = replace(chosen, analysis=analysis)
        table, prospects = _measure(chosen, tries, on_event)
    folder = out or Path(f"{chosen.name}-analysis")
    document = _analysis_document(table, prospects)
    _write_analysis(folder, document, table, prospects)
    if as_json:
        sys.stdout.write(document + "\n")
    else:
        Console(highlight=False).print(sensitivity_text(table, prospects))
        Console(highlight=False).print(
            f"\nanalysis.json, sensitivity.png and prunability.png are in {folder}"
        )


def _analysis_document(table: SensitivityTable, prospects: Sequence[Prospect]) -> str:
    """Return the table's own text form, extended by what one-shot pruning leaves at several costs."""
    return json_text(json.loads(table.to_json()) | {"prospects": prospects}, indent=1)


def _write_analysis(
    folder: Path, document: str, table: SensitivityTable, prospects: Sequence[Prospect]
) -> None:
    from autoprune.report import write_analysis_plots

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "analysis.json").write_text(document + "\n", encoding="utf-8")
    write_analysis_plots(table.points, prospects, table.baseline.top1, folder)


def _measure(study: Study, tries: int, on_event: OnEvent) -> tuple[SensitivityTable, tuple[Prospect, ...]]:
    from autoprune.pipeline import thread_limit, trace_study

    check_study(study)
    problem = trace_study(study)
    with thread_limit(study, problem.graph):
        return _analyze(study, problem, tries, on_event)


def _analyze(
    study: Study, problem: TracedStudy, tries: int, on_event: OnEvent
) -> tuple[SensitivityTable, tuple[Prospect, ...]]:
    from autoprune.data import derive_seed
    from autoprune.pipeline import trace_for_study
    from autoprune.pruning import make_setup, max_num_points, one_shot_prospects, sensitivity
    from autoprune.tasks import task_of
    from autoprune.training import resolve_device, train_baseline_

    device, task = resolve_device(study.device), task_of(study)
    if study.baseline is not None:
        total = study.baseline.epochs
        on_event(StageStarted(stage="baseline", round=0, detail="train"))
        train_baseline_(
            problem.model, problem.data.train, study.baseline, seed=derive_seed(study.seed, 0), device=device,
            task=task,
            on_epoch=lambda e: on_event(StageProgress(stage="baseline", round=0, done=e.epoch, total=total)),
        )  # fmt: skip
    num_points = max_num_points(problem.graph, study.analysis.ratios, exact=study.analysis.exact)
    on_event(StageStarted(stage="analysis", round=0, detail=f"{len(problem.graph.groups)} groups"))
    measured = count(1)
    table = sensitivity(
        problem.model, problem.graph, problem.data.search, settings=study.analysis,
        calibration=problem.data.train, device=device,
        task=task,
        on_point=lambda p: on_event(
            StageProgress(stage="analysis", round=0, done=next(measured), total=num_points, detail=p.group)
        ),
    )  # fmt: skip
    on_event(StageStarted(stage="analysis", round=0, detail="how far it can go"))
    setup = make_setup(
        problem.model,
        problem.graph,
        problem.data.search,
        calibration=problem.data.train,
        device=device,
        task=task,
    )
    prospects = one_shot_prospects(
        setup, problem.data.search, table=table, num_classes=problem.data.num_classes, tries=tries,
        retrace=lambda pruned: trace_for_study(study, pruned, problem.example).with_bounds_of(problem.graph),
    )  # fmt: skip
    return table, prospects
