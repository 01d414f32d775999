"""The search: what a round tries, how far a budget goes, and what the controller decides from it.

A *round* starts from the last promoted model. Its *trials* each choose a pruning rate up to the round's
*ceiling*, a learning rate, a decay and a ranking criterion. The *controller* then promotes the best trial
that recovered, lowers the ceiling, goes back once, or ends the run. Its state is the fold over the stored
rounds, so resuming is replaying.

In reading order:

* `context`: what a search works with: the problem, the run, the round.
* `round`: one round as an Optuna study, from the first trial to the last.
* `proposals`: the space of a round, its first points, and the sampler's proposals.
* `trial`: one attempt: prune, fine-tune rung by rung, measure.
* `budget`: rounds x trials x epochs, from the measured speed and what is left.
* `controller`: promote, lower, go back, finish or stop; a pure state machine.
* `near_miss`: models below the floor that the rest of the budget may bring back.
* `history`: what the stored studies hold, as typed values, and the record that is made of them.
* `analysis_cache`: the measured points of an analysis, stored as they come.
"""

from autoprune.search.analysis_cache import load_points, store_point
from autoprune.search.budget import (
    Allotment,
    BudgetTracker,
    RoundBudget,
    Speed,
    allot_round,
    forecast_ceilings,
    rounds_ahead,
)
from autoprune.search.context import Problem, RoundContext, RoundStart, RunContext
from autoprune.search.controller import (
    Decision,
    Goal,
    Promotion,
    RoundOutcome,
    State,
    decide,
    initial_state,
    replay,
    round_floor,
)
from autoprune.search.history import (
    BaselineEntry,
    DecisionEntry,
    FinalEntry,
    RoundEntry,
    checkpoint_of,
    is_decided,
    measured_speed,
    pack_bits,
    read_baseline,
    read_final,
    read_round,
    read_run,
    read_trials,
    round_outcomes,
    round_record,
    trial_summaries,
    unpack_bits,
    used_budget,
)
from autoprune.search.near_miss import best_near_miss, final_lr, is_near, with_recovered
from autoprune.search.round import (
    RoundSearch,
    report_budget,
    same_failure,
    search_round,
    should_tune_near_miss,
    starting_points,
)
from autoprune.search.trial import TrialParams, epoch_points, probe_speed, run_trial, seconds_of_training

__all__ = [
    "Allotment",
    "BaselineEntry",
    "BudgetTracker",
    "Decision",
    "DecisionEntry",
    "FinalEntry",
    "Goal",
    "Problem",
    "Promotion",
    "RoundBudget",
    "RoundContext",
    "RoundEntry",
    "RoundOutcome",
    "RoundSearch",
    "RoundStart",
    "RunContext",
    "Speed",
    "State",
    "TrialParams",
    "allot_round",
    "best_near_miss",
    "checkpoint_of",
    "decide",
    "epoch_points",
    "final_lr",
    "forecast_ceilings",
    "initial_state",
    "is_decided",
    "is_near",
    "load_points",
    "measured_speed",
    "pack_bits",
    "probe_speed",
    "read_baseline",
    "read_final",
    "read_round",
    "read_run",
    "read_trials",
    "replay",
    "report_budget",
    "round_floor",
    "round_outcomes",
    "round_record",
    "rounds_ahead",
    "run_trial",
    "same_failure",
    "search_round",
    "seconds_of_training",
    "should_tune_near_miss",
    "starting_points",
    "store_point",
    "trial_summaries",
    "unpack_bits",
    "used_budget",
    "with_recovered",
]
