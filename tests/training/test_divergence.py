"""What a torn-apart training is, told by numbers: no test here waits for an arithmetic to overflow."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from autoprune.config import Finetune
from autoprune.errors import TrialError
from autoprune.tasks import Task
from autoprune.training.divergence import FAR, LossWatch, check_losses, check_weights, loss_of_zeros
from autoprune.training.finetune import EpochRecord, finetune_
from autoprune.training.schedule import Schedule
from tests.tiny import tiny_net, tiny_split

CHANCE = math.log(4)
HUGE = 1e6 * CHANCE


def verdict(losses: list[float], *, level: float = CHANCE) -> str | None:
    """Why a schedule with these losses, one a step, has diverged; None if it has not."""
    watch = LossWatch(len(losses), torch.device("cpu"))
    for step, loss in enumerate(losses):
        watch.see(torch.tensor(loss), len(losses) - step)
    try:
        check_losses(watch, lambda: level, 0.1)
    except TrialError as error:
        return error.message
    return None


@pytest.mark.parametrize(
    "losses",
    [
        [CHANCE] + 9 * [HUGE],
        [CHANCE] * 5 + [HUGE] * 5,
        [CHANCE, HUGE],
        [CHANCE] + 9 * [1.01 * FAR * CHANCE],
        [1e-4] + 9 * [1.01 * FAR * CHANCE],
    ],
    ids=["at once", "half way", "two steps", "just far enough", "from almost nothing"],
)
def test_a_loss_that_stays_far_above_an_untrained_network_is_divergence(losses: list[float]) -> None:
    told = verdict(losses)
    assert told is not None
    assert told.startswith("training diverged: at a learning rate of up to 0.1 the loss stayed above ")


@pytest.mark.parametrize(
    "losses",
    [
        [CHANCE] + 4 * [HUGE] + 5 * [CHANCE],
        [CHANCE] + 8 * [HUGE] + [CHANCE],
        [CHANCE] + 9 * [0.99 * FAR * CHANCE],
        [1e-4] + 9 * [0.99 * FAR * CHANCE],
        [HUGE] + 9 * [2 * HUGE],
        [HUGE],
        [CHANCE],
    ],
    ids=["a spike", "back at the last step", "poor", "poor from almost nothing", "broken by pruning",
         "one step", "one step, healthy"],
)  # fmt: skip
def test_a_poor_training_is_a_result(losses: list[float]) -> None:
    assert verdict(losses) is None


def test_the_scale_of_a_loss_does_not_matter() -> None:
    torn = [1.0] + 9 * [1.01 * FAR]
    for scale in (1e-12, 1.0, 1e12):
        assert verdict([scale * loss for loss in torn], level=scale)
        assert verdict([scale * loss / 2 for loss in torn], level=scale) is None


def test_a_loss_below_zero_is_judged_by_its_size() -> None:
    assert verdict([-2.0] + 9 * [-5.0], level=1.0) is None
    assert verdict([-2.0] + 9 * [1.99 * FAR], level=1.0) is None
    assert verdict([-2.0] + 9 * [2.01 * FAR], level=1.0)


def test_where_zeros_have_no_loss_the_first_step_alone_is_the_measure() -> None:
    torn = [CHANCE] + 9 * [HUGE]
    for level in (math.nan, math.inf):
        assert verdict(torn, level=level)


def test_a_healthy_training_never_asks_for_the_loss_of_zeros() -> None:
    watch = LossWatch(3, torch.device("cpu"))
    for left, loss in ((3, 1.0), (2, 5.0), (1, 0.5)):
        watch.see(torch.tensor(loss), left)
    check_losses(watch, lambda: pytest.fail("it was asked for"), 0.1)


def test_steps_that_are_hurried_through_count_by_the_schedule() -> None:
    """A training that is short of time makes two steps and has gone through a hundred."""
    watch = LossWatch(100, torch.device("cpu"))
    for left, loss in ((100, CHANCE), (60, CHANCE), (40, HUGE), (1, HUGE)):
        watch.see(torch.tensor(loss), left)
    with pytest.raises(TrialError):
        check_losses(watch, lambda: CHANCE, 0.1)


def test_zeros_for_outputs_are_what_a_network_that_knows_nothing_gives() -> None:
    model, state = tiny_net(), torch.get_rng_state()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch = next(tiny_split(64, 1).batches(64))

    def objective(network: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(network(inputs), targets)

    assert loss_of_zeros(model, batch, objective) == pytest.approx(CHANCE)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def scaled(scale_of_step: Callable[[int], float]) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy of outputs that are blown up by a factor which depends on the training step."""
    step = 0

    def loss(output: Tensor, target: Tensor) -> Tensor:
        nonlocal step
        step += output.requires_grad
        return F.cross_entropy(output * scale_of_step(step), target)

    return loss


def tuned(loss: Callable[[Tensor, Tensor], Tensor]) -> list[EpochRecord]:
    """Twelve steps at a rate that changes nothing: the numbers alone are what is judged."""
    return finetune_(
        tiny_net(), tiny_split(384, 1), schedule=Schedule(lr=1e-12, decay="linear"), epochs=2, seed=0,
        task=Task(loss=loss), settings=Finetune(batch_size=64, optimizer="sgd", weight_decay=0.0),
    )  # fmt: skip


def test_a_training_whose_outputs_blow_up_fails_with_finite_numbers() -> None:
    with pytest.raises(TrialError, match="diverged: at a learning rate of up to 1e-12 the loss stayed above"):
        tuned(scaled(lambda step: 1e6 if step > 5 else 1.0))


def test_a_training_whose_outputs_come_back_ends() -> None:
    assert len(tuned(scaled(lambda step: 1e6 if 1 < step < 7 else 1.0))) == 2


def test_weights_that_are_not_finite_are_divergence_and_frozen_ones_are_not_looked_at() -> None:
    model = tiny_net()
    model.register_buffer("mask", torch.full((4, 4), -math.inf))
    model.conv1.weight.requires_grad_(False).fill_(math.nan)
    check_weights(model, 0.1)
    for broken in (model.conv2.weight.detach(), model.bn2.running_var):
        value, broken.view(-1)[3] = broken.view(-1)[3].clone(), math.inf
        with pytest.raises(TrialError, match=r"up to 0\.1 the weights are no longer finite"):
            check_weights(model, 0.1)
        broken.view(-1)[3] = value
    check_weights(model, 0.1)


def test_weights_are_looked_at_after_the_last_step() -> None:
    """The last step's loss is finite; what the step does to the weights shows in no loss any more."""
    model = tiny_net()
    steps = 0

    def spoil(gradient: Tensor) -> Tensor:
        nonlocal steps
        steps += 1
        return gradient * math.inf if steps == 6 else gradient

    model.linear.bias.register_hook(spoil)
    with pytest.raises(TrialError, match="the weights are no longer finite"):
        finetune_(
            model, tiny_split(384, 1), schedule=Schedule(lr=0.01, decay="linear"), epochs=1, seed=0,
            settings=Finetune(batch_size=64),
        )  # fmt: skip
    assert steps == 6
