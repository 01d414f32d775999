"""Fine-tuning: samples per second, autoprune's loop beside a plain one, and top-1 after the same epochs.

    AUTOPRUNE_DATA=DIR python benchmarks/bench_finetune.py --repeats 5
    AUTOPRUNE_DATA=DIR python benchmarks/bench_finetune.py --networks resnet20 --device cuda

The plain loop is what a careful engineer writes: a data set of uint8 tensors, torchvision's v2 transforms
for crop, flip and normalisation, a DataLoader with persistent workers, float32, SGD with Nesterov's momentum
and a cosine. Network, weights, batch, augmentation, schedule and number of steps are the same; distillation
is off. Both take turns, and the ratio is the median over the turns.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from machine import headline
from oneshot_models import Case, load
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

from autoprune.config import Finetune
from autoprune.data.splits import TensorSplit
from autoprune.training.evaluation import evaluate
from autoprune.training.finetune import finetune_, uses_bf16
from autoprune.training.schedule import Schedule

HERE = Path(__file__).resolve().parent
BATCH, LR, WEIGHT_DECAY = 128, 0.03, 5e-4


class Images(Dataset[tuple[Tensor, int]]):
    """What a TensorSplit holds, as a map-style data set with random transforms."""

    def __init__(self, split: TensorSplit) -> None:
        self.images, self.labels = split.images_NCHW, split.labels_N
        how, norm = split.augmentation, split.normalization
        steps: list[nn.Module] = [v2.RandomCrop(split.images_NCHW.shape[-1], padding=how.crop_pad)]
        if how.flip:
            steps.append(v2.RandomHorizontalFlip())
        steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(norm.mean, norm.std)]
        self.transform = v2.Compose(steps)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def plain_loop(model: nn.Module, loader: DataLoader[Any], steps: int, device: torch.device) -> float:
    """Train in place; gives the seconds, the workers' start not counted."""
    model.to(device).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=LR, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    done, began = 0, 0.0
    while done < steps:
        for inputs, targets in loader:
            began = began or time.perf_counter()
            loss = F.cross_entropy(
                model(inputs.to(device, non_blocking=True)), targets.to(device, non_blocking=True)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            done += 1
            if done == steps:
                break
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def our_loop(model: nn.Module, case: Case, epochs: float, device: torch.device, seed: int) -> float:
    """The same by autoprune."""
    settings = Finetune(
        optimizer="sgd", distill=0.0, weight_decay=WEIGHT_DECAY, batch_size=BATCH, recalibrate_batches=0
    )
    schedule = Schedule(lr=LR, decay="cosine", warmup=0.0)
    began = time.perf_counter()
    finetune_(
        model, case.data.train, schedule=schedule, settings=settings, epochs=epochs, seed=seed, device=device
    )
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def measure(case: Case, args: argparse.Namespace) -> dict[str, Any]:
    """Both loops in turns."""
    device, train = torch.device(args.device), case.data.train
    assert isinstance(train, TensorSplit)
    workers = DataLoader(
        Images(train), BATCH, shuffle=True, drop_last=True, num_workers=args.workers,
        persistent_workers=args.workers > 0, pin_memory=device.type == "cuda",
    )  # fmt: skip
    steps = round(args.epochs * train.num_batches(BATCH))
    turns: list[tuple[float, float]] = []
    top1: list[tuple[float, float]] = []
    for turn in range(args.repeats):
        plain, ours = copy.deepcopy(case.model), copy.deepcopy(case.model)
        torch.manual_seed(turn)
        seconds = plain_loop(plain, workers, steps, device), our_loop(ours, case, args.epochs, device, turn)
        turns.append((steps * BATCH / seconds[0], steps * BATCH / seconds[1]))
        top1.append(tuple(evaluate(m, case.data.search, device=device).top1 for m in (plain, ours)))  # type: ignore[arg-type]
        print(case.name, turns[-1], top1[-1], flush=True)
    return {
        "network": case.title, "epochs": args.epochs, "repeats": args.repeats, "workers": args.workers,
        "plain": median(t[0] for t in turns), "ours": median(t[1] for t in turns),
        "ratios": sorted(t[1] / t[0] for t in turns),
        "plain_top1": sum(t[0] for t in top1) / len(top1), "our_top1": sum(t[1] for t in top1) / len(top1),
    }  # fmt: skip


def page(rows: list[dict[str, Any]], args: argparse.Namespace) -> str:
    """The table, with what it was measured on."""
    options = f"--networks {' '.join(args.networks)} --epochs {args.epochs:g} --repeats {args.repeats}"
    bf16 = "bfloat16" if uses_bf16(torch.device(args.device)) else "float32"
    lines = [
        "# Fine-tuning: samples per second beside a plain loop", "",
        headline("torch", "torchvision", device=args.device),
        f"autoprune trains in {bf16}, the plain loop in float32 with {args.workers} loading processes.",
        f"Made by `python benchmarks/bench_finetune.py {options}`; the head of that file says more.",
        "Samples per second are medians, top-1 the mean on the search split.", "",
        "| network | plain | autoprune | ratio, median (least to most) | plain top-1 | autoprune top-1 |",
        "|---|---:|---:|---:|---:|---:|",
    ]  # fmt: skip
    for r in rows:
        ratios = r["ratios"]
        lines.append(
            f"| {r['network']} | {r['plain']:.0f} | {r['ours']:.0f} | {median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}) | {100 * r['plain_top1']:.2f} "
            f"| {100 * r['our_top1']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet8"])
    parser.add_argument("--epochs", type=float, default=0.25, help="per turn")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "autoprune-bench")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "finetune_cpu.md")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = Path(os.environ["AUTOPRUNE_DATA"])
    rows = [measure(load(name, folder, args.cache), args) for name in args.networks]
    print(json.dumps(rows, indent=1))
    args.out.write_text(page(rows, args), encoding="utf-8")


if __name__ == "__main__":
    main()
