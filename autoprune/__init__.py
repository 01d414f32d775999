"""Prune a trained network to a target, unattended.

The names below are the public surface; each is imported when it is first used, because importing torch
takes seconds and reading a help text should not. Everything else in the package is private.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoprune.artifact.writer import load as load
    from autoprune.config import Analysis as Analysis
    from autoprune.config import Baseline as Baseline
    from autoprune.config import Control as Control
    from autoprune.config import Finetune as Finetune
    from autoprune.config import Lock as Lock
    from autoprune.config import Search as Search
    from autoprune.config import Study as Study
    from autoprune.data.sources import Data as Data
    from autoprune.data.sources import from_datasets as from_datasets
    from autoprune.data.sources import load_data as load_data
    from autoprune.data.weights import load_weights_ as load_weights_
    from autoprune.errors import AutopruneError as AutopruneError
    from autoprune.pipeline.run import run as run
    from autoprune.plan import PruningPlan as PruningPlan
    from autoprune.pruning.sensitivity import sensitivity as sensitivity
    from autoprune.record import RunResult as RunResult
    from autoprune.structure.cost import Cost as Cost
    from autoprune.structure.densify import densify as densify
    from autoprune.structure.densify import masked as masked
    from autoprune.structure.graph import ChannelGraph as ChannelGraph
    from autoprune.structure.trace_model import trace as trace
    from autoprune.training.evaluation import evaluate as evaluate
    from autoprune.training.finetune import finetune_
    from autoprune.training.schedule import Schedule as Schedule

    finetune = finetune_

# Public name -> where it is: "module" or "module:name there".
PUBLIC = {
    "Analysis": "config",
    "AutopruneError": "errors",
    "Baseline": "config",
    "ChannelGraph": "structure.graph",
    "Control": "config",
    "Cost": "structure.cost",
    "Data": "data.sources",
    "Finetune": "config",
    "Lock": "config",
    "PruningPlan": "plan",
    "RunResult": "record",
    "Schedule": "training.schedule",
    "Search": "config",
    "Study": "config",
    "densify": "structure.densify",
    "evaluate": "training.evaluation",
    "finetune": "training.finetune:finetune_",
    "from_datasets": "data.sources",
    "load": "artifact.writer",
    "load_data": "data.sources",
    "load_weights_": "data.weights",
    "masked": "structure.densify",
    "run": "pipeline.run",
    "sensitivity": "pruning.sensitivity",
    "trace": "structure.trace_model",
}
__all__ = sorted(PUBLIC)


class _Package(ModuleType):
    """This package, whose public functions keep their names when modules of the same name are imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    place = PUBLIC.get(name)
    if place is None:
        raise AttributeError(f"module 'autoprune' has no attribute {name!r}")
    module, _, inner = place.partition(":")
    found = getattr(import_module(f"autoprune.{module}"), inner or name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return __all__
