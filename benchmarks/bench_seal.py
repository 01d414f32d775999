"""The cost of `--encrypt-run`: keeping a checkpoint and reading it again, with encryption and without.

    python benchmarks/bench_seal.py      # table to stdout, and to benchmarks/results/seal.md

The numbers are medians of `--repeat` turns, with the two ways interleaved. Each turn saves other weights,
since equal content is kept once.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from machine import headline

from autoprune.config import Protection
from autoprune.crypto.keys import keygen
from autoprune.plan import PruningPlan
from autoprune.storage.checkpoint_cipher import run_cipher
from autoprune.storage.run_store import RunStore, quiet_optuna

NETWORKS = ("mobilenet_v2", "resnet18", "resnet50")
PLAN = PruningPlan(keep={}, num_units={})


def times(store: RunStore, model: torch.nn.Module) -> tuple[float, float]:
    """Seconds to save and to load a checkpoint."""
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    began = time.perf_counter()
    artifact = store.save_checkpoint(model, PLAN)
    saved = time.perf_counter()
    store.load_checkpoint(artifact)
    done = time.perf_counter()
    store.delete_checkpoint(artifact)
    return saved - began, done - saved


def row(name: str, plain: RunStore, sealed: RunStore, repeat: int) -> str:
    """One network's medians, in milliseconds."""
    model = torchvision.models.get_model(name, weights=None)
    megabytes = sum(t.numel() * t.element_size() for t in model.state_dict().values()) / 1e6
    measured = [(times(plain, model), times(sealed, model)) for _ in range(repeat)]
    shown = [
        1000 * statistics.median(turn[way][step] for turn in measured) for step in (0, 1) for way in (0, 1)
    ]
    return f"| {name} | {megabytes:.1f} | " + " | ".join(f"{ms:.0f}" for ms in shown) + " |"


def main() -> None:
    """Measure all networks, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeat", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "seal.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, quiet_optuna():
        key = Path(folder) / "key"
        protection = Protection(run_recipients=(keygen(key),), run_identities=(str(key),))
        plain = RunStore(Path(folder) / "plain", "a", create=True)
        sealed = RunStore(Path(folder) / "sealed", "a", create=True, cipher=run_cipher(protection))
        rows = [row(name, plain, sealed, arguments.repeat) for name in NETWORKS]
        plain.close()
        sealed.close()
    lines = [
        "# Checkpoints encrypted at rest",
        "",
        headline("torch", "pyrage"),
        f"Medians of {arguments.repeat}, in milliseconds.",
        "",
        "    python benchmarks/bench_seal.py",
        "",
        "| network | MB | save | save, encrypted | load | load, encrypted |",
        "|---|---:|---:|---:|---:|---:|",
        *rows,
    ]
    arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(arguments.out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
