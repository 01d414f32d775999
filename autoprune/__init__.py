"""Prune a trained network to a target, unattended.

The names below are the public surface; each is imported when it is first used, because importing torch
takes seconds and reading a help text should not. Everything else in the package is private.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import lazy_loader

if TYPE_CHECKING:
    from autoprune.artifact import load as load
    from autoprune.config import Analysis as Analysis
    from autoprune.config import Baseline as Baseline
    from autoprune.config import Control as Control
    from autoprune.config import Finetune as Finetune
    from autoprune.config import Protection as Protection
    from autoprune.config import Search as Search
    from autoprune.config import Study as Study
    from autoprune.data import Data as Data
    from autoprune.data import from_datasets as from_datasets
    from autoprune.data import load_data as load_data
    from autoprune.data import load_weights_ as load_weights_
    from autoprune.errors import AutopruneError as AutopruneError
    from autoprune.heuristics import Heuristics as Heuristics
    from autoprune.pipeline import run as run
    from autoprune.plan import PruningPlan as PruningPlan
    from autoprune.pruning import sensitivity as sensitivity
    from autoprune.record import RunResult as RunResult
    from autoprune.structure import ChannelGraph as ChannelGraph
    from autoprune.structure import Cost as Cost
    from autoprune.structure import densify as densify
    from autoprune.structure import masked as masked
    from autoprune.structure import trace as trace
    from autoprune.tasks import Task as Task
    from autoprune.training import Schedule as Schedule
    from autoprune.training import evaluate as evaluate
    from autoprune.training import finetune as finetune
    from autoprune.version import __version__ as __version__

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "artifact": ["load"],
        "config": ["Analysis", "Baseline", "Control", "Finetune", "Protection", "Search", "Study"],
        "data": ["Data", "from_datasets", "load_data", "load_weights_"],
        "errors": ["AutopruneError"],
        "heuristics": ["Heuristics"],
        "pipeline": ["run"],
        "plan": ["PruningPlan"],
        "pruning": ["sensitivity"],
        "record": ["RunResult"],
        "structure": ["ChannelGraph", "Cost", "densify", "masked", "trace"],
        "tasks": ["Task"],
        "training": ["Schedule", "evaluate", "finetune"],
        "version": ["__version__"],
    },
)
