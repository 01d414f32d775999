"""`kill -9` of a whole run, again and again: in every stage, inside an upload, inside a commit."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from autoprune.cli.main import main
from autoprune.config import Control
from autoprune.errors import UsageError
from autoprune.search.controller import Decision, RoundOutcome, decide, initial_state
from autoprune.search.history import CHECKPOINT, RESULT, read_baseline, read_round, read_run, trial_summaries
from autoprune.storage.run_store import RunStore, completed_trials, run_name_at
from autoprune.storage.trial_slots import SLOT

ROOT = Path(__file__).resolve().parents[1]
STUDY = """
from autoprune.config import Control, Search
from tests.tiny import tiny_study

study = tiny_study(search=Search(trials={trials}, epochs=2), control=Control(first_ceiling={ceiling}))
"""
CEILING = 0.15  # half of the MACs are several rounds away, so that each moment still has something to hit
TRIAL, PROMOTED = r"round \d+ trial", r"round \d+ promoted"
# Where each of the twenty runs dies: soon after a line that matches, or inside an upload or a commit.
MOMENTS = (
    ("stage", "baseline"), ("upload", ""), ("commit", ""), ("stage", "analysis"), ("begin", ""),
    ("stage", TRIAL), ("commit", ""), ("upload", ""), ("time", ""), ("stage", TRIAL), ("begin", ""),
    ("stage", PROMOTED), ("commit", ""), ("upload", ""), ("stage", TRIAL), ("time", ""),
    ("stage", "finish: tune"), ("commit", ""), ("stage", "finish: test"), ("stage", "finish: export"),
)  # fmt: skip
# As `python -m autoprune`, but dies by SIGKILL at the n-th flush of a checkpoint, at the n-th commit to the
# database (before it is carried out, or when the next one begins), or some time after its modules are loaded.
MORTAL = """
import os, signal, sys, threading
kind, number = sys.argv[1], float(sys.argv[2])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def nth(after=lambda *given: None):
    left = [int(number)]
    def call(*given):
        left[0] -= 1
        if left[0] <= 0:
            die()
        return after(*given)
    return call

if kind == "upload":
    os.fsync = nth(os.fsync)
if kind in ("commit", "begin"):
    from sqlalchemy import event
    from sqlalchemy.engine import Engine
    event.listen(Engine, kind, nth())
from autoprune.cli.main import main
import autoprune.pipeline.run
if kind == "time":
    threading.Timer(number, die).start()
sys.exit(main(sys.argv[3:]))
"""


def run_and_die(words: list[str], dice: random.Random, kind: str, stage: str) -> int:
    """Start the run and have it die in one way; gives its exit code, which is 0 if it was faster."""
    number = {"upload": dice.randint(1, 2), "commit": dice.randint(1, 25), "begin": dice.randint(1, 25)}
    after = float(number.get(kind, dice.uniform(0.1, 3)))
    command = [sys.executable, "-c", MORTAL, kind, str(after), *words]
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if kind == "stage" and re.search(stage, line):
                time.sleep(0 if "finish" in stage else dice.uniform(0, 0.2))  # its last steps may be shorter
                process.send_signal(signal.SIGKILL)
        code = process.wait()
    assert code in (0, -signal.SIGKILL), "".join(told)
    return code


def finished_trials(out: Path) -> dict[tuple[str, int], Any]:
    """What every trial that was told complete says."""
    try:
        with closing(RunStore(out, run_name_at(out))) as store:
            return {
                (study.study_name, t.number): (
                    t.params,
                    t.value,
                    t.user_attrs.get(RESULT),
                    t.user_attrs.get(CHECKPOINT),
                )
                for study in store.rounds()
                for t in completed_trials(study)
            }
    except UsageError:
        return {}


def check(out: Path, before: dict[tuple[str, int], Any]) -> None:
    """Nothing that was finished is lost, changed or run again; decisions follow from the records."""
    found = finished_trials(out)
    assert before.items() <= found.items()
    if not found:
        return
    control = Control(first_ceiling=CEILING)
    with closing(RunStore(out, "tiny")) as store:
        goal = read_baseline(store).goal
        state = initial_state(goal, control)
        for study in store.rounds():
            slots = [t.user_attrs[SLOT] for t in completed_trials(study)]
            assert sorted(slots) == list(range(len(slots)))
            assert len(slots) <= read_round(study).trials
            told = study.user_attrs
            if "action" not in told:
                continue
            outcome = RoundOutcome(trials=trial_summaries(study), budget_left=told["budget_left"])
            decision: Decision = decide(goal, control, state, outcome)
            assert (decision.action, decision.promoted) == (told["action"], told["promoted"])
            state = decision.state
            for one in state.path:
                attempt = store.study(one.round)
                assert attempt is not None
                store.load_checkpoint(attempt.trials[one.trial].user_attrs[CHECKPOINT])


def killed_again_and_again(
    folder: Path, moments: Sequence[tuple[str, str]], trials: int
) -> list[tuple[str, str]]:
    """Kill a run of so many trials a round at these moments, check it after each, and let it end.

    Returns those at which it died.
    """
    study, out = folder / "a_mortal_study.py", folder / "run"
    study.write_text(STUDY.format(trials=trials, ceiling=CEILING), encoding="utf-8")
    words = ["run", str(study), "--out", str(out), "--plain", "--resume"]
    before, died = finished_trials(out), []
    for seed, (kind, stage) in enumerate(moments):
        dice = random.Random(seed)  # noqa: S311 - a seeded test
        if run_and_die(words, dice, kind, stage) == -signal.SIGKILL:
            died.append((kind, stage))
        check(out, before)
        before = finished_trials(out)
    done = subprocess.run(
        [sys.executable, "-m", "autoprune", *words, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    check(out, before)
    assert main(["verify", str(out / "model.autoprune")]) == 0
    with closing(RunStore(out, "tiny")) as store:
        record = read_run(store)
        assert record.after is not None
        final = store.study("final")
        assert final is not None
        assert len(completed_trials(final)) == 1
    assert json.loads(done.stdout)["after"]["top1"] == record.after.top1
    parts = [p.name for p in (out / "artifacts").iterdir() if p.name.endswith(".part")]
    assert parts == [], "half-written files are swept up"
    return died


def test_a_run_that_is_killed_four_times_loses_nothing(tmp_path: Path) -> None:
    moments = (("stage", TRIAL), ("upload", ""), ("commit", ""), ("begin", ""))
    assert killed_again_and_again(tmp_path, moments, trials=2) == list(moments), "it has to die each time"


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_loses_nothing(tmp_path: Path) -> None:
    died = killed_again_and_again(tmp_path, MOMENTS, trials=4)
    # How far a run comes between two kills depends on the machine, so the last moments may find it finished.
    assert len(died) >= 14, died
    assert {kind for kind, _ in died} == {kind for kind, _ in MOMENTS}, "in every way"
