"""A study without a study file: `--model torchvision:resnet18 --weights FILE --data cifar10:DIR`.

The network is one of torchvision's, or a class or function of the user's own (`FILE.py:NAME`), built with
as many classes as the data have. Its weights came trained, so the search split is cut from the test data.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoprune.cli.study_file import import_file, nearest, nearest_file
from autoprune.config import Study
from autoprune.errors import AutopruneError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from autoprune.data import Data

WEIGHTS = (".safetensors", ".pt", ".pth", ".th")
FORMS = "write --model torchvision:resnet18, or --model FILE.py:CLASS_OR_FUNCTION"


def study_of_flags(model: str, weights: str, data: str) -> Study:
    """Return the study that the three options describe.

    Network and data are made when the run asks for them.

    Raises:
        UsageError: the network is unknown, or the weights file does not exist.
    """
    factory = find_factory(model)
    if not Path(weights).expanduser().is_file():
        hint = nearest_file(weights, WEIGHTS, "give --weights a .safetensors, .pt or .pth file")
        raise UsageError(f"there is no weights file {weights}", hint)

    @cache
    def load() -> Data:
        from autoprune.data import load_data

        return load_data(data, search_from="test")

    network = Named(factory, weights, lambda: load().num_classes)
    words = (model.rpartition(":")[2], re.split("[:,]", data)[0])
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "-".join(words)).strip("-.") or "run"
    return Study(name=name, model=network, data=load)


class Named:
    """A network that options name; a call builds it with its weights."""

    def __init__(self, factory: Callable[..., Any], weights: str, num_classes: Callable[[], int]) -> None:
        self._factory, self._weights, self._num_classes = factory, weights, num_classes

    def __call__(self) -> nn.Module:
        """The network with its weights."""
        return _with_weights(self._factory, self._num_classes(), self._weights)

    def source(self) -> tuple[str, dict[str, Any]]:
        """Return what builds the network without its weights: `module:name`, and the arguments."""
        name = f"{self._factory.__module__}:{self._factory.__qualname__}"
        return name, _arguments(self._factory, self._num_classes())


def find_factory(model: str) -> Callable[..., Any]:
    """Return the class or function that `--model` names, which builds the network.

    Raises:
        UsageError: nothing has this name; the hint names the nearest.
    """
    source, colon, name = model.rpartition(":")
    if not colon:
        raise UsageError(f"--model {model} names no source", FORMS)
    if source == "torchvision":
        return _torchvision(name)
    if not source.endswith(".py"):
        raise UsageError(
            f"--model {model}: {source!r} is neither torchvision nor a .py file",
            "did you mean 'torchvision'?" if get_close_matches(source, ["torchvision"]) else FORMS,
        )
    if not Path(source).expanduser().is_file():
        raise UsageError(f"--model {model}: there is no file {source}", nearest_file(source, (".py",), FORMS))
    module = import_file(Path(source).expanduser().resolve())
    factories = {n for n, v in vars(module).items() if callable(v) and not n.startswith("_")}
    if name not in factories:
        raise UsageError(f"{source} has no class or function {name!r}", nearest(name, factories))
    factory: Callable[..., Any] = getattr(module, name)
    return factory


def _torchvision(name: str) -> Callable[..., Any]:
    models = importlib.import_module("torchvision.models")
    names = models.list_models(module=models)
    if name not in names:
        raise UsageError(f"torchvision has no classifier {name!r}", nearest(name, names))
    factory: Callable[..., Any] = models.get_model_builder(name)
    return factory


def _with_weights(factory: Callable[..., Any], num_classes: int, weights: str) -> nn.Module:
    from autoprune.data import load_weights_

    model = build_network(factory, num_classes)
    load_weights_(model, weights)
    return model


def build_network(factory: Callable[..., Any], num_classes: int | None) -> nn.Module:
    """Build a network, for `num_classes` classes where the factory takes a number of them.

    Raises:
        UsageError: the factory fails, or makes no module.
    """
    from torch import nn

    try:
        model = factory(**_arguments(factory, num_classes))
    except AutopruneError:
        raise
    except Exception as error:
        raise UsageError(
            f"the network could not be built: {type(error).__name__}: {error}",
            "the class or function is called with num_classes=N if it takes that, and with nothing else",
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"--model made a {type(model).__name__}, not a torch.nn.Module", "name what builds the network"
        )
    return model


def _arguments(factory: Callable[..., Any], num_classes: int | None) -> dict[str, Any]:
    """Return the arguments of a factory: the number of classes where the factory takes it."""
    accepts = inspect.signature(factory).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in accepts.values())
    takes_classes = num_classes is not None and ("num_classes" in accepts or takes_any)
    return {"num_classes": num_classes} if takes_classes else {}
