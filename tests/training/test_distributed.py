"""One trial on several ranks gives what one process gives; gloo, two processes on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.config import Finetune
from autoprune.data.splits import LoaderSplit, Split, own_part
from autoprune.tasks import Task
from autoprune.training.evaluation import evaluate, recalibrate_
from autoprune.training.finetune import finetune_
from autoprune.training.optimizer import RELATIVE
from autoprune.training.schedule import Schedule
from tests.tiny import tiny_data, tiny_net
from tests.tolerance import rounding

ROOT = Path(__file__).resolve().parents[2]
BATCH = 37  # not divisible by two
LR = 0.05
STEPS = 15  # one and a half passes over 384 samples
PIXELS = BATCH * 8 * 8  # terms of the longest sums: a channel's statistics, and its gradient
# All is float64 but each rank's share of the loss, one number in float32 a step.
EXACT = rounding(torch.float64, terms=PIXELS, steps=STEPS) + rounding(torch.float32, terms=1, steps=STEPS)
# Muon orthogonalises in bfloat16, in five iterations, and moves a weight by this share of its norm a step.
MUON = RELATIVE * LR * rounding(torch.bfloat16, terms=5, steps=STEPS)
CASES = [(kind, exact) for kind in ("tensors", "loader") for exact in (True, False)]
RANK = """
import sys, torch
from autoprune.errors import AutopruneError, TrialError
from autoprune.training import distributed
from autoprune.training.divergence import LossWatch, check_losses
from tests.training.test_distributed import CASES, one_trial
with distributed.process_group() as rank, distributed.shared_work():
    assert distributed.rank_and_size() == (rank, 2)
    torch.save([one_trial(*case) for case in CASES], f"{sys.argv[1]}/{rank}.pt")
    try:
        distributed.from_rank_zero(lambda: (_ for _ in ()).throw(AutopruneError("stop", "now")))
    except AutopruneError as error:
        assert error.message == "stop"
    for losses, diverged in (((1e9, 1.0), True), ((1.0, 1e9), False)):
        watch, caught = LossWatch(2, torch.device("cpu")), False
        for loss, left in ((1.0, 2), (losses[rank], 1)):
            watch.see(torch.tensor(loss), left)
        try:
            check_losses(watch, lambda: 1.0, 0.1)
        except TrialError:
            caught = True
        assert caught == diverged, "the first rank's numbers decide for all"
"""


class Pairs(torch.utils.data.Dataset[Any]):
    """The tiny training data, one sample at a time, with a random change that belongs to the sample."""

    def __init__(self) -> None:
        ((self.inputs, self.targets),) = tiny_data().train.batches(1000)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index] + 0.01 * torch.randn(1), self.targets[index]


class Wide(nn.Module):
    """The tiny network in float64, on inputs in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_net().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.double())


def one_trial(kind: str, exact: bool) -> dict[str, Any]:
    """Fine-tune, recalibrate and evaluate.

    `exact` is float64 throughout, so that a mistake cannot hide behind rounding; otherwise it is a trial as
    the product runs it, with Muon and a teacher, but for autocast to bfloat16.
    """
    torch.cpu.get_capabilities = lambda: {}  # a processor without bfloat16
    data = tiny_data()
    split: Split = data.train if kind == "tensors" else LoaderSplit(Pairs())
    model, task = (Wide(), Task(loss=F.cross_entropy)) if exact else (tiny_net(), Task())
    curve = finetune_(
        model, split, schedule=Schedule(lr=LR, decay="cosine", warmup=0.1), epochs=1.5, seed=3,
        settings=Finetune(batch_size=BATCH, optimizer="sgd" if exact else "muon"),
        task=task, teacher=None if exact else tiny_net().eval(),
    )  # fmt: skip
    tuned = evaluate(model, data.search, batch_size=33, task=task)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    recalibrate_(model, split, num_batches=5, batch_size=BATCH, seed=1)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    return {
        "weights": weights, "norms": norms[1].state_dict(), "top1": tuned.top1, "loss": tuned.loss,
        "correct": tuned.correct, "curve": [r.train_loss for r in curve],
        "own": [m.__dict__.get("forward") for m in norms],
    }  # fmt: skip


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """What each of two ranks gives for every case."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--no-python", sys.executable, "-c", RANK, str(folder),
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    return first, second


def flat(state: dict[str, Tensor]) -> Tensor:
    """A network, or a part of one, as one vector; a bias near zero says little by itself."""
    return torch.cat([tensor.double().flatten() for tensor in state.values()])


@pytest.mark.parametrize("case", CASES, ids=[f"{k}-{'float64' if e else 'as it runs'}" for k, e in CASES])
def test_two_ranks_give_what_one_process_gives(
    case: tuple[str, bool], ranks: tuple[list[Any], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", torch.cpu.get_capabilities)  # `one_trial` sets it
    alone, (first, second) = one_trial(*case), (r[CASES.index(case)] for r in ranks)
    exact = case[1]
    bound = EXACT if exact else MUON
    assert all(torch.equal(t, second["weights"][n]) for n, t in first["weights"].items()), "no drifting apart"
    for part in ("weights", "norms"):
        mine, other = flat(first[part]), flat(alone[part])
        assert float((mine - other).norm()) <= bound * float(other.norm())
    assert first["curve"] == pytest.approx(alone["curve"], rel=bound)
    assert first["loss"] == second["loss"] == pytest.approx(alone["loss"], rel=bound)
    flips = int((first["correct"] != alone["correct"]).sum())
    assert flips <= (0 if exact else 2), "a sample or two may lie between two classes"
    assert first["top1"] == second["top1"]
    assert not any(first["own"]), "the norms are left as they were found"


def test_parts_are_a_partition() -> None:
    for length in (1, 7, 64):
        for of in (1, 2, 5):
            slices = [own_part(length, (k, of)) for k in range(of)]
            assert np.concatenate([np.arange(length)[s] for s in slices]).tolist() == list(range(length))


def test_a_part_of_a_batch_is_what_the_whole_batch_holds() -> None:
    for split in (tiny_data().train, LoaderSplit(Pairs())):
        whole = list(split.batches(37, seed=5, augment=True))
        parts = [list(split.batches(37, seed=5, augment=True, part=(k, 3))) for k in range(3)]
        for index, (inputs, targets) in enumerate(whole):
            assert torch.equal(torch.cat([p[index][0] for p in parts]), inputs)
            assert torch.equal(torch.cat([p[index][1] for p in parts]), targets)
