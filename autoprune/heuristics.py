"""The numbers that shape a run: shares, thresholds and factors, in one place and each with its origin.

A study may replace single values (`Study.heuristics`). None of them changes what a user asks for: target,
floor and budget are kept with any values. An origin is a page of `docs/`, a file of `benchmarks/results/`,
or the word "guess", which says that nobody has measured it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Heuristics:
    """What shapes a run; epochs are passes over the training data that trials see."""

    # How a budget is divided (`search.budget`).
    final_share: float = 0.4
    """Of the whole budget: what the final tuning gets at least. A guess."""
    analysis_share: float = 0.25
    """Of the seconds that the search has left: an analysis is cut short there and not repeated. A guess."""
    retry_rounds: float = 0.5
    """Rounds' worth of budget that is kept for a round that fails. A guess."""
    min_trials: int = 3
    max_trials: int = 24
    """Trials of a round. TPE gains over its start-up trials only from about 8 on (docs/search.md)."""
    trials_per_root_epoch: float = 1.3
    """Trials of a round grow with the root of its epochs: 6 epochs make 3 trials of 2, 40 make 8 of 5."""
    min_epochs: float = 0.1
    """Of one trial: below it nothing can recover."""
    enough_epochs: float = 1.0
    """A round has rather fewer trials than shorter ones: one trial that recovers says more. A guess."""
    max_epochs: float = 100.0
    """Of one trial and of the final tuning. A guess; whoever wants more says so in the study."""
    worthwhile_share: float = 0.5
    """Of the longest trials' epochs so far: a round of shorter trials is not worth starting. A guess."""
    time_safety: float = 0.95
    """Of the seconds left: the final tuning's epochs are planned from a mean."""

    # How a trial climbs its rungs (`search.round`).
    first_rung_share: float = 0.2
    """Of a trial's epochs, as a complete schedule before the rest: what is lost if the trial goes on."""
    min_rung_epochs: float = 0.3
    """A shorter schedule says nothing about a longer one. A guess."""
    max_first_rung_share: float = 0.4
    """Of a trial's epochs: where the first rung would take more, there is none. A guess."""
    extension_factor: float = 2.0
    """A trial near its floor may go on for this many times its planned epochs."""
    min_known_gains: int = 2
    """Trials that went from the first rung to the second before one is given up on the first."""

    # When a round has enough trials (`search.round`).
    short_budget_share: float = 0.05
    """A budget is short if one trial takes more of it than this. A guess."""
    informative_epochs: float = 1.0
    """Shorter schedules say little about the learning rate of a long one. A guess."""
    extra_trials_share: float = 0.15
    """Of the budget, for more trials once the target is reached. A guess."""
    max_deaths: int = 5
    """Processes that die on one trial slot before its trial counts as failed. A guess."""

    # What a round tries (`search.proposals`).
    startup_trials: int = 4
    """Random trials before the sampler: fewer lose nothing on a surrogate of 8 to 32 trials."""
    max_observations: int = 200
    """Trials that a sampler learns from. A guess; the thousandth trial is proposed as fast as this one."""
    min_rate_share: float = 0.5
    """Of the ceiling: the lowest pruning rate that is searched."""
    snap_share: float = 0.95
    """Of the ceiling: rates from here on become the ceiling, or targets are missed by a hair."""
    lr_step: float = 3.0
    """The second and third learning rates tried are this factor above and below the first. A guess."""

    # What counts as a near miss (`search.near_miss`).
    near_margin: float = 0.015
    """Of the score below the floor: models further off are not kept. A guess."""
    max_cost_ratio: float = 0.97
    """Of the best model's cost: a near miss that saves less is not worth the risk. A guess."""
    hope_factor: float = 2.0
    """Times the gain that the last rung promises, for a model that is short of the target. A guess."""
    max_lr_factor: float = 2.0
    """The final tuning's learning rate is at most this many times its trial's (docs/log.md)."""

    # How a machine is measured and used (`search.trial`, `pipeline.preflight`).
    probe_batches: int = 8
    """Training batches that are timed to learn how long an epoch takes."""
    evaluations_per_trial: float = 3.0
    """A trial evaluates twice and recalibrates. A guess that holds until trials were timed."""
    small_batch_macs: float = 1e9
    """Networks whose batches take less run on one thread; a guess between 0.2e9 and ResNet-20's 5e9."""
    round_to: int = 8
    """Widths are multiples of this unless the study says otherwise: 8 floats fill a vector of AVX2, and
    8 halves the 16 bytes that tensor cores want."""


DEFAULTS = Heuristics()
