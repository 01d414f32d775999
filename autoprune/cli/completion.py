"""Help with typing: names that the shell may complete, and the examples at the end of help pages.

Nothing here imports torch: a completion is asked for at every press of the tab key.
"""

from __future__ import annotations

from pathlib import Path

from autoprune.cli.study_file import built_in_studies

DEVICES = ("auto", "cpu", "cuda", "mps")
RUNS = ("*", "runs/*", "runs/*/*")  # where runs lie, from the folder that one is in


def studies(incomplete: str) -> list[str]:
    """Return the studies that come with autoprune, and the Python files here; the shell adds other files."""
    files = [path.name for path in sorted(Path().glob("*.py"))]
    return [name for name in (*built_in_studies(), *files) if name.startswith(incomplete)]


def runs(incomplete: str) -> list[str]:
    """Return the folders that hold a run."""
    from autoprune.location import DATABASE

    folders = sorted({path.parent for pattern in RUNS for path in Path().glob(f"{pattern}/{DATABASE}")})
    return [str(path) for path in folders if str(path).startswith(incomplete)]


def devices(incomplete: str) -> list[str]:
    """Return the devices that a network may run on."""
    return [name for name in DEVICES if name.startswith(incomplete)]


def data_sets(incomplete: str) -> list[str]:
    """Return the kinds of data; the folder after the colon is the user's."""
    names = ("cifar10:", "digits", "fashionmnist:", "imagefolder:")
    return [name for name in names if name.startswith(incomplete)]


def examples(*lines: str) -> str:
    """Return the end of a help page: its examples."""
    return "\n\n".join(["Examples:", *(f"- `autoprune {line}`" for line in lines)])


RUN_EXAMPLES = examples(
    "run digits",
    "run my_study.py --dry-run",
    "run my_study.py --target latency=0.7 --max-drop 0.5 --budget 8h --resume",
    "run --model torchvision:resnet18 --weights resnet18.pth --data imagefolder:photos,size=224",
    "run my_study.py --recipient age1... --sign signing_key",
)
