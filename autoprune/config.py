"""The settings of a run: a `Study`, and the values inside it.

A study is Python. The defaults of the settings are written here and nowhere else; the numbers behind them,
which shape a run, are in `heuristics`. Nothing here imports torch: a study is checked, and all its problems
are shown together, before anything heavy starts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from autoprune.errors import AutopruneError, ConfigError, UsageError
from autoprune.heuristics import Heuristics

if TYPE_CHECKING:
    from torch import Tensor, nn

    from autoprune.data import Data, Split

Decay = Literal["cosine", "linear", "step", "exponential", "onecycle"]
DECAYS: tuple[Decay, ...] = get_args(Decay)
Optimizer = Literal["muon", "sgd"]
OPTIMIZERS: tuple[Optimizer, ...] = get_args(Optimizer)
Norms = Literal["keep", "rescale"]
NORMS: tuple[Norms, ...] = get_args(Norms)
Metric = Literal["macs", "params", "size", "memory", "latency"]
METRICS: tuple[Metric, ...] = get_args(Metric)

COUNTS = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9}
BYTES = {"b": 1.0, "kb": 1e3, "mb": 1e6, "gb": 1e9}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
UNITS: dict[str, dict[str, float]] = {
    "macs": COUNTS, "params": COUNTS, "size": BYTES, "memory": BYTES, "latency": SECONDS,
}  # fmt: skip
DURATIONS_S = {"s": 1.0, "m": 60.0, "h": 3600.0}
MIN_SECONDS = 1.0  # of a budget whose end has passed: what was measured so far is delivered


@dataclass(frozen=True, kw_only=True)
class Target:
    """The allowed cost of the final model: a fraction of the original's (`relative`) or an absolute value.

    Absolute values are multiply-adds (`macs`), parameters (`params`), bytes of weights (`size`), bytes of
    the activations that one pass makes (`memory`) or seconds of one pass (`latency`).
    """

    metric: Metric
    value: float
    relative: bool

    @classmethod
    def parse(cls, text: str) -> Target:
        """Read a target such as `macs=0.5`, `params=300k`, `size=2MB`, `memory=0.6` or `latency=4ms`.

        Raises:
            UsageError: the text names no known metric, or its value is out of range.
        """
        hint = "write for example macs=0.5, params=300k, size=2MB or latency=4ms"
        match = re.fullmatch(r"\s*([a-z]+)\s*=\s*([0-9.]+(?:e[0-9]+)?)\s*([a-zA-Z]*)\s*", text)
        if match is None:
            raise UsageError(f"target {text!r} is not of the form metric=value", hint)
        metric, number, unit = match[1], match[2], match[3].lower()
        if metric not in METRICS:
            raise UsageError(f"target {text!r} names {metric!r}; known are {', '.join(METRICS)}", hint)
        try:
            value = float(number)
        except ValueError:
            raise UsageError(f"target {text!r}: {number!r} is not a number", hint) from None
        if unit in UNITS[metric] and (unit or value > 1):
            return cls(metric=metric, value=value * UNITS[metric][unit], relative=False)
        if unit or not 0 < value < 1:
            raise UsageError(f"target {text!r}: a fraction lies between 0 and 1, or give a unit", hint)
        return cls(metric=metric, value=value, relative=True)

    def absolute(self, original: float) -> float:
        """Return the allowed cost for an original of the given cost."""
        return self.value * original if self.relative else self.value

    def __str__(self) -> str:
        return f"{self.metric}={self.value:g}"


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The amount that a run may spend: wall-clock seconds, or epochs of fine-tuning in all trials together.

    Both count from the moment the original is measured; training a baseline, exporting and reporting come
    on top. Instead, `until` may name the moment at which the budget ends: the time that training a
    baseline takes then counts, and only exporting and reporting come on top.
    """

    seconds: float | None = None
    epochs: float | None = None
    until: datetime | None = None

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget: `90s`, `30m`, `8h`, `1h30m`, `epochs=40`, `until=07:00` or `until=2027-01-31T07:00`.

        A time of day means its next occurrence on this machine's clock.

        Raises:
            UsageError: the text has none of these forms.
        """
        error = UsageError(
            f"budget {text!r} is neither a duration nor a number of epochs nor a time to end",
            "write for example 30m, 8h, 1h30m, epochs=40 or until=07:00",
        )
        if text.startswith("until="):
            try:
                return cls(until=next_time(text.removeprefix("until="), datetime.now()))
            except ValueError:
                raise error from None
        if text.startswith("epochs="):
            try:
                epochs = float(text.removeprefix("epochs="))
            except ValueError:
                raise error from None
            if not 0 < epochs < float("inf"):
                raise error
            return cls(epochs=epochs)
        parts = re.findall(r"([0-9.]+)([smh])", text)
        if not parts or "".join(f"{n}{u}" for n, u in parts) != text:
            raise error
        try:
            seconds = sum(float(n) * DURATIONS_S[u] for n, u in parts)
        except ValueError:
            raise error from None
        if seconds <= 0:
            raise error
        return cls(seconds=seconds)

    def counted(self, used: float = 0.0) -> Budget:
        """Return the budget in seconds: for one that has an end, those `used` and those until its end."""
        if self.until is None:
            return self
        left = (self.until - datetime.now()).total_seconds()
        return Budget(seconds=used + max(MIN_SECONDS, left))


def next_time(text: str, now: datetime) -> datetime:
    """Return the moment that a text such as `2027-01-31T07:00` names; for `07:00` its next occurrence.

    Raises:
        ValueError: the text is neither a moment nor a time of day.
    """
    if "T" in text:
        return datetime.fromisoformat(text).astimezone().replace(tzinfo=None)
    then = datetime.combine(now, datetime.strptime(text, "%H:%M").time())
    return then if then > now else then + timedelta(days=1)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """The training of a study's own baseline when it brings no weights: one-cycle learning rate.

    The fields are those of `Finetune`; transformers learn little by `sgd` in few epochs.
    """

    epochs: float
    lr: float = 0.1
    batch_size: int = 128
    weight_decay: float = 5e-4
    optimizer: Optimizer = "sgd"


@dataclass(frozen=True, kw_only=True)
class Finetune:
    """The settings of fine-tuning that all trials share; the search chooses `lr` and `decay`.

    Attributes:
        share: the part of the train split that trials see, in (0, 1].
        optimizer: `muon` for the weights inside the network and SGD for the rest, or `sgd` for all of them
            (see `optimizer`).
        momentum: the momentum of both optimizers, with Nesterov's update.
        weight_decay: the weight decay of SGD, on weights of more than one dimension; never on norms and
            biases.
        warmup: the share of the steps that raise the rate linearly from a tenth of it.
        distill: the highest weight of the distillation loss against the original network, in [0, 1]; the
            weight shrinks as the student catches up with its teacher
            (`training.finetune.distillation_weight`). 0 turns it off, and so does a loss of the
            study's own, whose outputs may not be logits.
        temperature: the temperature of the distillation (Hinton et al. 2015, section 2).
        ema: the share of the steps that an exponential average of the weights reaches back over, in [0, 1);
            0 gives the last step's weights.
        recalibrate_batches: the number of batches that estimate the batch-norm statistics anew after
            pruning and after fine-tuning.
    """

    share: float = 1.0
    optimizer: Optimizer = "muon"
    batch_size: int = 128
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.1
    distill: float = 0.9
    temperature: float = 4.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    recalibrate_batches: int = 20


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """The sensitivity analysis: each group alone, on `share` of the search split (at least half).

    Attributes:
        ratios: the shares of a group's units that may be tried; bisection measures three of them at most.
        exact: whether all ratios are measured, by the network's own arithmetic.
        known: the analysis.json that `autoprune analyze` wrote of this network and these data; points in
            it are not measured again.
    """

    ratios: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    share: float = 1.0
    exact: bool = False
    known: str | None = None


@dataclass(frozen=True, kw_only=True)
class Search:
    """The settings of the Optuna study of one round.

    Attributes:
        trials: the number of trials per round attempt; None lets the budget decide.
        epochs: the epochs of one trial's fine-tuning; None lets the budget decide.
        lr: the range of learning rates that is searched, log-uniform.
        criteria: the ranking criteria that are searched.
        strategies: the allocation strategies that are searched.
        sampler: `tpe`, `gp` or `random`.
    """

    trials: int | None = None
    epochs: float | None = None
    lr: tuple[float, float] = (1e-3, 0.2)
    decays: tuple[Decay, ...] = DECAYS
    criteria: tuple[str, ...] = ("l1", "l2", "taylor")
    strategies: tuple[str, ...] = ("sensitivity",)
    sampler: Literal["tpe", "gp", "random"] = "tpe"


@dataclass(frozen=True, kw_only=True)
class Control:
    """The rules by which the controller moves the ceiling of the pruning rate.

    Rates are shares of the cost that a round's starting model has in the target's metric.

    Attributes:
        first_ceiling: the highest rate of the first round.
        max_ceiling: the rate above which no round searches.
        raise_factor: the factor of the ceiling after a promotion.
        lower_factor: the factor of the ceiling after a failed round.
        min_rate: the rate below which a ceiling is useless: the run goes back once, then stops.
        max_rounds: the most round attempts in one run.
        budget_growth: the factor of the fine-tuning epochs after going back.
    """

    first_ceiling: float = 0.7
    max_ceiling: float = 0.7
    raise_factor: float = 1.25
    lower_factor: float = 0.5
    min_rate: float = 0.025
    max_rounds: int = 24
    budget_growth: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Study:
    """The network, the data, the target and all settings of a run.

    Attributes:
        name: the name of the run; the prefix of its folder and of its Optuna studies.
        model: the trained network, or a function that builds it (with its weights loaded).
        data: the three splits, or a function that makes them.
        target: the allowed cost of the final model, see `Target.parse`.
        max_drop: the allowed loss of top-1 against the baseline on the search split, in percentage points.
        budget: the time or the epochs that the run may spend, see `Budget.parse`.
        baseline: the training of the network before the run; None when it comes trained.
        loss: a function (model output, target) -> scalar loss; None is cross-entropy.
        evaluate: a function (model, split, device) -> score in [0, 1], higher is better; None is top-1.
        exclude: module names or globs whose channels stay; unmatched patterns are an error.
        only: module names or globs whose channels alone may go.
        round_to: kept counts are multiples of this in groups at least 4 times as wide; None is that of
            `heuristics`.
        min_keep: the least number of units that stay in every group.
        max_ratio: the share of a group's units that may go in the whole run, in (0, 1).
        heuristics: the shares, thresholds and factors that shape a run; few studies change one.
    """

    name: str
    model: nn.Module | Callable[[], nn.Module]
    data: Data | Callable[[], Data]
    target: str = "macs=0.5"
    max_drop: float = 1.0
    budget: str = "30m"
    seed: int = 0
    device: str = "auto"
    baseline: Baseline | None = None
    loss: Callable[[Any, Tensor], Tensor] | None = None
    evaluate: Callable[[nn.Module, Split, str], float] | None = None
    exclude: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    norms: Norms = "keep"
    round_to: int | None = None
    min_keep: int = 1
    max_ratio: float = 0.9
    finetune: Finetune = field(default_factory=Finetune)
    analysis: Analysis = field(default_factory=Analysis)
    search: Search = field(default_factory=Search)
    control: Control = field(default_factory=Control)
    heuristics: Heuristics = field(default_factory=Heuristics)


@dataclass(frozen=True, kw_only=True)
class Protection:
    """The keys or the passphrase that open the delivered file, and the key that signs it.

    With neither recipients nor a passphrase, and unless it is `plain`, the file is encrypted to the key of
    the default identity, which is made on first use.

    Attributes:
        recipients: age public keys (`age1...`, `ssh-...`) or files with one a line.
        passphrase: a passphrase that opens the file, instead of recipients.
        plain: whether the file stays unencrypted.
        signing_key: a file with an Ed25519 secret key that signs the delivered file.
        run_recipients: the public keys to which the run's checkpoints are encrypted; none leaves them
            unencrypted.
        run_identities: the files with a key that opens the checkpoints, for the run itself; none is the
            default identity.
    """

    recipients: tuple[str | Path, ...] = ()
    passphrase: str | None = field(default=None, repr=False)
    plain: bool = False
    signing_key: str | Path | None = None
    run_recipients: tuple[str, ...] = ()
    run_identities: tuple[str, ...] = ()


def check_study(study: Study) -> None:
    """Check all settings of a study.

    Raises:
        ConfigError: a setting is wrong; the error lists every problem, not only the first.
    """
    problems = [
        *_parse_problems(study),
        *_range_problems(study),
        *_choice_problems(study),
        *_heuristics_problems(study.heuristics),
    ]
    if problems:
        raise ConfigError(problems)


def _parse_problems(study: Study) -> list[AutopruneError]:
    problems: list[AutopruneError] = []
    for parse, text in ((Target.parse, study.target), (Budget.parse, study.budget)):
        try:
            parse(text)
        except UsageError as error:
            problems.append(error)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", study.name):
        problems.append(
            UsageError(f"study name {study.name!r} is no file name", "use letters, digits, . _ -")
        )
    return problems


def _range_problems(study: Study) -> list[AutopruneError]:
    tune, control, search = study.finetune, study.control, study.search
    baseline = study.baseline or Baseline(epochs=1)
    checks: Sequence[tuple[bool, str, str]] = (
        (0 <= study.max_drop <= 100, f"max_drop={study.max_drop}", "percentage points from 0 to 100"),
        (0.5 <= study.analysis.share <= 1, f"analysis.share={study.analysis.share}",
         "at least half of the search split (0.5 to 1): less says too little about the layers"),
        (all(0 < r < 1 for r in study.analysis.ratios) and bool(study.analysis.ratios),
         f"analysis.ratios={study.analysis.ratios}", "one or more ratios between 0 and 1"),
        (0 < tune.share <= 1, f"finetune.share={tune.share}", "a share above 0, up to 1"),
        (tune.batch_size >= 2, f"finetune.batch_size={tune.batch_size}", "2 or more"),
        (0 <= tune.distill <= 1, f"finetune.distill={tune.distill}", "a weight from 0 to 1"),
        (0 <= tune.warmup < 1, f"finetune.warmup={tune.warmup}", "a share from 0, below 1"),
        (0 <= tune.ema < 1, f"finetune.ema={tune.ema}", "a share from 0, below 1"),
        (tune.temperature > 0, f"finetune.temperature={tune.temperature}", "above 0"),
        (baseline.epochs > 0, f"baseline.epochs={baseline.epochs}", "above 0"),
        (baseline.lr > 0, f"baseline.lr={baseline.lr}", "above 0"),
        (baseline.batch_size >= 2, f"baseline.batch_size={baseline.batch_size}", "2 or more"),
        (0 < search.lr[0] <= search.lr[1], f"search.lr={search.lr}", "a range above 0, low before high"),
        (search.trials is None or search.trials >= 1, f"search.trials={search.trials}", "1 or more"),
        (search.epochs is None or search.epochs > 0, f"search.epochs={search.epochs}", "above 0"),
        (0 < control.min_rate <= control.first_ceiling <= control.max_ceiling < 1,
         "control: min_rate, first_ceiling, max_ceiling", "0 < min_rate <= first_ceiling <= max_ceiling < 1"),
        (0 < control.lower_factor < 1 <= control.raise_factor,
         "control: lower_factor, raise_factor", "lower_factor below 1, raise_factor 1 or more"),
        (control.budget_growth >= 1, f"control.budget_growth={control.budget_growth}", "1 or more"),
        (control.max_rounds >= 1, f"control.max_rounds={control.max_rounds}", "1 or more"),
        (study.round_to is None or study.round_to >= 1, f"round_to={study.round_to}", "1 or more"),
        (study.min_keep >= 1, f"min_keep={study.min_keep}", "1 or more"),
        (0 < study.max_ratio < 1, f"max_ratio={study.max_ratio}", "a share between 0 and 1"),
    )  # fmt: skip
    return [UsageError(f"{setting} is not allowed", f"{setting.split('=')[0]} takes {allowed}")
            for ok, setting, allowed in checks if not ok]  # fmt: skip


def _choice_problems(study: Study) -> list[AutopruneError]:
    baseline = study.baseline or Baseline(epochs=1)
    checks: Sequence[tuple[str, Sequence[Any], Sequence[Any]]] = (
        ("norms", (study.norms,), NORMS),
        ("finetune.optimizer", (study.finetune.optimizer,), OPTIMIZERS),
        ("baseline.optimizer", (baseline.optimizer,), OPTIMIZERS),
        ("search.decays", study.search.decays, DECAYS),
    )
    return [
        UsageError(
            f"{name}={', '.join(map(str, setting))} is not allowed", f"choose from {', '.join(allowed)}"
        )
        for name, setting, allowed in checks
        if not setting or not set(setting) <= set(allowed)
    ]


def _heuristics_problems(heuristics: Heuristics) -> list[AutopruneError]:
    """Return an error for every heuristic that is not above 0, or is a share above 1."""
    return [
        UsageError(
            f"heuristics.{name}={value} is not allowed",
            f"heuristics.{name} takes a number above 0{', up to 1' if name.endswith('_share') else ''}",
        )
        for name, value in vars(heuristics).items()
        if value <= 0 or (name.endswith("_share") and value > 1)
    ]
