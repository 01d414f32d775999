"""The page of bench_sampler.py: recorded trials, surrogates, rungs, and the rounds played against them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np
from machine import headline
from sampler_replay import GOALS, PRODUCT, SETTLED_WAYS, STARTS, WAYS, Goal, Round, Way, play, second
from sampler_worlds import CRITERIA, Trial, World, read_trials
from scipy.stats import rankdata

from autoprune.config import DECAYS

AT = (4, 8, 16, 32)  # trials
SECOND_TRIALS = 16
FEWEST = 50  # recorded trials of a round that is played
SLOWER = 3  # a third of the seeds for what takes half a second an ask
RESAMPLED = 2000
TITLES = {
    "digits": "ResNet-8 / digits, SGD",
    "digits-muon": "ResNet-8 / digits, Muon",
    "resnet8": "ResNet-8 / a tenth of Fashion-MNIST, SGD",
}
Losses = list[list[float]]  # seeds x AT


class Kept:
    """What was played already, so that a page that was stopped goes on."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.known: dict[str, list[float]] = json.loads(path.read_text()) if path.exists() else {}

    def of(self, key: str, make: Callable[[], list[float]]) -> list[float]:
        """A seed's losses."""
        if key not in self.known:
            self.known[key] = make()
        return self.known[key]

    def save(self) -> None:
        """Between two ways."""
        self.path.write_text(json.dumps(self.known))


def write_page(source: Path, out: Path, kept: Path, seeds: int) -> None:
    """Play what was not played yet and write everything down."""
    trials, played = read_trials(source), Kept(kept)
    worlds = {of: World([t for t in trials if t.of == of]) for of in dict.fromkeys(t.of for t in trials)}
    lines = [*_recorded(worlds), *_surrogates(worlds), *_choices(worlds), *_rungs(worlds)]
    for goal in GOALS:
        lines += _goal(worlds, goal, seeds, played)
    lines += _two_rounds(worlds, seeds, played)
    head = [
        "# Which sampler, how many start-up trials, which warm start: on recorded real trials", "",
        headline("torch", "optuna", "scikit-learn"),
        f"Made by `python benchmarks/bench_sampler.py replay --seeds {seeds}` from sampler.csv, which "
        "`bench_sampler.py record` makes; the head of that file explains both.", "",
    ]  # fmt: skip
    out.write_text("\n".join([*head, *lines]).rstrip() + "\n", encoding="utf-8")


def _title(of: tuple[str, int]) -> str:
    return f"{TITLES[of[0]]}, round {of[1]}"


def _recorded(worlds: dict[tuple[str, int], World]) -> Iterator[str]:
    yield from ("## What was recorded", "")
    yield "| | ceiling | trials: random, first, again | epochs | top-1, least, median, most | s a trial |"
    yield "|---|---:|---|---:|---|---:|"
    for of, world in worlds.items():
        kinds = [sum(t.kind == k for t in world.trials) for k in ("random", "first", "again")]
        top1 = sorted(100 * t.top1 for t in world.trials)
        yield (
            f"| {_title(of)} | {world.ceiling:g} | {', '.join(map(str, kinds))} "
            f"| {world.trials[0].rungs[-1][0]:g} | {top1[0]:.1f}, {median(top1):.1f}, {top1[-1]:.1f} "
            f"| {median(t.seconds for t in world.trials):.1f} |"
        )
    yield ""


def _surrogates(worlds: dict[tuple[str, int], World]) -> Iterator[str]:
    yield from ("## How real the surrogates are", "")
    yield "Tenfold cross-validation, repeated points held out together: R2 of the log error, rank"
    yield "correlation. What the surrogate missed by, and the noise between two real runs of one point with"
    yield "different seeds (which is drawn in the replay): standard deviations in points of top-1, for the"
    yield "better half of the trials."
    yield ""
    names = [f.name for f in next(iter(worlds.values())).fits]
    yield f"| | {' | '.join(names)} | used | missed by | noise between runs |"
    yield "|---|" + "---|" * len(names) + "---|---:|---:|"
    for of, world in worlds.items():
        each = " | ".join(f"{f.r2:.2f}, {f.rho:.2f}" for f in world.fits)
        drawn, real = world.noise()
        yield f"| {_title(of)} | {each} | {world.chosen.name} | {drawn:.2f} | {real:.2f} |"
    yield ""


def _choices(worlds: dict[tuple[str, int], World]) -> Iterator[str]:
    """What the surrogates say of the decays."""
    yield from ("## Decays and criteria", "")
    yield "Top-1 of the best tenth of what can be tried at the ceiling with each, by the surrogate, and the"
    yield "median learning rate of the best tenth of all."
    yield ""
    yield f"| | {' | '.join([*DECAYS, *CRITERIA])} | lr |"
    yield "|---|" + "---:|" * (len(DECAYS) + len(CRITERIA) + 1)
    for of, world in worlds.items():
        points, means = world.pool
        is_deep = world.rates >= world.ceiling
        cells = []
        for value in (*DECAYS, *CRITERIA):
            mine = is_deep & np.array([value in (p["decay"], p["criterion"]) for p in points])
            cells.append(f"{100 * means[mine][means[mine] >= np.quantile(means[mine], 0.9)].mean():.2f}")
        top = np.flatnonzero(is_deep & (means >= np.quantile(means[is_deep], 0.9)))
        lr = median(points[i]["lr"] for i in top)
        yield f"| {_title(of)} | {' | '.join(cells)} | {lr:.3f} |"
    yield ""


def _rungs(worlds: dict[tuple[str, int], World]) -> Iterator[str]:
    yield from ("## The first rung and the end", "")
    yield "Spearman's correlation of top-1 at the end of the first rung with that at the end of the trial,"
    yield "random points, 95 % intervals by resampling trials. Like rates: ranks within three classes (half"
    yield "to three quarters of the ceiling, above, the ceiling itself); in the lines of all shares ranks are"
    yield "within a share as well. Recalibrated: the first rung's network scored after its batch-norm"
    yield "statistics were estimated anew, beside the plain score of the same trials. Last: median top-1 of"
    yield "these (or all) before tuning, on the first rung, on it recalibrated, at the end."
    yield ""
    yield "| | first rung | n | all | like rates | n | plain | recalibrated | median top-1 |"
    yield "|---|---:|---:|---|---|---:|---|---|---|"
    for of, world in worlds.items():
        plain = [Climbed(t, t.rungs[0][1]) for t in world.trials if t.kind == "random"]
        shares = sorted({c.trial.first_rung for c in plain})
        for told, chosen in [*((f"{s:g}", {s}) for s in shares), ("all", set(shares))]:
            yield f"| {_title(of)} | {told} {_rung_cells(plain, chosen, world)} |"
    yield ""


def _rung_cells(plain: Sequence[Climbed], shares: set[float], world: World) -> str:
    mine = [c for c in plain if c.trial.first_rung in shares]
    both = [c for c in mine if c.trial.number in world.rungs]
    anew = [Climbed(c.trial, world.rungs[c.trial.number].top1) for c in both]
    seen = both or mine
    tops = [[c.trial.untuned for c in seen], [c.first for c in seen], [c.first for c in anew]]
    tops.append([c.trial.top1 for c in seen])
    levels = ", ".join(f"{100 * median(top):.1f}" for top in tops if top)
    cells = [str(len(mine)), _interval(mine, _over_all), _interval(mine, _like), str(len(both))]
    cells += [_interval(c, _over_all) if c else "" for c in (both, anew)]
    return f"| {' | '.join(cells)} | {levels}"


class Climbed(NamedTuple):
    """A trial, and what it scored on its first rung."""

    trial: Trial
    first: float


def _over_all(climbed: Sequence[Climbed]) -> float:
    return _within(climbed, lambda t: t.first_rung)


def _like(climbed: Sequence[Climbed]) -> float:
    def alike(t: Trial) -> tuple[float, int]:
        part = t.point["prune_rate"] / t.ceiling
        return t.first_rung, (part >= 0.75) + (part >= 0.95)

    return _within(climbed, alike)


def _within(climbed: Sequence[Climbed], same: Callable[[Trial], object]) -> float:
    """Correlation of the ranks in each class, as shares of it."""
    by: dict[object, list[Climbed]] = {}
    for c in climbed:
        by.setdefault(same(c.trial), []).append(c)
    pairs = [np.array([[c.first, c.trial.top1] for c in each]) for each in by.values()]
    ranks = [rankdata(p, axis=0) / (len(p) + 1) for p in pairs]
    return float(np.corrcoef(np.concatenate(ranks).T)[0, 1])


def _interval(trials: Sequence[Climbed], statistic: Callable[[Sequence[Climbed]], float]) -> str:
    rng = np.random.default_rng(0)
    drawn = [
        statistic([trials[i] for i in rng.integers(0, len(trials), len(trials))])
        for _ in range(RESAMPLED // 4)
    ]
    low, high = np.nanquantile(drawn, (0.025, 0.975))
    return f"{statistic(trials):.2f} ({low:.2f} to {high:.2f})"


def _goal(worlds: dict[tuple[str, int], World], goal: Goal, seeds: int, played: Kept) -> Iterator[str]:
    heads = {
        "deepest": "A floor that few keep at four fifths of the ceiling",
        "ceiling": "A floor that a tenth keeps at the ceiling",
        "settled": "A settled round: accuracy at the ceiling",
    }
    unit = "points of top-1" if goal == "settled" else "points of MACs"
    yield from (f"## {heads[goal]}", "")
    yield f"Median loss in {unit} after {', '.join(map(str, AT))} trials, {seeds} seeds"
    yield f"({seeds // SLOWER} for gp); the difference to the first line, mean over the same seeds with its"
    yield "95 % interval (negative is better)."
    yield ""
    for of, world in worlds.items():
        if of[1] > 1 or len(world.trials) < FEWEST:
            continue  # the second round has its own table
        one = Round.of(world, goal)
        yield f"**{_title(of)}**: floor {100 * one.floor:.2f} %, kept by {100 * one.share:.1f} % of the"
        yield f"space; {_best(one)}."
        yield ""
        yield f"| | {' | '.join(map(str, AT))} | difference at 8 | difference at 16 |"
        yield "|---|" + "---:|" * len(AT) + "---|---|"
        base: Losses = []
        for way in (*WAYS, *(SETTLED_WAYS if goal == "settled" else ())):
            losses = _played(of, one, way, seeds, played)
            base = base or losses
            cells = [f"{median(at):.2f}" for at in zip(*losses, strict=True)]
            cells += [""] * (len(AT) - len(cells))
            apart = [
                _apart(losses, base, i) if way is not PRODUCT and way.most >= AT[i] else "" for i in (1, 2)
            ]
            yield f"| {way.name} | {' | '.join(cells)} | {' | '.join(apart)} |"
        yield ""


def _best(one: Round) -> str:
    if one.goal == "settled":
        return f"the best there is is {100 * one.best:.2f} %"
    return f"the best rate that keeps it is {100 * one.best:.1f} %"


def _played(of: tuple[str, int], one: Round, way: Way, seeds: int, played: Kept) -> Losses:
    def losses(seed: int) -> list[float]:
        seen = play(one, way, seed, AT[-1])
        return [one.loss(seen[:n]) for n in AT if n <= way.most]

    size = len(one.world.trials)
    made = [
        played.of(f"{of}, {size}, {one.goal}, {way.name}, {seed}", partial(losses, seed))
        for seed in range(seeds // SLOWER if way.is_slow else seeds)
    ]
    played.save()
    print(of, one.goal, way.name, [round(median(at), 2) for at in zip(*made, strict=True)], flush=True)
    return made


def _apart(losses: Losses, base: Losses, index: int) -> str:
    differences = np.array([mine[index] - other[index] for mine, other in zip(losses, base, strict=False)])
    rng = np.random.default_rng(0)
    drawn = rng.choice(differences, (RESAMPLED, len(differences))).mean(axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return f"{differences.mean():+.2f} ({low:+.2f} to {high:+.2f})"


def _two_rounds(worlds: dict[tuple[str, int], World], seeds: int, played: Kept) -> Iterator[str]:
    cells = [cell for (cell, number), w in worlds.items() if number == 2 and len(w.trials) >= FEWEST]
    if not cells:
        return
    yield from ("## The second round", "")
    yield "A first round of eight trials played by the product, then a second one on the surrogate of the"
    yield "second round's own trials. Median loss after 4, 8 and 16 of its trials; difference to the last"
    yield "line as above."
    yield ""
    for cell in cells:
        for goal in GOALS:
            first, then = (Round.of(worlds[cell, number], goal) for number in (1, 2))
            yield f"**{TITLES[cell]}, {goal}**"
            yield ""
            yield "| | 4 | 8 | 16 | difference at 4 | difference at 8 |"
            yield "|---|---:|---:|---:|---|---|"
            made = {start: _second(cell, first, then, start, seeds, played) for start in STARTS}
            for start, losses in made.items():
                each = [f"{median(at):.2f}" for at in zip(*losses, strict=True)]
                apart = [_apart(losses, made[STARTS[-1]], i) if start != STARTS[-1] else "" for i in (0, 1)]
                yield f"| {start} | {' | '.join(each)} | {' | '.join(apart)} |"
            yield ""


def _second(cell: str, first: Round, then: Round, start: str, seeds: int, played: Kept) -> Losses:
    def losses(seed: int) -> list[float]:
        seen = second(first, then, start, seed, SECOND_TRIALS)
        return [then.loss(seen[:n]) for n in (4, 8, SECOND_TRIALS)]

    sizes = f"{len(first.world.trials)}, {len(then.world.trials)}"
    made = [
        played.of(f"{cell}, {sizes}, {then.goal}, {start}, {seed}", partial(losses, seed))
        for seed in range(seeds)
    ]
    played.save()
    return made
