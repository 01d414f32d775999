"""`kill -9` of a whole run, again and again: in every stage, inside an upload, inside a commit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from autoprune.cli import main
from autoprune.controller import Decision, RoundOutcome, decide, start
from autoprune.errors import UsageError
from autoprune.history import CHECKPOINT, RESULT, read_goal, read_plan, read_run, summaries
from autoprune.seats import SEAT
from autoprune.store import RunStore, name_in, scored
from tests.tiny import tiny_study

ROOT = Path(__file__).resolve().parents[1]
STUDY = "from tests.tiny import tiny_study\n\nstudy = tiny_study()\n"
STAGES = (
    "baseline",
    "analysis",
    "round 1 trial",
    "promoted",
    "finish: tune",
    "finish: test",
    "finish: export",
)
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
from autoprune.cli import main
import autoprune.pipeline
if kind == "time":
    threading.Timer(number, die).start()
sys.exit(main(sys.argv[3:]))
"""


def run_and_die(words: list[str], dice: random.Random, kind: str) -> int:
    """Start the run and have it die in one way; gives its exit code, which is 0 if it was faster."""
    number = {"upload": dice.randint(1, 2), "commit": dice.randint(1, 90), "begin": dice.randint(1, 90)}
    after = float(number.get(kind, dice.uniform(0.2, 8)))
    command = [sys.executable, "-c", MORTAL, kind, str(after), *words]
    stage = dice.choice(STAGES)
    with subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if kind == "stage" and stage in line:
                time.sleep(dice.uniform(0, 0.4))
                process.send_signal(signal.SIGKILL)
        code = process.wait()
    assert code in (0, 3, -signal.SIGKILL), "".join(told)
    return code


def finished_trials(out: Path) -> dict[tuple[str, int], Any]:
    """What every trial that was told complete says."""
    try:
        with closing(RunStore(out, name_in(out))) as store:
            return {
                (study.study_name, t.number): (
                    t.params,
                    t.value,
                    t.user_attrs.get(RESULT),
                    t.user_attrs.get(CHECKPOINT),
                )
                for study in store.rounds()
                for t in scored(study)
            }
    except UsageError:
        return {}


def check(out: Path, before: dict[tuple[str, int], Any]) -> None:
    """Nothing that was finished is lost, changed or run again; decisions follow from the records."""
    found = finished_trials(out)
    assert before.items() <= found.items()
    if not found:
        return
    control = tiny_study().control
    with closing(RunStore(out, "tiny")) as store:
        goal = read_goal(store)
        state = start(goal, control)
        for study in store.rounds():
            seats = [t.user_attrs[SEAT] for t in scored(study)]
            assert sorted(seats) == list(range(len(seats)))
            assert len(seats) <= read_plan(study).trials
            told = study.user_attrs
            if "action" not in told:
                continue
            outcome = RoundOutcome(trials=summaries(study), budget_left=told["budget_left"])
            decision: Decision = decide(goal, control, state, outcome)
            assert (decision.action, decision.promoted) == (told["action"], told["promoted"])
            state = decision.state
            for one in state.path:
                attempt = store.study(one.round)
                assert attempt is not None
                store.load(attempt.trials[one.trial].user_attrs[CHECKPOINT])


def killed_again_and_again(folder: Path, seeds: range) -> None:
    study, out = folder / "a_mortal_study.py", folder / "run"
    study.write_text(STUDY, encoding="utf-8")
    words = ["run", str(study), "--out", str(out), "--plain", "--resume"]
    kinds, before, deaths = ("stage", "commit", "upload", "time", "begin"), finished_trials(out), 0
    for seed in seeds:
        dice = random.Random(seed)  # noqa: S311 - a seeded test
        deaths += run_and_die(words, dice, kinds[seed % len(kinds)]) == -signal.SIGKILL
        check(out, before)
        before = finished_trials(out)
    assert deaths >= len(seeds) / 2, "most of the runs have to die, or nothing was tried"
    done = subprocess.run(
        [sys.executable, "-m", "autoprune", *words, "--json"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 3), done.stderr
    check(out, before)
    assert main(["verify", str(out / "model.autoprune")]) == 0
    with closing(RunStore(out, "tiny")) as store:
        record = read_run(store)
        assert record.after is not None
        final = store.study("final")
        assert final is not None
        assert len(scored(final)) == 1
    assert json.loads(done.stdout)["after"]["top1"] == record.after.top1
    parts = [p.name for p in (out / "artifacts").iterdir() if p.name.endswith(".part")]
    assert parts == [], "half-written files are swept up"


def test_a_run_that_is_killed_four_times_loses_nothing(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, range(5, 9))


@pytest.mark.slow
def test_a_run_that_is_killed_twenty_times_loses_nothing(tmp_path: Path) -> None:
    killed_again_and_again(tmp_path, range(20))
