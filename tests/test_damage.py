"""A damaged database: a clear error, or the run as it was at its last good commit; never something else."""

from __future__ import annotations

import random
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from autoprune import events as ev
from autoprune.cli.main import main
from autoprune.config import Protection
from autoprune.errors import AutopruneError, RunError
from autoprune.location import DATABASE
from autoprune.pipeline.run import run
from autoprune.record import RunResult
from autoprune.search.controller import replay
from autoprune.search.history import read_baseline, read_round, round_outcomes
from autoprune.storage.run_store import RunStore, completed_trials, quiet_optuna, set_attrs
from tests.tiny import tiny_study

LOG = f"{DATABASE}-wal"
TRIALS = 12


def cut(content: bytes, dice: random.Random) -> bytes:
    return content[: dice.randrange(len(content))]


def flip(content: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << dice.randrange(8)]) + content[at + 1 :]


def zeroed(content: bytes, dice: random.Random) -> bytes:
    """A block of the file that never reached the disk."""
    at = 512 * dice.randrange(len(content) // 512)
    return content[:at] + bytes(512) + content[at + 512 :]


def lost_end(content: bytes, dice: random.Random) -> bytes:
    at = dice.randrange(len(content))
    return content[:at] + bytes(len(content) - at)


DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (cut, flip, zeroed, lost_end)


def written(seed: int) -> dict[str, object]:
    return {"number": seed, "text": "x" * (50 * seed), "list": list(range(seed))}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with twelve trials as it is on the disk: while it is at work (all in the log), and closed."""
    base = tmp_path_factory.mktemp("damage")
    with quiet_optuna():
        store = RunStore(base / "closed", "a", create=True)
        study = store.create_study(1, {})
        for number in range(TRIALS):
            trial = study.ask()
            trial.suggest_float("x", 0, 1)
            set_attrs(trial, **written(number))
            study.tell(trial, float(number))
        shutil.copytree(base / "closed", base / "at-work")
        store.close()
    assert not (base / "closed" / LOG).exists() or not (base / "closed" / LOG).stat().st_size
    return base / "at-work", base / "closed"


def found_in(folder: Path) -> list[int] | None:
    """The finished trials, each as it was written; None where an error for people is raised."""
    try:
        with quiet_optuna(), closing(RunStore(folder, "a")) as store:
            study = store.study(1)
            if study is None:
                return []
            trials = completed_trials(study)
            for trial in trials:
                expected = written(trial.number)
                assert {k: trial.user_attrs[k] for k in expected} == expected
                assert trial.value == trial.number
            study.tell(study.ask(), 99.0)
            assert completed_trials(study)[-1].value == 99
            return [t.number for t in trials]
    except AutopruneError:
        return None


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_log_gives_back_all_up_to_a_good_commit(
    seed: int, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    dice, folder = random.Random(seed), tmp_path / "run"  # noqa: S311 - a seeded test
    shutil.copytree(folders[0], folder)
    (folder / LOG).write_bytes(DAMAGES[seed % 4]((folder / LOG).read_bytes(), dice))
    found = found_in(folder)
    assert found is not None, "the log's checksums tell what is good: no error is needed"
    assert found == list(range(len(found)))


def test_what_was_written_before_the_damage_is_all_there(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """The log is a row of commits, the trials' in the order of their numbers: more of it tells of more."""
    log, found = (folders[0] / LOG).read_bytes(), []
    for quarters in range(5):
        folder = tmp_path / str(quarters)
        shutil.copytree(folders[0], folder)
        (folder / LOG).write_bytes(log[: len(log) * quarters // 4])
        found.append(found_in(folder))
    counts = [len(trials) for trials in found if trials is not None]
    assert counts == sorted(counts)
    assert counts[0] == 0 < counts[2] < counts[3] < counts[4] == TRIALS


@pytest.mark.parametrize("seed", range(40))
def test_a_damaged_database_is_an_error_for_people_or_does_not_matter(
    seed: int, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    """SQLite has no checksums of its own here: what it cannot see must at least be no traceback."""
    dice, folder = random.Random(100 + seed), tmp_path / "run"  # noqa: S311 - a seeded test
    shutil.copytree(folders[1], folder)
    (folder / DATABASE).write_bytes(DAMAGES[seed % 4]((folder / DATABASE).read_bytes(), dice))
    found = found_in(folder)
    assert found is None or found == list(range(TRIALS))


def test_a_value_that_is_damaged_is_an_error_for_people(folders: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(folders[1], tmp_path / "run")
    with closing(sqlite3.connect(tmp_path / "run" / DATABASE)) as connection:
        changed = connection.execute(
            "UPDATE trial_user_attributes SET value_json = '{\"half' WHERE key = 'list'"
        )
        assert changed.rowcount == TRIALS
        connection.commit()
    with quiet_optuna(), closing(RunStore(tmp_path / "run", "a")) as store:
        study = store.study(1)
        assert study is not None
        with pytest.raises(RunError, match="malformed value") as caught:
            completed_trials(study)
    assert ".recover" in caught.value.hint


@pytest.fixture(scope="module")
def at_work(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunResult, Path]:
    """A whole run's result, and its folder as it was after three trials."""
    base = tmp_path_factory.mktemp("whole")
    work, copy, finished = base / "work", base / "copy", 0

    def snapshot(event: ev.Event) -> None:
        nonlocal finished
        finished += isinstance(event, ev.TrialFinished)
        if finished == 3 and not copy.exists():
            shutil.copytree(work, copy)

    return run(tiny_study(), out=work, protection=Protection(plain=True), on_event=snapshot), copy


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_run_goes_on_from_the_last_good_commit_of_a_damaged_log(
    seed: int, at_work: tuple[RunResult, Path], tmp_path: Path
) -> None:
    dice, (result, snapshot), copy = random.Random(seed), at_work, tmp_path / "copy"  # noqa: S311
    shutil.copytree(snapshot, copy)
    log = copy / LOG
    log.write_bytes(DAMAGES[seed % 4](log.read_bytes(), dice))
    again = run(tiny_study(), out=copy, resume=True, protection=Protection(plain=True))
    assert again.after.macs == result.after.macs
    assert again.after.top1 == result.after.top1
    with closing(RunStore(copy, "tiny")) as store:
        replay(read_baseline(store).goal, tiny_study().control, round_outcomes(store))
        assert all(len(completed_trials(study)) <= read_round(study).trials for study in store.rounds())
    assert main(["verify", str(copy / "model.autoprune")]) == 0
