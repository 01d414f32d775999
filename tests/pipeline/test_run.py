"""The whole path on a network and data that train in a second; nothing is faked."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from torch import nn

from autoprune import events as ev
from autoprune.artifact.reader import open_artifact
from autoprune.config import Baseline, Control, Protection, Search
from autoprune.data.splits import Split
from autoprune.errors import ArtifactError, ConfigError, RunError, UnreachableError, UsageError
from autoprune.location import ARTIFACTS, DATABASE
from autoprune.pipeline.delivery import is_slower, latency_share
from autoprune.pipeline.preflight import forecast_run, prepare
from autoprune.pipeline.run import run
from autoprune.record import RunRecord, RunResult
from autoprune.search.history import CHECKPOINT, read_run
from autoprune.storage.run_store import RunStore, completed_trials
from autoprune.training.evaluation import evaluate
from autoprune.training.finetune import train_baseline_
from tests.clock import Clock
from tests.tiny import Scripted, TinyNet, tiny_data, tiny_net, tiny_study

PLAIN = Protection(plain=True)


def trained() -> TinyNet:
    model = tiny_net()
    train_baseline_(model, tiny_data().train, Baseline(epochs=6, batch_size=64), seed=0)
    return model


def guessing() -> TinyNet:
    model = tiny_net()
    torch.nn.init.zeros_(model.linear.weight)
    return model


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, list[ev.Event]]:
    events: list[ev.Event] = []
    result = run(
        tiny_study(), out=tmp_path_factory.mktemp("runs") / "tiny", protection=PLAIN, on_event=events.append
    )
    return result, events


def test_a_run_reaches_its_target_inside_the_floor(finished: tuple[RunResult, list[ev.Event]]) -> None:
    result, _ = finished
    assert result.reached
    assert result.stopped_by == "target"
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.after.macs >= 0.45 * result.before.macs
    assert result.after.search_top1 >= result.record.floor
    assert result.after.params < result.before.params
    assert result.after.latency_ms is not None


def test_what_is_delivered_computes_what_was_measured(finished: tuple[RunResult, list[ev.Event]]) -> None:
    from autoprune import load

    result, _ = finished
    model = load(result.model_file)
    assert sum(p.numel() for p in model.parameters()) == result.after.params
    found = evaluate(model, tiny_data().test)
    assert found.top1 == pytest.approx(
        result.after.top1, abs=0.011
    )  # a sample or two may lie between two classes


def test_the_record_tells_the_whole_story(finished: tuple[RunResult, list[ev.Event]]) -> None:
    record = finished[0].record
    assert [r.number for r in record.rounds] == list(range(1, len(record.rounds) + 1))
    assert all(r.reason and r.sensitivity and r.seconds > 0 for r in record.rounds)
    assert record.rounds[-1].action == "finish"
    for round_ in record.rounds:
        assert len(round_.trials) == round_.planned_trials == 2
        assert sum(t.promoted for t in round_.trials) == 1
        assert all(t.recovered for t in round_.trials if t.promoted)
        for trial in round_.trials:
            assert trial.rungs[-1].epochs == trial.epochs[-1].epoch <= round_.epochs + 0.1
            assert trial.rungs[-1].top1 == trial.top1
            assert trial.recovered or len(trial.rungs) > 1
    assert {t.stage for t in record.timings} == {"baseline", "analysis", "search", "finish"}
    assert record.difference is not None
    assert record.difference.low_pp <= record.difference.delta_pp <= record.difference.high_pp


def needed_checkpoints(store: RunStore, record: RunRecord) -> set[str]:
    """What a finished run keeps: the original, what each round promoted, and what was delivered."""
    needed = {completed_trials(store.study(n))[0].user_attrs[CHECKPOINT] for n in (0, "final")}  # type: ignore[arg-type]
    for round_ in record.rounds:
        attempt = store.study(round_.number)
        assert attempt is not None
        needed |= {attempt.trials[t.number].user_attrs[CHECKPOINT] for t in round_.trials if t.promoted}
    return needed


def test_only_needed_models_are_kept(finished: tuple[RunResult, list[ev.Event]]) -> None:
    result, _ = finished
    assert sum(t.promoted for r in result.record.rounds for t in r.trials) >= 2
    with closing(RunStore(result.out, "tiny")) as store:
        assert {p.name for p in (result.out / ARTIFACTS).iterdir()} == needed_checkpoints(
            store, result.record
        )


def test_listeners_hear_everything_in_order(finished: tuple[RunResult, list[ev.Event]]) -> None:
    result, events = finished
    kinds = [type(e) for e in events]
    assert kinds[0] is ev.RunStarted
    assert kinds[-1] is ev.RunFinished
    rounds = len(result.record.rounds)
    assert kinds.count(ev.RoundStarted) == kinds.count(ev.RoundDecided) == rounds
    assert kinds.count(ev.TrialStarted) == kinds.count(ev.TrialFinished) == 2 * rounds
    assert kinds.index(ev.BaselineMeasured) < kinds.index(ev.RoundStarted)


def test_the_epoch_budget_is_kept(finished: tuple[RunResult, list[ev.Event]]) -> None:
    used = [e for e in finished[1] if isinstance(e, ev.BudgetUsed)]
    record = finished[0].record
    tuned = sum(t.epochs[-1].epoch for r in record.rounds for t in r.trials)
    assert record.tuning is not None
    assert used[-1].epochs == pytest.approx(tuned + record.tuning.epochs[-1].epoch, abs=0.2), "all is counted"
    assert tuned < used[-1].epochs <= 40 + 1e-6


def stop_after(kind: type, count: int) -> Callable[[ev.Event], None]:
    seen = []

    def listener(event: ev.Event) -> None:
        seen.append(isinstance(event, kind))
        if sum(seen) == count and seen[-1]:
            raise KeyboardInterrupt

    return listener


STOPS = (
    (ev.StageProgress, 1), (ev.TrialStarted, 1), (ev.EpochFinished, 1), (ev.TrialFinished, 1),
    (ev.RoundDecided, 1), (ev.TrialStarted, 2), (ev.RunFinished, 1),
)  # fmt: skip


def test_a_run_that_is_stopped_again_and_again_ends_the_same(
    finished: tuple[RunResult, list[ev.Event]], tmp_path: Path
) -> None:
    out = tmp_path / "tiny"
    for kind, count in STOPS:
        resume = (out / DATABASE).exists()
        with pytest.raises(KeyboardInterrupt):
            run(tiny_study(), out=out, protection=PLAIN, resume=resume, on_event=stop_after(kind, count))
    result, expected = run(tiny_study(), out=out, protection=PLAIN, resume=True), finished[0]
    assert plain(result) == plain(expected)
    assert weights_digest(result) == weights_digest(expected)
    assert sum(t.state == "failed" for r in result.record.rounds for t in r.trials) >= 3


def test_a_round_that_was_killed_while_it_was_made_is_made_again(
    finished: tuple[RunResult, list[ev.Event]], tmp_path: Path
) -> None:
    """A study and what it knows are several commits: a kill between them leaves one that knows nothing."""
    out = tmp_path / "tiny"
    with pytest.raises(KeyboardInterrupt):
        run(tiny_study(), out=out, protection=PLAIN, on_event=stop_after(ev.BaselineMeasured, 1))
    with closing(RunStore(out, "tiny")) as store:
        optuna.create_study(study_name="tiny/round-01", storage=store.storage, direction="maximize")
        assert not list(store.rounds())
    result = run(tiny_study(), out=out, protection=PLAIN, resume=True)
    assert weights_digest(result) == weights_digest(finished[0])


def weights_digest(result: RunResult) -> str:
    with open_artifact(result.model_file) as opened:
        return hashlib.sha256(opened.member("model.safetensors")).hexdigest()


def plain(result: RunResult) -> tuple[object, ...]:
    """What does not depend on the clock, or on how often a run was stopped."""
    rounds = [
        (r.ceiling, r.floor, r.action, [(t.params, t.top1) for t in r.trials if t.top1 is not None])
        for r in result.record.rounds
    ]
    after = replace(result.after, latency_ms=None, latency_spread_ms=None)
    return (after, result.message, rounds)


def test_a_budget_that_is_too_small_stops_the_run_and_the_rest_is_encrypted(tmp_path: Path) -> None:
    """Nothing that is pruned comes back, so every trial takes its whole epoch, and two are affordable."""
    scripted = Scripted(lambda share, _: 0.9 if share == 1 else 0.5)
    study = tiny_study(
        budget="epochs=4", search=Search(epochs=1, criteria=("l1",)), loss=scripted.loss,
        evaluate=scripted.score,
    )  # fmt: skip
    result = run(study, out=tmp_path / "r", protection=Protection(passphrase="open sesame"))  # noqa: S106
    assert not result.reached
    assert result.stopped_by == "budget"
    assert "give a larger --budget" in result.message
    assert result.model_file.read_bytes().startswith(b"age-encryption.org/v1")
    assert not (result.out / "model.autoprune").exists()
    spent = sum(t.epochs[-1].epoch for r in result.record.rounds for t in r.trials if t.epochs)
    assert spent == pytest.approx(2)


def test_a_round_for_which_no_budget_was_left_says_nothing_about_the_ceiling(tmp_path: Path) -> None:
    study = tiny_study(budget="epochs=1", search=Search(trials=2, epochs=2))
    result = run(study, out=tmp_path / "r", protection=PLAIN)
    assert result.stopped_by == "budget"
    assert [(r.action, r.trials) for r in result.record.rounds] == [("stop", ())]


def test_an_analysis_that_takes_too_much_of_the_time_is_used_again(tmp_path: Path, clock: Clock) -> None:
    """Of the hour, an evaluation in an analysis takes seven minutes, and elsewhere no time."""
    events: list[ev.Event] = []
    clock.tick = 1e-4

    def score(model: nn.Module, split: Split, device: str) -> float:
        stages = [e.stage for e in events if isinstance(e, ev.StageStarted)]
        clock.advance(420.0 if stages and stages[-1] == "analysis" else 0.0)
        return evaluate(model, split, device=device).top1

    study = tiny_study(budget="1h", search=Search(trials=1, epochs=2), evaluate=score)
    rounds = run(study, out=tmp_path / "r", protection=PLAIN, on_event=events.append).record.rounds
    assert any(isinstance(e, ev.Note) and "used again" in e.message for e in events)
    assert rounds[1].sensitivity == rounds[0].sensitivity
    assert rounds[1].started_from == 1


def test_an_impossible_floor_delivers_the_deepest_model_inside_it(tmp_path: Path) -> None:
    """Nothing comes back that lost more than three in ten of its parameters."""
    scripted = Scripted(lambda share, _: 0.9 if share > 0.7 else 0.5)
    study = tiny_study(
        target="macs=0.12", max_drop=0.0, budget="epochs=30", loss=scripted.loss, evaluate=scripted.score,
        search=Search(trials=1, epochs=0.2, criteria=("l1",)),
        control=Control(first_ceiling=0.6, lower_factor=0.1, max_rounds=6),
    )  # fmt: skip
    result = run(study, out=tmp_path / "r", protection=PLAIN)
    assert not result.reached
    assert result.stopped_by == "rounds"
    assert result.after.search_top1 == result.record.floor == 0.9
    assert 0.7 * result.before.params < result.after.params < result.before.params
    assert [r.action for r in result.record.rounds].count("promote") >= 2
    assert "not reached" in result.message
    assert result.report.is_file()


def test_a_trained_network_with_its_own_loss_and_score_is_left_as_it_was(tmp_path: Path) -> None:
    def score(model: torch.nn.Module, split: object, device: str) -> float:
        return evaluate(model, split, device=device).top1 / 2  # type: ignore[arg-type]

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.multi_margin_loss(output, target)

    model = trained()
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    state = torch.get_rng_state()
    study = tiny_study(
        model=model,
        data=tiny_data(),
        baseline=None,
        target="params=0.7",
        evaluate=score,
        loss=loss,
        max_drop=5.0,
    )
    result = run(study, out=tmp_path / "r", protection=PLAIN)
    assert result.reached
    assert result.before.top1 <= 0.5
    assert result.after.params <= 0.7 * result.before.params
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    "changes",
    [
        {"target": "macs=0.001"},
        {"target": "latency=0.001"},
        {"target": "latency=5s"},
        {"max_ratio": 1.0},
        {"target": "params=900000000"},
        {"baseline": None, "model": guessing},
        {"exclude": ("no.such.layer",)},
        {"device": "nonsense"},
        {"model": lambda: "no network"},
        {"search": Search(criteria=("nonsense",))},
        {"max_drop": -1.0},
    ],
)
def test_a_wrong_study_is_refused_before_anything_is_written(
    tmp_path: Path, changes: dict[str, object]
) -> None:
    with pytest.raises(UsageError) as caught:
        run(tiny_study(**changes), out=tmp_path / "r", protection=PLAIN)
    assert caught.value.hint
    assert list(tmp_path.iterdir()) == []


def wide_net() -> TinyNet:
    """As the tiny network, but with enough work that it takes longer than the interpreter."""
    model = tiny_net()
    model.conv1, model.bn1 = torch.nn.Conv2d(1, 64, 3, padding=1, bias=False), torch.nn.BatchNorm2d(64)
    model.conv2, model.bn2 = torch.nn.Conv2d(64, 96, 3, padding=1, bias=False), torch.nn.BatchNorm2d(96)
    model.conv3, model.bn3 = torch.nn.Conv2d(96, 64, 3, padding=1, bias=False), torch.nn.BatchNorm2d(64)
    model.linear = torch.nn.Linear(64 * 4, 4)
    return model


def test_a_latency_is_a_target_and_is_measured_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    study = tiny_study(
        model=wide_net, target="latency=0.7", max_drop=30.0, search=Search(trials=1, epochs=1),
        control=Control(first_ceiling=0.5, max_rounds=3), budget="epochs=6",
    )  # fmt: skip
    result = run(study, out=tmp_path / "r", protection=PLAIN)
    record = result.record
    assert record.target_metric == "latency"
    assert record.target_share == pytest.approx(0.7)
    assert result.after.macs < result.before.macs
    share, spread = latency_share(result.before, result.after)
    told = f"measured {100 * share:.1f} % of the original's latency (spread {100 * spread:.1f} %)"
    assert told in result.message
    assert "predicted" in result.message
    assert not result.reached or share - spread <= 0.7
    assert any(p.name.startswith("latency-") for p in (tmp_path / "cache" / "autoprune").iterdir())
    shares = [t.cost_share for r in record.rounds for t in r.trials]
    assert all(s is not None and 0 < s < 1.5 for s in shares)


@pytest.mark.parametrize(
    ("share", "spread", "misses"), [(0.69, 0.01, False), (0.73, 0.04, False), (0.73, 0.02, True)]
)
def test_a_latency_misses_its_target_by_more_than_the_spread(
    finished: tuple[RunResult, list[ev.Event]], share: float, spread: float, misses: bool
) -> None:
    before = replace(finished[0].before, latency_ms=10.0, latency_spread_ms=0.0)
    after = replace(before, latency_ms=10 * share, latency_spread_ms=10 * spread)
    assert is_slower(0.7, before, after) == misses


def test_bounds_hold_over_the_whole_run(tmp_path: Path) -> None:
    study = tiny_study(max_ratio=0.4, min_keep=8, target="macs=0.45", control=Control(first_ceiling=0.3))
    result = run(study, out=tmp_path / "r", protection=PLAIN)
    assert len([r for r in result.record.rounds if r.action in ("promote", "finish")]) >= 2
    widths = result.after.widths
    assert all(widths[n] >= max(8, 0.6 * w) for n, w in result.before.widths.items() if n != "linear")


def test_the_reasons_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(UnreachableError, match="cannot be reached"):
        prepare(tiny_study(target="macs=0.001"))
    with pytest.raises(UsageError, match="no better than guessing"):
        prepare(tiny_study(baseline=None, model=guessing))
    with pytest.raises(ConfigError, match="criteria"):
        prepare(tiny_study(search=Search(criteria=("nonsense",))))


def test_stopping_before_the_original_is_measured_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tiny_study(), out=tmp_path / "r", protection=PLAIN, on_event=stop_after(ev.StageProgress, 1))
    assert list(tmp_path.iterdir()) == []


def test_a_baseline_that_does_not_learn_stops_the_run(tmp_path: Path) -> None:
    study = tiny_study(model=guessing, baseline=Baseline(epochs=0.01, lr=1e-9, batch_size=64))
    with pytest.raises(RunError, match="after training"):
        run(study, out=tmp_path / "r", protection=PLAIN)


def test_an_existing_folder_is_never_overwritten(
    finished: tuple[RunResult, list[ev.Event]], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="never overwritten") as caught:
        prepare(tiny_study(), out=finished[0].out)
    assert "--resume" in caught.value.hint
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file"):
        with pytest.raises(UsageError, match="never overwritten"):
            prepare(tiny_study(), out=out)


class Undeliverable(nn.Module):
    """Traces with real values, but no exporter takes a branch on them."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Negates outputs of bright images."""
        return self.inner(x) if x.mean().item() > 1e9 else -self.inner(x)


def test_a_network_that_cannot_be_exported_is_refused_before_training(tmp_path: Path) -> None:
    study = tiny_study(model=Undeliverable(trained()))
    with pytest.raises(UsageError, match="could not be delivered"):
        run(study, out=tmp_path / "r", protection=PLAIN)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        prepare(tiny_study(), out=tmp_path / "file" / "run")


def test_resuming_wants_the_same_run(finished: tuple[RunResult, list[ev.Event]], tmp_path: Path) -> None:
    out = finished[0].out
    (tmp_path / "mine").touch()
    with pytest.raises(UsageError, match="never overwritten"):
        run(tiny_study(), out=tmp_path, resume=True, protection=PLAIN)
    with pytest.raises(UsageError, match="another max_drop"):
        run(tiny_study(max_drop=3.0), out=out, resume=True, protection=PLAIN)
    data = tiny_data()
    other = replace(data, search=data.search.take(np.arange(100)))
    with pytest.raises(UsageError, match="data are not those"):
        run(tiny_study(data=lambda: other), out=out, resume=True, protection=PLAIN)


def test_resuming_refuses_other_weights(tmp_path: Path) -> None:
    model = trained()
    study = tiny_study(model=model, baseline=None)
    out = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt):
        run(study, out=out, protection=PLAIN, on_event=stop_after(ev.RoundStarted, 1))
    with torch.no_grad():
        model.conv1.weight.mul_(1.01)
    with pytest.raises(UsageError, match="weights are not those"):
        run(study, out=out, resume=True, protection=PLAIN)


def test_a_damaged_checkpoint_stops_the_run(tmp_path: Path) -> None:
    out = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt):
        run(tiny_study(), out=out, protection=PLAIN, on_event=stop_after(ev.RoundStarted, 1))
    baseline = next((out / ARTIFACTS).iterdir())
    baseline.write_bytes(baseline.read_bytes()[:-1] + b"x")
    with pytest.raises(ArtifactError, match="damaged"):
        run(tiny_study(), out=out, resume=True, protection=PLAIN)


def test_an_unfinished_run_can_be_reported(tmp_path: Path) -> None:
    out = tmp_path / "r"
    with pytest.raises(KeyboardInterrupt):
        run(tiny_study(), out=out, protection=PLAIN, on_event=stop_after(ev.TrialStarted, 2))
    with closing(RunStore(out, "tiny")) as store:
        record = read_run(store)
    assert record.after is None
    assert record.outcome is None
    assert [t.state for t in record.rounds[0].trials] == ["complete", "running"]


def test_a_seed_starts_the_same_network_and_leaves_the_callers_random_state() -> None:
    state = torch.get_rng_state()
    first, same, other = (prepare(tiny_study(model=TinyNet, seed=s)).original for s in (1, 1, 2))
    weights = [m.state_dict()["conv1.weight"] for m in (first, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(state, torch.get_rng_state())


def test_a_dry_run_plans_the_rounds(tmp_path: Path) -> None:
    plan = forecast_run(prepare(tiny_study(), out=tmp_path / "r", protection=PLAIN))
    assert [r.number for r in plan.rounds] == [1, 2]
    assert plan.rounds[-1].cost_share == pytest.approx(0.5)
    assert plan.top1 is None
    assert list(tmp_path.iterdir()) == []
    known = forecast_run(prepare(tiny_study(model=trained(), baseline=None)))
    assert known.floor == pytest.approx((known.top1 or 0) - 0.08)
