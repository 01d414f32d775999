from __future__ import annotations

import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.exceptions import DuplicatedStudyError

from autoprune.errors import ArtifactError, RunError, UsageError
from autoprune.location import ARTIFACTS, DATABASE
from autoprune.plan import PruningPlan
from autoprune.storage.run_store import (
    WHOLE,
    RunStore,
    completed_trials,
    quiet_optuna,
    run_name_at,
    set_attrs,
)
from tests.tiny import tiny_net

PLAN = PruningPlan(keep={"conv1": torch.tensor([0, 2]).numpy()}, num_units={"conv1": 12})

ASKER = """
import sys
from pathlib import Path
from typing import Any
from autoprune.storage.run_store import RunStore
study = RunStore(Path(sys.argv[1]), "a").study(1)
for _ in range(8):
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    study.tell(trial, 1.0)
"""


@pytest.fixture
def store(tmp_path: Path):
    with quiet_optuna(), closing(RunStore(tmp_path, "a", create=True)) as made:
        yield made


def test_a_checkpoint_comes_back_as_it_went(store: RunStore) -> None:
    model = tiny_net()
    artifact = store.save_checkpoint(model, PLAN)
    checkpoint = store.load_checkpoint(artifact)
    assert checkpoint.plan == PLAN
    assert checkpoint.matches(model)
    other = tiny_net()
    torch.nn.init.zeros_(other.conv1.weight)
    assert not checkpoint.matches(other)
    checkpoint.load_into_(other)
    assert checkpoint.matches(other)


def test_equal_content_is_kept_once(store: RunStore) -> None:
    assert store.save_checkpoint(tiny_net(), PLAN) == store.save_checkpoint(tiny_net(), PLAN)
    assert len(list((store.folder / ARTIFACTS).iterdir())) == 1


@pytest.mark.parametrize("at", [0, 20, -1])
def test_a_damaged_checkpoint_is_refused_and_saved_again(store: RunStore, at: int) -> None:
    artifact = store.save_checkpoint(tiny_net(), PLAN)
    path = store.folder / ARTIFACTS / artifact
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="damaged"):
        store.load_checkpoint(artifact)
    assert store.save_checkpoint(tiny_net(), PLAN) == artifact
    store.load_checkpoint(artifact)


def test_a_missing_checkpoint_is_named(store: RunStore) -> None:
    artifact = store.save_checkpoint(tiny_net(), PLAN)
    store.delete_checkpoint(artifact)
    store.delete_checkpoint(artifact)
    with pytest.raises(ArtifactError, match="missing"):
        store.load_checkpoint(artifact)


def test_studies_are_found_by_round(store: RunStore) -> None:
    assert store.study(0) is None
    store.create_study(1, {"floor": 0.5})
    store.create_study(2, {"floor": 0.4})
    assert [s.study_name for s in store.rounds()] == ["a/round-01", "a/round-02"]
    store.delete_study(2)
    assert store.study(2) is None
    with pytest.raises(DuplicatedStudyError):
        store.create_study(1, {})


def test_a_study_whose_making_was_interrupted_is_none_and_is_made_again(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A study and what it knows are several commits, and a process can be killed between any two."""
    whole = optuna.Study.set_user_attr

    def killed(study: optuna.Study, key: str, value: object) -> None:
        if key == WHOLE:
            raise KeyboardInterrupt
        whole(study, key, value)

    artifact = store.save_checkpoint(tiny_net(), PLAN)
    monkeypatch.setattr(optuna.Study, "set_user_attr", killed)
    with pytest.raises(KeyboardInterrupt):
        store.create_study(1, {"floor": 0.5}, (artifact, 0.9))
    monkeypatch.setattr(optuna.Study, "set_user_attr", whole)
    assert store.study(1) is None
    assert not list(store.rounds())
    store.create_study(1, {"floor": 0.4}, (artifact, 0.8))
    (study,) = store.rounds()
    assert study.user_attrs["floor"] == 0.4
    assert [(t.value, t.user_attrs["checkpoint"]) for t in completed_trials(study)] == [(0.8, artifact)]


def test_a_study_that_was_made_again_is_not_taken_for_the_old_one(store: RunStore) -> None:
    """SQLite gives a dropped study's number to the next one, and the numbers of its trials too."""
    old = store.create_study(1, {})
    for value in range(3):
        old.tell(old.ask(), value)
    with closing(RunStore(store.folder, "a")) as other:
        seen = other.study(1)
        assert seen is not None
        assert [t.value for t in completed_trials(seen)] == [0, 1, 2]
        store.delete_study(1)
        new = store.create_study(1, {})
        assert new._study_id == old._study_id
        new.tell(new.ask(), 7)
        again = other.study(1)
        assert again is not None
        assert [t.value for t in completed_trials(again)] == [7]


def test_finished_trials_are_read_from_the_database_once(
    store: RunStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = store.create_study(1, {})
    for value in range(3):
        study.tell(study.ask(), value)
    read: list[int] = []
    with closing(RunStore(store.folder, "a")) as other:
        plain = other.storage._get_trials

        def counted(*args: Any, **kwargs: Any) -> list[optuna.trial.FrozenTrial]:
            found: list[optuna.trial.FrozenTrial] = plain(*args, **kwargs)
            read.append(len(found))
            return found

        monkeypatch.setattr(other.storage, "_get_trials", counted)
        for _ in range(3):
            (found,) = other.rounds()
            assert len(completed_trials(found)) == 3
    assert read == [3, 0, 0]


def test_the_database_waits_and_writes_ahead(store: RunStore) -> None:
    store.create_study(1, {})
    with closing(sqlite3.connect(store.folder / DATABASE)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_workers_never_share_an_enqueued_trial(store: RunStore) -> None:
    study = store.create_study(1, {})
    for number in range(24):
        study.enqueue_trial({"x": number / 24})
    command = [sys.executable, "-c", ASKER, str(store.folder)]
    workers = [subprocess.Popen(command, stderr=subprocess.DEVNULL) for _ in range(3)]
    assert [w.wait(timeout=120) for w in workers] == [0] * 3
    asked = [t.params["x"] for t in study.get_trials(deepcopy=False)]
    assert sorted(asked) == [n / 24 for n in range(24)]


def test_dataclasses_become_plain_values(store: RunStore) -> None:
    from autoprune.record import EpochPoint

    study = store.create_study(1, {})
    point = EpochPoint(epoch=1, lr=0.1, train_loss=2.0, images_per_s=3.0)
    set_attrs(study, points=(point,), one=point)
    assert study.user_attrs["points"] == [study.user_attrs["one"]]
    assert study.user_attrs["one"]["lr"] == 0.1


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no run"):
        RunStore(tmp_path, "a")
    with pytest.raises(UsageError, match="there is no run"):
        run_name_at(tmp_path)


def test_another_runs_folder_is_refused(store: RunStore) -> None:
    store.create_study(0, {})
    assert run_name_at(store.folder) == "a"
    with pytest.raises(UsageError, match="holds the run 'a'"):
        RunStore(store.folder, "b")


def test_optuna_is_quiet_only_inside() -> None:
    before = optuna.logging.get_verbosity()
    with quiet_optuna():
        assert optuna.logging.get_verbosity() == optuna.logging.WARNING
    assert optuna.logging.get_verbosity() == before


def test_a_damaged_tail_of_the_log_is_recovered_and_a_damaged_database_is_named(tmp_path: Path) -> None:
    with quiet_optuna():
        store = RunStore(tmp_path / "r", "a", create=True)
        study = store.create_study(1, {})
        for value in range(3):
            study.tell(study.ask(), value)
        copy = tmp_path / "copy"  # what is on the disk while the run is at work, log included
        shutil.copytree(tmp_path / "r", copy)
        store.close()
        log = copy / f"{DATABASE}-wal"
        content = log.read_bytes()
        assert content
        log.write_bytes(content[: len(content) - 5000] + bytes(5000))  # the last commit was half written
        with closing(RunStore(copy, "a")) as found:
            again = found.study(1)
            assert again is not None
            assert 0 < len(completed_trials(again)) <= 3
            again.tell(again.ask(), 9)
            assert completed_trials(again)[-1].value == 9
        content = (tmp_path / "r" / DATABASE).read_bytes()
        for damaged in (b"no database at all" * 400, content[:4096] + b"\xff" * (len(content) - 4096)):
            (tmp_path / "r" / DATABASE).write_bytes(damaged)
            with pytest.raises(RunError, match="does not work") as caught:
                RunStore(tmp_path / "r", "a")
            assert ".recover" in caught.value.hint
