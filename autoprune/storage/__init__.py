"""Where the state of a run lives: its Optuna storage and its artifact store, and nothing else.

A run is a set of Optuna studies in one database, and of checkpoints in one folder or bucket. Any process that
reaches both can continue the run, so this room is also where processes agree on who does what: a study of
processes with heartbeats, and slots for the trials of a round. It is the only room that uses Optuna's private
names.

In reading order:

* `run_store`: the studies and checkpoints of one run; the one class that the rest of the package works with.
* `run_header`: how a run was started, for those who join it or look at it.
* `database`: Optuna's RDB storage on SQLite or PostgreSQL, repeated while the database is away.
* `blobs`: checkpoints in a folder or an S3 bucket.
* `retry`: how long is waited, and what is said meanwhile.
* `checkpoint_cipher`: checkpoints encrypted at rest.
* `membership`: the processes of a run, one of which coordinates it.
* `trial_slots`: how any number of processes share the planned trials of a round without a lock.
* `optuna_private`: the private names of Optuna, each with its reason.
"""

from autoprune.storage.blobs import open_blobs
from autoprune.storage.checkpoint_cipher import run_cipher
from autoprune.storage.database import GRACE_PERIOD_S, close_storage, open_storage
from autoprune.storage.membership import (
    POLL_S,
    PROCESSES,
    Member,
    MembershipLostError,
    Process,
    StaleMonitor,
    count_working,
    join_run,
    list_processes,
)
from autoprune.storage.optuna_private import FrozenStudy, cached_records, frozen_study_id, renamed_study
from autoprune.storage.run_header import RunHeader, read_run_header
from autoprune.storage.run_store import (
    BASELINE,
    CHECKPOINT,
    FINAL,
    CheckpointCipher,
    RunStore,
    completed_trials,
    has_run,
    quiet_optuna,
    run_name_at,
    run_names_at,
    set_attrs,
    study_names_at,
    suggest_run,
)
from autoprune.storage.trial_slots import (
    NO_OWNER,
    OWNER,
    POINT,
    Slot,
    claim_slot,
    finish_trial,
    is_withdrawn,
    release_stale,
    running_trials,
    start_trial,
)

__all__ = [
    "BASELINE",
    "CHECKPOINT",
    "FINAL",
    "GRACE_PERIOD_S",
    "NO_OWNER",
    "OWNER",
    "POINT",
    "POLL_S",
    "PROCESSES",
    "CheckpointCipher",
    "FrozenStudy",
    "Member",
    "MembershipLostError",
    "Process",
    "RunHeader",
    "RunStore",
    "Slot",
    "StaleMonitor",
    "cached_records",
    "claim_slot",
    "close_storage",
    "completed_trials",
    "count_working",
    "finish_trial",
    "frozen_study_id",
    "has_run",
    "is_withdrawn",
    "join_run",
    "list_processes",
    "open_blobs",
    "open_storage",
    "quiet_optuna",
    "read_run_header",
    "release_stale",
    "renamed_study",
    "run_cipher",
    "run_name_at",
    "run_names_at",
    "running_trials",
    "set_attrs",
    "start_trial",
    "study_names_at",
    "suggest_run",
]
