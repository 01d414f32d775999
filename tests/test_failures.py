"""A whole run in which trials fail: each is recorded, the round goes on; if all fail alike, it stops."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoprune import events as ev
from autoprune.config import Control, Protection, Search, Study
from autoprune.data.sources import Data
from autoprune.data.splits import LoaderSplit, Split
from autoprune.errors import RunError
from autoprune.pipeline.run import run
from autoprune.training.evaluation import evaluate
from tests.tiny import tiny_data, tiny_study, trained_net

PLAIN = Protection(plain=True)
WAYS = {
    "no number": "diverged",
    "too much memory": "out of memory",
    "a broken sample": "OSError: cannot read sample 17",
    "a broken score": "ZeroDivisionError: division by zero",
}


class Trouble:
    """What is broken at this moment; the study's own functions ask."""

    def __init__(self) -> None:
        self.now = ""

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        if self.now == "too much memory":
            torch.empty(1 << 60)  # torch's own error, whatever its words are
        loss = nn.functional.cross_entropy(output, target)
        return loss * float("nan") if self.now == "no number" else loss

    def score(self, model: nn.Module, split: Split, device: object) -> float:
        if self.now == "a broken score":
            1 / 0  # noqa: B018 - a user's mistake
        return evaluate(model, split, device=str(device)).top1

    def data(self) -> Data:
        data = tiny_data()
        return replace(data, train=LoaderSplit(Samples(self, data.train)))

    def study(self, **changes: object) -> Study:
        return tiny_study(
            model=trained_net, baseline=None, data=self.data, loss=self.loss, evaluate=self.score,
            target="macs=0.7", max_drop=30.0, control=Control(first_ceiling=0.5), **changes,
        )  # fmt: skip


class Samples(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The training data, of which one sample cannot be read while that is the trouble."""

    def __init__(self, trouble: Trouble, split: Split) -> None:
        self.trouble = trouble
        ((self.inputs, self.targets),) = split.batches(1000)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 17 and self.trouble.now == "a broken sample":
            raise OSError("cannot read sample 17")
        return self.inputs[index], self.targets[index]


@contextmanager
def during_trials(trouble: Trouble, ways: list[str]) -> Iterator[ev.OnEvent]:
    """One trouble for each trial of the first round, the last one for all that follow."""

    def listen(event: ev.Event) -> None:
        if isinstance(event, ev.TrialStarted) and event.round == 1:
            trouble.now = ways[min(event.trial, len(ways) - 1)]
        elif isinstance(event, ev.TrialFinished):
            trouble.now = ""

    yield listen
    trouble.now = ""


def test_a_round_goes_on_after_every_kind_of_failure(tmp_path: Path) -> None:
    trouble = Trouble()
    study = trouble.study(search=Search(trials=6, epochs=0.3, criteria=("l1",)), budget="epochs=8")
    with during_trials(trouble, [*WAYS, ""]) as listen:
        result = run(study, out=tmp_path / "r", protection=PLAIN, on_event=listen)
    trials = result.record.rounds[0].trials
    assert [t.state for t in trials] == ["failed"] * 4 + ["complete"] * 2
    for trial, words in zip(trials, WAYS.values(), strict=False):
        assert words in trial.failure
        assert {"prune_rate", "lr", "decay"} <= trial.params.keys()
    assert result.reached
    assert result.record.rounds[0].action in ("promote", "finish")


@pytest.mark.parametrize("way", WAYS)
def test_a_round_whose_trials_all_fail_alike_stops_the_run_and_is_tried_again(
    way: str, tmp_path: Path
) -> None:
    trouble = Trouble()
    study = trouble.study(search=Search(trials=2, epochs=0.3, criteria=("l1",)), budget="epochs=4")
    with (
        during_trials(trouble, [way]) as listen,
        pytest.raises(RunError, match="all trials of round 1 failed in the same way") as caught,
    ):
        run(study, out=tmp_path / "r", protection=PLAIN, on_event=listen)
    assert WAYS[way] in caught.value.message
    assert "--resume" in caught.value.hint
    assert not list((tmp_path / "r").glob("model*"))
    again = run(study, out=tmp_path / "r", protection=PLAIN, resume=True)
    assert again.reached
    assert all(not t.failure for t in again.record.rounds[0].trials), "the round in vain is forgotten"
