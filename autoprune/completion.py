"""What the shell may complete on a command line: studies, runs, devices, data sets; files it knows itself.

Nothing here imports torch: a completion is asked for at every press of the tab key.
"""

from __future__ import annotations

from pathlib import Path

from autoprune.study_file import built_in_studies

DEVICES = ("auto", "cpu", "cuda", "mps")
RUNS = ("*", "runs/*", "runs/*/*")  # where runs lie, from the folder that one is in


def studies(incomplete: str) -> list[str]:
    """The studies that come with autoprune, and the Python files here; the shell knows all other files."""
    here = [path.name for path in sorted(Path().glob("*.py"))]
    return [name for name in (*built_in_studies(), *here) if name.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Folders that hold a run."""
    from autoprune.place import DATABASE

    found = sorted({path.parent for pattern in RUNS for path in Path().glob(f"{pattern}/{DATABASE}")})
    return [str(path) for path in found if str(path).startswith(incomplete)]


def devices(incomplete: str) -> list[str]:
    """Where a network may run."""
    return [name for name in DEVICES if name.startswith(incomplete)]


def data_sets(incomplete: str) -> list[str]:
    """Kinds of data; the folder after the colon is the user's."""
    names = ("cifar10:", "digits", "fashionmnist:", "imagefolder:")
    return [name for name in names if name.startswith(incomplete)]
