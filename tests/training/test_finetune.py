from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.config import Baseline, Finetune
from autoprune.errors import TrialError, UsageError
from autoprune.tasks import Task
from autoprune.training.finetune import (
    EpochRecord,
    distillation_loss,
    distillation_weight,
    evaluate,
    finetune_,
    recalibrate_,
    resolve_device,
    train_baseline_,
    uses_bf16,
)
from autoprune.training.schedule import Schedule
from tests.clock import Clock
from tests.tiny import TinyNet, tiny_net, tiny_split

SCHEDULE = Schedule(lr=0.05, decay="cosine")
SETTINGS = Finetune(batch_size=64)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(left[name], right[name]) for name in left)


def trained(model: Any = None, **changes: Any) -> tuple[TinyNet, list[EpochRecord]]:
    model = model or tiny_net()
    how: dict[str, Any] = {"schedule": SCHEDULE, "settings": SETTINGS, "epochs": 2, "seed": 0}
    records = finetune_(model, tiny_split(320, 1), **(how | changes))
    return model, records


def test_training_learns_and_says_how() -> None:
    model, records = trained(epochs=4.5)
    assert [r.epoch for r in records] == pytest.approx([1, 2, 3, 4, 4.4], abs=0.05)
    assert records[-1].train_loss < records[0].train_loss
    assert records[-1].lr < 0.01
    assert all(r.images_per_s > 0 for r in records)
    result = evaluate(model, tiny_split(200, 2))
    assert result.top1 > 0.5, "twice what guessing gets; it has above 0.8"
    assert result.correct is not None
    assert result.correct.mean() == result.top1
    assert len(result.correct) == result.num_samples == 200


def test_the_same_seed_gives_the_same_bits() -> None:
    teacher = tiny_net()
    first, _ = trained(teacher=teacher)
    second, _ = trained(teacher=teacher)
    other, _ = trained(teacher=teacher, seed=1)
    assert same(weights(first), weights(second))
    assert not same(weights(first), weights(other))


def test_mode_layout_and_random_state_are_left_as_found() -> None:
    model, teacher = tiny_net(), tiny_net()
    model.train()
    model.bn1.eval()
    teacher.train()
    before, state = weights(teacher), torch.get_rng_state()
    finetune_(
        model, tiny_split(64, 1), schedule=SCHEDULE, settings=SETTINGS, epochs=1, seed=0, teacher=teacher
    )
    evaluate(model, tiny_split(64, 2))
    recalibrate_(model, tiny_split(64, 1), num_batches=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert (model.training, model.bn1.training, model.bn2.training, teacher.training) == (
        True,
        False,
        True,
        True,
    )
    assert all(p.is_contiguous() and p.grad is None for p in model.parameters())
    assert same(before, weights(teacher)), "the teacher learns nothing"


def test_evaluation_leaves_the_model_as_it_was_also_when_it_fails() -> None:
    model = tiny_net().train()
    before = weights(model)
    with pytest.raises(UsageError, match="no table of logits"):
        evaluate(nn.Sequential(model, nn.Flatten(0)), tiny_split(10, 1))
    assert model.training
    assert same(before, weights(model))


def test_the_teacher_matters() -> None:
    alone, _ = trained()
    taught, _ = trained(teacher=tiny_net())
    off, _ = trained(teacher=tiny_net(), settings=replace(SETTINGS, distill=0.0))
    assert not same(weights(alone), weights(taught))
    assert same(weights(alone), weights(off))


def test_the_average_of_the_weights_is_given_and_follows_them() -> None:
    steady = Schedule(lr=0.3, decay="linear", final=0.99, warmup=0.0)
    last, _ = trained(schedule=steady)
    mean, _ = trained(schedule=steady, settings=replace(SETTINGS, ema=0.5))
    again, _ = trained(schedule=steady, settings=replace(SETTINGS, ema=0.5))
    off, _ = trained(schedule=steady, settings=replace(SETTINGS, ema=0.01))
    assert same(weights(last), weights(off)), "an average over less than one step is the last step"
    assert not same(weights(last), weights(mean))
    assert same(weights(mean), weights(again))
    start, norms = tiny_net(), []
    for model in (last, mean):
        pairs = zip(model.parameters(), start.parameters(), strict=True)
        norms.append(sum(float((a - b).detach().square().sum()) for a, b in pairs))
    assert norms[1] < norms[0], "the average lags behind"


def test_a_teacher_is_listened_to_as_far_as_it_knows_better() -> None:
    assert float(distillation_weight(torch.tensor(2.0), torch.tensor(0.5))) == pytest.approx(0.75)
    assert float(distillation_weight(torch.tensor(0.5), torch.tensor(2.0))) == 0
    assert float(distillation_weight(torch.tensor(0.0), torch.tensor(0.0))) == 1, (
        "no loss at all is as far ahead as one can be"
    )
    alone, _ = trained()
    ignorant = tiny_net()
    with torch.no_grad():
        ignorant.linear.weight.mul_(-50)
    held_back, _ = trained(teacher=ignorant)
    assert same(weights(alone), weights(held_back)), "it is never ahead, so it is never followed"


def test_a_loss_of_ones_own_is_all_there_is() -> None:
    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(output, F.one_hot(target, 4).float())

    asked = []
    teacher = tiny_net()
    teacher.register_forward_hook(lambda *given: asked.append(1))
    with_teacher, _ = trained(teacher=teacher, task=Task(loss=loss))
    alone, _ = trained(task=Task(loss=loss))
    assert not asked
    assert same(weights(with_teacher), weights(alone)), "regressed values are no logits to learn from"


def test_distillation_is_zero_for_equal_outputs_and_scales_with_temperature() -> None:
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    assert distillation_loss(logits, logits, 3.0).item() == pytest.approx(0, abs=1e-6)
    other = logits.roll(1, 0)
    p, q = (logits / 2).softmax(1), (other / 2).softmax(1)
    by_hand = 4 * (q * (q / p).log()).sum(1).mean()
    assert distillation_loss(logits, other, 2.0).item() == pytest.approx(by_hand.item(), rel=1e-5)


def test_a_schedule_hurries_to_its_end_when_time_gets_short(clock: Clock) -> None:
    """Batches of a second each, of which the schedule wants 500 and the time allows 100."""
    _, records = trained(epochs=100, seconds=100.0, model=clock.slow_(tiny_net(), 1.0))
    assert records[-1].epoch == pytest.approx(100 / 5, abs=0.5), "the time was used, and no more"
    assert records[-1].lr < 0.01 * SCHEDULE.lr, "it came to its end"
    halfway = records[len(records) // 2].lr / SCHEDULE.lr
    assert 0.4 < halfway < 0.6, "evenly, and not all at once"


@pytest.mark.parametrize("seconds", [12.0, 600.0])
def test_a_schedule_that_has_the_time_does_not_hurry(seconds: float, clock: Clock) -> None:
    free, _ = trained(model=clock.slow_(tiny_net(), 1.0))
    limited, records = trained(seconds=seconds, model=clock.slow_(tiny_net(), 1.0))
    assert same(weights(free), weights(limited))
    assert records[-1].epoch == 2
    assert [r.images_per_s for r in records] == pytest.approx([64.0, 64.0])


def test_a_share_of_the_data_is_an_epoch() -> None:
    _, records = trained(settings=Finetune(batch_size=32, share=0.5), epochs=1)
    whole = tiny_split(320, 1)
    assert whole.subset(0.5, seed=0).num_batches(32) == 5
    assert records[-1].epoch == 1


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_fails_the_trial(loss: float) -> None:
    model = tiny_net().train()
    with pytest.raises(TrialError, match="diverged"):
        finetune_(model, tiny_split(128, 1), schedule=SCHEDULE, settings=SETTINGS, epochs=1, seed=0,
                  task=Task(loss=lambda output, _: output.sum() * loss))  # fmt: skip
    assert model.training


def test_nothing_to_train_is_refused_and_frozen_parameters_stay() -> None:
    model = tiny_net()
    model.conv1.weight.requires_grad_(False)
    before = weights(model)
    finetune_(model, tiny_split(128, 1), schedule=SCHEDULE, settings=SETTINGS, epochs=1, seed=0)
    after = weights(model)
    assert torch.equal(before["conv1.weight"], after["conv1.weight"])
    assert not torch.equal(before["conv2.weight"], after["conv2.weight"])
    model.requires_grad_(False)
    with pytest.raises(UsageError, match="no parameter of the model requires a gradient"):
        finetune_(model, tiny_split(128, 1), schedule=SCHEDULE, settings=SETTINGS, epochs=1, seed=0)


def test_label_smoothing_cannot_go_with_an_own_loss() -> None:
    with pytest.raises(UsageError, match="label_smoothing cannot take effect"):
        trained(settings=Finetune(label_smoothing=0.1), task=Task(loss=lambda output, _: output.sum()))


def test_recalibration_gives_the_statistics_of_the_data() -> None:
    model, split = tiny_net(), tiny_split(256, 1)
    before = weights(model)
    recalibrate_(model, split, num_batches=2, batch_size=128)
    seen = torch.cat([model.conv1(x) for x, _ in split.batches(128)])
    assert torch.allclose(model.bn1.running_mean, seen.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(model.bn1.running_var, seen.var((0, 2, 3)), rtol=0.02)
    changed = {n for n, t in weights(model).items() if not torch.equal(t, before[n])}
    assert changed == {
        n for n in before if n.endswith(("running_mean", "running_var", "num_batches_tracked"))
    }
    assert model.bn1.momentum == 0.1


def test_recalibration_without_batch_norm_does_nothing() -> None:
    recalibrate_(nn.Flatten(), tiny_split(8, 1), num_batches=5)


def test_an_own_score_stands_for_top1() -> None:
    model, split = tiny_net(), tiny_split(40, 1)
    result = evaluate(model, split, task=Task(score=lambda m, s, d: 0.25))
    assert (result.top1, result.correct, result.num_samples) == (0.25, None, 40)
    assert math.isnan(result.loss)
    own = Task(score=lambda m, s, d: 0.25, loss=lambda output, _: output.mean() * 0 + 2)
    with_loss = evaluate(model, split, task=own)
    assert with_loss.loss == 2
    with pytest.raises(UsageError, match=r"returned 25\.0"):
        evaluate(model, split, task=Task(score=lambda m, s, d: 25.0))


def test_auxiliary_heads_are_left_aside() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = tiny_net()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            logits = self.net(x)
            return logits, -logits

    split = tiny_split(64, 2)
    assert evaluate(TwoHeads(), split).top1 == evaluate(tiny_net(), split).top1


def test_a_baseline_is_trained_from_scratch() -> None:
    model = tiny_net()
    records = train_baseline_(model, tiny_split(320, 1), Baseline(epochs=6, lr=0.1, batch_size=64), seed=0)
    assert len(records) == 6
    assert evaluate(model, tiny_split(200, 2)).top1 > 0.5, "twice what guessing gets; it has above 0.8"


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for name in ("gpu", "cuda:99"):
        with pytest.raises(UsageError, match=f"no device '{name}'"):
            resolve_device(name)


@pytest.mark.parametrize(
    ("instructions", "does"), [([], False), (["avx512_bf16"], True), (["amx_bf16", "amx_int8"], True)]
)
def test_bfloat16_is_for_processors_that_multiply_it(
    instructions: list[str], does: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(instructions, True))
    assert uses_bf16(torch.device("cpu")) is does


def test_every_pass_sees_other_augmentations() -> None:
    model = tiny_net()
    seen: list[Tensor] = []
    model.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    twin = copy.deepcopy(model)
    finetune_(twin, tiny_split(64, 1), schedule=SCHEDULE, settings=SETTINGS, epochs=2, seed=0)
    assert not torch.equal(seen[0], seen[1])
