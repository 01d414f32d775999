"""One trial on several ranks gives what one process gives; gloo, two processes on the CPU."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from autoprune.config import Finetune
from autoprune.data.splits import LoaderSplit, Split, own_part
from autoprune.training import evaluation
from autoprune.training.evaluation import evaluate, recalibrate_
from autoprune.training.finetune import finetune_
from autoprune.training.schedule import Schedule
from tests.tiny import tiny_data, tiny_net

finetune = importlib.import_module("autoprune.training.finetune")  # the room's `finetune` is the function
ROOT = Path(__file__).resolve().parents[2]
RANK = """
import sys, torch
from autoprune.training import distributed
from tests.training.test_distributed import one_trial
with distributed.process_group() as rank, distributed.shared_work():
    assert distributed.rank_and_size() == (rank, 2)
    found = one_trial(sys.argv[2])
    torch.save(found, f"{sys.argv[1]}/{rank}.pt")
    try:
        distributed.from_rank_zero(lambda: (_ for _ in ()).throw(distributed.AutopruneError("stop", "now")))
    except distributed.AutopruneError as error:
        assert error.message == "stop"
"""


class Pairs(torch.utils.data.Dataset[Any]):
    """The tiny training data, one sample at a time, with a random change that belongs to the sample."""

    def __init__(self) -> None:
        ((self.inputs, self.targets),) = tiny_data().train.batches(1000)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.inputs[index] + 0.01 * torch.randn(1), self.targets[index]


def one_trial(kind: str) -> dict[str, Any]:
    """Fine-tune with a teacher, recalibrate and evaluate; the batch is not divisible by two."""
    finetune.uses_bf16 = lambda device: False  # rounding would hide what is compared
    data = tiny_data()
    split: Split = data.train if kind == "tensors" else LoaderSplit(Pairs())
    model, settings = tiny_net(), Finetune(batch_size=37)
    schedule = Schedule(lr=0.05, decay="cosine", warmup=0.1)
    curve = finetune_(
        model, split, schedule=schedule, settings=settings, epochs=1.5, seed=3, teacher=tiny_net().eval()
    )
    tuned = evaluate(model, data.search, batch_size=33)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    recalibrate_(model, split, num_batches=5, batch_size=37, seed=1)
    return {
        "weights": weights, "norms": model.bn2.state_dict(), "top1": tuned.top1, "loss": tuned.loss,
        "correct": tuned.correct, "curve": [r.train_loss for r in curve],
        "own": model.bn1.__dict__.get("forward"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["tensors", "loader"])
def test_two_ranks_give_what_one_process_gives(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(finetune, "uses_bf16", finetune.uses_bf16)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "--no-python", sys.executable, "-c", RANK, str(tmp_path), kind,
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = one_trial(kind)
    torch.set_num_threads(threads)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name]), "ranks must not drift apart"
        torch.testing.assert_close(weight, alone["weights"][name], rtol=1e-2, atol=2e-3)
    for name, buffer in first["norms"].items():
        torch.testing.assert_close(buffer, alone["norms"][name], rtol=1e-2, atol=2e-3)
    assert first["curve"] == pytest.approx(alone["curve"], rel=1e-4)
    assert first["top1"] == second["top1"] == pytest.approx(alone["top1"], abs=0.011)
    assert first["loss"] == pytest.approx(alone["loss"], rel=1e-3)
    assert first["own"] is None, "the norms are left as they were found"


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
    assert evaluation.EVAL_BATCH > 0
