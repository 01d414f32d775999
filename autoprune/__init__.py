"""Prune a trained network to a target, unattended.

The names below are the public surface; each is imported when it is first used, because importing torch
takes seconds and reading a help text should not. Everything else in the package is private.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprune.artifact import load as load
    from autoprune.config import Analysis as Analysis
    from autoprune.config import Baseline as Baseline
    from autoprune.config import Control as Control
    from autoprune.config import Finetune as Finetune
    from autoprune.config import Lock as Lock
    from autoprune.config import Search as Search
    from autoprune.config import Study as Study
    from autoprune.data import Data as Data
    from autoprune.data import from_datasets as from_datasets
    from autoprune.data import load_data as load_data
    from autoprune.data import load_weights_ as load_weights_
    from autoprune.errors import AutopruneError as AutopruneError
    from autoprune.pipeline import run as run
    from autoprune.plan import PruningPlan as PruningPlan
    from autoprune.pruning import sensitivity as sensitivity
    from autoprune.record import RunResult as RunResult
    from autoprune.structure import ChannelGraph as ChannelGraph
    from autoprune.structure import Cost as Cost
    from autoprune.structure import densify as densify
    from autoprune.structure import masked as masked
    from autoprune.structure import trace as trace
    from autoprune.training import Schedule as Schedule
    from autoprune.training import evaluate as evaluate
    from autoprune.training import finetune_

    finetune = finetune_

# Public name -> the room that exports it: "room", or "room:its name there".
PUBLIC = {
    "Analysis": "config",
    "AutopruneError": "errors",
    "Baseline": "config",
    "ChannelGraph": "structure",
    "Control": "config",
    "Cost": "structure",
    "Data": "data",
    "Finetune": "config",
    "Lock": "config",
    "PruningPlan": "plan",
    "RunResult": "record",
    "Schedule": "training",
    "Search": "config",
    "Study": "config",
    "densify": "structure",
    "evaluate": "training",
    "finetune": "training:finetune_",
    "from_datasets": "data",
    "load": "artifact",
    "load_data": "data",
    "load_weights_": "data",
    "masked": "structure",
    "run": "pipeline",
    "sensitivity": "pruning",
    "trace": "structure",
}
__all__ = sorted(PUBLIC)


def __getattr__(name: str) -> Any:
    source = PUBLIC.get(name)
    if source is None:
        raise AttributeError(f"module 'autoprune' has no attribute {name!r}")
    room, _, inner = source.partition(":")
    value = getattr(import_module(f"autoprune.{room}"), inner or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
