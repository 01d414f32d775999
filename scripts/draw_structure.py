"""Draw docs/structure.svg: the labels of the worked example in docs/structure.md, as the engine finds them.

Usage: python scripts/draw_structure.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autoprune.structure.tracing import trace

OUT = Path(__file__).resolve().parents[1] / "docs" / "structure.svg"
COLOURS = ("#4269d0", "#efb118", "#3ca951", "#a463f2")
GREY = "#c8c8c8"


class Block(nn.Module):
    """The worked example: a residual block with a gate, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.up = nn.Conv2d(6, 8, 3, padding=1)
        self.down = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 4)."""
        x = F.relu(self.stem(x))
        value, gate = self.up(x).chunk(2, dim=1)
        x = x + self.down(value * torch.sigmoid(gate))
        return self.head(x.mean((2, 3)))


def main() -> None:
    """Trace the example and draw one row of cells for every parameter dimension."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Rectangle

    mpl.rcParams.update({"svg.hashsalt": "structure", "svg.fonttype": "none", "font.family": "sans-serif"})
    graph = trace(Block().eval(), torch.randn(1, 3, 8, 8))
    rows = [(f"{n}.weight, dim {d}", f"{n}.weight", d, w) for n, d, w in (
        ("stem", 1, 3), ("stem", 0, 6), ("up", 1, 6), ("up", 0, 8), ("down", 1, 4), ("down", 0, 6),
        ("head", 1, 6), ("head", 0, 4),
    )]  # fmt: skip
    figure, axes = plt.subplots(figsize=(7.2, 3.6))
    for y, (title, name, dim, width) in enumerate(rows):
        cells = [(GREY, "")] * width
        for number, group in enumerate(graph.groups):
            for member in group.members:
                if (member.name, member.dim) == (name, dim):
                    for unit, positions in enumerate(member.index):
                        for position in positions:
                            cells[position] = (COLOURS[number], str(unit))
        for x, (colour, text) in enumerate(cells):
            axes.add_patch(Rectangle((x, -y), 0.92, 0.8, color=colour))
            axes.text(x + 0.46, -y + 0.4, text, ha="center", va="center", color="white", fontsize=9)
        axes.text(-0.3, -y + 0.4, title, ha="right", va="center", fontsize=9)
    for number, group in enumerate(graph.groups):
        axes.text(8.6, -number + 0.4, f"group {group.name}: {group.num_units} units", va="center",
                  color=COLOURS[number], fontsize=9)  # fmt: skip
    bottom = -len(graph.groups) + 0.4
    axes.text(8.6, bottom, "frozen: input and output", va="center", color="#777", fontsize=9)
    axes.set(xlim=(-4, 14), ylim=(-len(rows) + 0.9, 1))
    axes.axis("off")
    figure.savefig(OUT, bbox_inches="tight", metadata={"Date": None})
    print(OUT.name)


if __name__ == "__main__":
    main()
