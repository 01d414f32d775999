"""The study that a person named: a Python file of theirs, or one that comes with the package.

A study file is ordinary Python that ends in one `Study`: a value at module level, or a function `study()`
that returns it. It runs like a script, with its own folder first on `sys.path`, so that a network defined
beside it can be imported. It runs with the caller's rights: a study is code, not a document.
"""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

from autoprune.config import Study
from autoprune.errors import AutopruneError, UsageError

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (PACKAGE / "studies", PACKAGE.parent / "studies")  # in an installed wheel, in a checkout


def nearest(word: str, candidates: Iterable[str]) -> str:
    """Return a hint that names the nearest of the candidates, or all of them where none is near."""
    names = sorted(candidates)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(names) or 'none'}"


def nearest_file(path: str, suffixes: Iterable[str], otherwise: str) -> str:
    """Return a hint that names the file of these kinds that is nearest to a path without a file."""
    folder = Path(path).expanduser().parent
    candidates = [str(f) for f in folder.iterdir() if f.suffix in suffixes] if folder.is_dir() else []
    close = difflib.get_close_matches(str(Path(path).expanduser()), candidates, n=1)
    return f"did you mean {close[0]}?" if close else otherwise


def built_in_studies() -> dict[str, Path]:
    """Return the files of the studies that come with autoprune, by the studies' names."""
    files = (f for folder in FOLDERS if folder.is_dir() for f in sorted(folder.glob("*.py")))
    return {f.stem: f for f in files if "Study(" in f.read_text(encoding="utf-8")}


def load_study(text: str) -> Study:
    """Return the study that `text` names: a built-in name, or the path of a `.py` file.

    Raises:
        UsageError: there is no such study, the file fails, or it defines none or several.
    """
    return _only_study(import_file(find_study(text)))


def find_study(text: str) -> Path:
    """Return the file behind a study's name or path, without running it.

    Raises:
        UsageError: there is no such file; the hint names the nearest.
    """
    studies = built_in_studies()
    path = Path(text).expanduser()
    if path.suffix != ".py" and text in studies:
        return studies[text]
    if path.is_file() and path.suffix == ".py":
        return path.resolve()
    if path.suffix == ".py" or path.parent != Path():
        own = f"give a .py file, or a built-in study: {', '.join(sorted(studies))}"
        raise UsageError(f"there is no study file {text}", nearest_file(text, (".py",), own))
    raise UsageError(
        f"there is no study {text!r}",
        f"{nearest(text, studies)} Or give the path of a .py file that defines a Study",
    )


def import_file(path: Path) -> ModuleType:
    """Run a Python file of the user's as a module named after it, with its folder first on `sys.path`.

    Raises:
        UsageError: the file fails, or another module of its name is loaded already.
    """
    folder = str(path.parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    loaded = sys.modules.get(path.stem)
    if loaded is not None and getattr(loaded, "__file__", None) != str(path):
        raise UsageError(
            f"the study file {path} has the name of a module that is already loaded ({path.stem})",
            "give the file another name",
        )
    sys.modules[path.stem] = module  # as `import` does it: classes of the file must be findable by name
    try:
        spec.loader.exec_module(module)
    except AutopruneError:
        raise
    except Exception as error:
        raise _failed(path, error) from error
    return module


def _failed(path: Path, error: Exception) -> UsageError:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else (frames[-1].lineno if frames else None)
    where = f"{path}:{line}" if line else str(path)
    if isinstance(error, ModuleNotFoundError):
        hint = f"pip install it, or put {error.name}.py beside the study"
    else:
        hint = f"python {path} shows the same error in full; so does --debug"
    return UsageError(f"the study failed at {where}: {type(error).__name__}: {error}", hint)


def _only_study(module: ModuleType) -> Study:
    path = Path(module.__file__ or "?")
    function = getattr(module, "study", None)
    if callable(function):
        try:
            study = function()
        except AutopruneError:
            raise
        except Exception as error:
            raise _failed(path, error) from error
        if not isinstance(study, Study):
            raise UsageError(
                f"study() of {path} returned {type(study).__name__}", "return an autoprune.Study"
            )
        return study
    studies = {id(v): v for v in vars(module).values() if isinstance(v, Study)}
    if len(studies) != 1:
        raise UsageError(
            f"{path} defines {len(studies) or 'no'} studies",
            "define one value of type autoprune.Study, or a function study() that returns one",
        )
    return next(iter(studies.values()))
