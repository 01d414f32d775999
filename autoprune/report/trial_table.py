"""The table of all trials of a run, and the importance of each of its hyperparameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import optuna
import pandas as pd

from autoprune.record import RoundRecord, RunRecord, TrialRecord
from autoprune.storage import quiet_optuna

MIN_TRIALS = 6  # below it an importance is noise; a guess
COLUMNS = (
    "state", "prune_rate", "cost_share", "macs", "num_params", "before_tuning", "top1", "low", "high", "loss",
    "recovered", "promoted", "seconds", "tuning_seconds", "failure",
)  # fmt: skip


def trial_frame(record: RunRecord) -> pd.DataFrame:
    """Return a table with one row a trial: round, number, parameters (`params_...`), result."""
    return pd.DataFrame([_row(r, t) for r in record.rounds for t in r.trials])


def trials_csv(record: RunRecord) -> str:
    """Return the table of all trials as CSV."""
    return str(trial_frame(record).to_csv(index=False))


def _row(round_record: RoundRecord, trial: TrialRecord) -> dict[str, Any]:
    row: dict[str, Any] = {"round": round_record.number, "trial": trial.number, "floor": round_record.floor}
    row |= {f"params_{name}": value for name, value in trial.params.items()}
    row |= {name: getattr(trial, name) for name in COLUMNS}
    return row | {"epochs": trial.epochs[-1].epoch if trial.epochs else 0.0}


@dataclass(frozen=True, kw_only=True)
class Importance:
    """The share of the differences between trials that one hyperparameter explains, in [0, 1]."""

    name: str
    share: float


@dataclass(frozen=True, kw_only=True)
class Importances:
    """The importance of every hyperparameter that varied, from `num_trials` trials."""

    shares: tuple[Importance, ...]
    num_trials: int


def importances(record: RunRecord) -> Importances | None:
    """Compute each hyperparameter's importance for the recovered accuracy, over all rounds' trials.

    The importances are those of Optuna's fANOVA (Hutter et al. 2014). The score is top-1 less the round's
    floor, so that rounds can be put together, the rate counts as a share of the round's ceiling, and
    parameters that belong to one decay alone are left out. Return None where there are too few trials, or
    nothing differed.
    """
    points = [p for r in record.rounds for p in _comparable(r)]
    names = set.intersection(*(set(p.params) for p in points)) if points else set()
    values = {n: {p.params[n] for p in points} for n in sorted(names)}
    varied = [n for n in values if len(values[n]) > 1]
    if len(points) < MIN_TRIALS or not varied or len({p.value for p in points}) < 2:
        return None
    space = {n: _range(n, values[n]) for n in varied}
    with quiet_optuna():
        study = optuna.create_study(storage=optuna.storages.InMemoryStorage(), direction="maximize")
    for point in points:
        params = {n: point.params[n] for n in varied}
        study.add_trial(optuna.trial.create_trial(params=params, distributions=space, value=point.value))
    evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
    by_name = optuna.importance.get_param_importances(study, evaluator=evaluator, params=varied)
    shares = tuple(Importance(name=n, share=float(s)) for n, s in by_name.items())
    return Importances(shares=shares, num_trials=len(points))


@dataclass(frozen=True, kw_only=True)
class _Point:
    """A trial, expressed so that trials of different rounds can be compared."""

    params: dict[str, Any]
    value: float


def _comparable(round_record: RoundRecord) -> Iterator[_Point]:
    for trial in round_record.trials:
        if trial.top1 is None:
            continue
        params = {n: v for n, v in trial.params.items() if not n.startswith(f"{trial.params.get('decay')}_")}
        if "prune_rate" in params:
            params["prune_rate"] = min(1.0, params["prune_rate"] / round_record.ceiling)
        yield _Point(params=params, value=trial.top1 - round_record.floor)


def _range(name: str, values: set[Any]) -> optuna.distributions.BaseDistribution:
    """Return the distribution that spans these values of a hyperparameter."""
    if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
        return optuna.distributions.FloatDistribution(min(values), max(values), log=name == "lr")
    return optuna.distributions.CategoricalDistribution(sorted(values, key=str))
