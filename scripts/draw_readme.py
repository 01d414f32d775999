"""Draw docs/run.png, the picture in the README, from a run's own storage.

    autoprune run digits --target macs=0.12 --budget 60s --plain --out runs/eighth
    python scripts/draw_readme.py runs/eighth

Left what the report calls the path, right the layer widths before and after; both as `autoprune report` draws
them.
"""

from __future__ import annotations

import argparse
import io
from contextlib import closing
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image

from autoprune.report import plots
from autoprune.search.history import read_run
from autoprune.storage.run_store import RunStore, quiet_optuna, run_name_at

TARGET = Path(__file__).resolve().parents[1] / "docs" / "run.png"
DPI = 110


def picture(figure: Figure, width_in: float, height_in: float) -> Image.Image:
    """A plot in another size, as an image."""
    with plots.style():
        figure.set_size_inches(width_in, height_in)
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=DPI)
    return Image.open(content).convert("RGB")


def main() -> None:
    """Read the run, draw, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=TARGET)
    arguments = parser.parse_args()
    with quiet_optuna(), closing(RunStore(arguments.run, run_name_at(arguments.run))) as store:
        record = read_run(store)
    drawn = plots.draw_all(record)
    parts = [picture(drawn["path"], 7.0, 3.6), picture(drawn["widths"], 4.2, 3.6)]
    whole = Image.new("RGB", (sum(p.width for p in parts), max(p.height for p in parts)), "white")
    left = 0
    for part in parts:
        whole.paste(part, (left, 0))
        left += part.width
    whole.quantize(64).save(arguments.out, optimize=True)
    print(arguments.out)


if __name__ == "__main__":
    main()
