"""PostgreSQL and an S3 server, for real: what a run needs of them, and what happens when they go away."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from autoprune import events as ev
from autoprune.config import Protection, Search
from autoprune.errors import ArtifactError, RunError, UsageError
from autoprune.location import RunLocation, parse_database_url
from autoprune.pipeline.run import run
from autoprune.plan import PruningPlan
from autoprune.report.dashboard import Dashboard, find_labels, open_dashboard
from autoprune.storage.membership import RunLockedError, join_run
from autoprune.storage.run_store import RunStore, completed_trials, quiet_optuna, set_attrs
from autoprune.storage.trial_slots import OWNER
from tests.pipeline.test_run import needed_checkpoints
from tests.report.test_dashboard import CHROMIUM, Page, visit
from tests.services import Postgres, Relay, postgres, postgres_programs, s3
from tests.tiny import tiny_net, tiny_study

pytestmark = [
    pytest.mark.services,
    pytest.mark.skipif(postgres_programs() is None, reason="PostgreSQL is not installed"),
]
ROOT = Path(__file__).resolve().parents[1]
SHARED = """
import time
from pathlib import Path

import torch

from autoprune.config import Search
from tests.tiny import tiny_study, trained_net


def loss(output, target):
    time.sleep(1.5 if output.requires_grad and not Path("{go}").exists() else 0)
    return torch.nn.functional.cross_entropy(output, target)


study = tiny_study(
    name="{name}", search=Search(trials=24, epochs=1, criteria=("l1",)), budget="epochs=80", loss=loss,
    max_drop=30.0, target="macs=0.7", model=trained_net, baseline=None,
)
"""
PLAN = PruningPlan(keep={}, num_units={})


@pytest.fixture(scope="module")
def database() -> Iterator[Postgres]:
    folder = Path(tempfile.gettempdir()) / f"autoprune-{time.time_ns()}"  # pytest's are closed to `postgres`
    with postgres(folder) as server:
        yield server


@pytest.fixture(scope="module")
def bucket() -> Iterator[Relay]:
    boto3 = pytest.importorskip("boto3")
    with s3() as relay, pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{relay.port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "any")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "any")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        with closing(boto3.client("s3")) as client:
            client.create_bucket(Bucket="models")
        yield relay


@pytest.fixture
def location(database: Postgres, bucket: Relay, tmp_path: Path) -> RunLocation:
    return RunLocation(
        folder=tmp_path / "out", database=parse_database_url(database.url), artifacts="s3://models/night"
    )


@pytest.fixture
def store(location: RunLocation) -> Iterator[RunStore]:
    with quiet_optuna(), closing(RunStore(location, f"run{time.time_ns()}", create=True)) as made:
        yield made


def while_away(server: Postgres | Relay, seconds: float) -> threading.Thread:
    """Stop a server, and start it again later."""
    server.stop()

    def back() -> None:
        time.sleep(seconds)
        server.start()

    thread = threading.Thread(target=back)
    thread.start()
    return thread


def test_a_run_lives_in_a_database_and_a_bucket(store: RunStore) -> None:
    study = store.create_study(0, {"floor": 0.5})
    trial = study.ask()
    artifact = store.save_checkpoint(tiny_net(), PLAN)
    set_attrs(trial, checkpoint=artifact)
    study.tell(trial, 0.9)
    assert store.load_checkpoint(artifact).matches(tiny_net())
    assert [t.value for t in completed_trials(study)] == [0.9]
    with closing(RunStore(store.location, store.name)) as other:
        found = other.study(0)
        assert found is not None
        assert found.user_attrs["floor"] == 0.5
    store.delete_checkpoint(artifact)
    with pytest.raises(ArtifactError, match="missing in s3://models/night/"):
        store.load_checkpoint(artifact)


def test_a_damaged_object_is_refused(store: RunStore) -> None:
    import io

    artifact = store.save_checkpoint(tiny_net(), PLAN)
    with store.blobs.open_reader(artifact) as file:
        content = bytearray(file.read())
    for damaged in (content[:-9], bytes([content[0] ^ 1]) + content[1:]):
        store.blobs.write(artifact, io.BytesIO(damaged))
        with pytest.raises(ArtifactError, match="damaged"):
            store.load_checkpoint(artifact)
    assert store.save_checkpoint(tiny_net(), PLAN) == artifact
    store.load_checkpoint(artifact)


def test_two_runs_share_a_database_and_each_has_one_coordinator(store: RunStore) -> None:
    with (
        closing(RunStore(store.location, "another", create=True)) as other,
        closing(RunStore(store.location, store.name)) as second,
        join_run(store, "coordinator"),
        join_run(other, "coordinator"),
        pytest.raises(RunLockedError),
        join_run(second, "coordinator"),
    ):
        pytest.fail("there are two")


def test_a_stopped_database_is_waited_for(store: RunStore, database: Postgres) -> None:
    study = store.create_study(1, {})
    trial = study.ask()
    with join_run(store, "coordinator") as me:
        back = while_away(database, 20)
        began = time.monotonic()
        trial.suggest_float("x", 0, 1)
        study.tell(trial, 1.0)
        took = time.monotonic() - began
        back.join()
        assert took > 5
        assert [t.value for t in completed_trials(study)] == [1.0]
        me.check()


def test_an_object_store_that_refuses_is_waited_for(store: RunStore, bucket: Relay) -> None:
    back = while_away(bucket, 20)
    began = time.monotonic()
    artifact = store.save_checkpoint(tiny_net(), PLAN)
    assert time.monotonic() - began > 5
    back.join()
    assert store.load_checkpoint(artifact).matches(tiny_net())


def test_a_missing_bucket_and_a_wrong_name_are_told(location: RunLocation, database: Postgres) -> None:
    from dataclasses import replace

    with pytest.raises(RunError, match="no-such-bucket"):
        RunStore(replace(location, artifacts="s3://no-such-bucket/a"), "a", create=True)
    wrong = replace(location, database=database.url.replace("/postgres", "/nothing"))
    with pytest.raises(UsageError, match="cannot be opened"):
        RunStore(wrong, "a")


def test_a_run_goes_on_after_a_minute_without_database_and_one_without_store(
    location: RunLocation, database: Postgres, bucket: Relay
) -> None:
    threads: list[threading.Thread] = []
    events: list[ev.Event] = []

    def take_away(event: ev.Event) -> None:
        events.append(event)
        finished = sum(isinstance(e, ev.TrialFinished) for e in events)
        if isinstance(event, ev.TrialFinished) and finished <= 2:
            threads.append(while_away(database if finished == 1 else bucket, 60))

    study = tiny_study(name=f"away{time.time_ns()}", search=Search(trials=3, epochs=0.3), max_drop=20.0)
    result = run(study, out=location, protection=Protection(plain=True), on_event=take_away)
    for thread in threads:
        thread.join()
    assert result.reached
    assert result.model_file.parent == location.folder
    assert len(threads) == 2
    assert all(not t.failure for r in result.record.rounds for t in r.trials)
    with closing(RunStore(location, study.name)) as kept:
        assert set(kept.blobs.names()) == needed_checkpoints(kept, result.record)
    again = run(study, out=location, protection=Protection(plain=True), resume=True)
    assert again.after == result.after
    with pytest.raises(UsageError, match="never overwritten"):
        run(study, out=location, protection=Protection(plain=True))


def test_a_worker_joins_a_run_in_a_database_by_its_name_alone(location: RunLocation, tmp_path: Path) -> None:
    name = f"shared{time.time_ns()}"
    file, go = tmp_path / "in_a_database.py", tmp_path / "go"
    file.write_text(SHARED.format(name=name, go=str(go)), encoding="utf-8")
    command = [sys.executable, "-m", "autoprune"]
    words = ["run", file, "--storage", location.database, "--artifacts", location.artifacts,
             "--out", tmp_path / "out", "--plain", "--quiet"]  # fmt: skip
    whole = f"{location.database}#{name}"
    with subprocess.Popen([*command, *words], cwd=ROOT) as coordinator:
        limit = time.monotonic() + 300
        while subprocess.run([*command, "status", whole], cwd=ROOT, capture_output=True).returncode:
            assert time.monotonic() < limit
        with subprocess.Popen(
            [*command, "worker", whole], cwd=ROOT, stderr=subprocess.PIPE, text=True
        ) as worker:
            with closing(RunStore(location, name)) as store:
                owners: set[int] = set()
                while len(owners) < 2:
                    assert time.monotonic() < limit + 300
                    study = store.study(1)
                    owners = {t.user_attrs[OWNER] for t in study.trials} if study else set()
            go.touch()
            _, told = worker.communicate(timeout=600)
        assert coordinator.wait(600) == 0
    assert worker.returncode == 0, told
    assert "is finished; this worker ran" in told
    assert (tmp_path / "out" / "model.autoprune").is_file()


def test_the_dashboard_shows_the_runs_of_a_database(
    database: Postgres, bucket: Relay, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of one database in one list, one of them while it is writing, with checkpoints in a bucket."""
    monkeypatch.chdir(tmp_path)
    seen: list[list[str]] = []
    opened: list[Dashboard] = []

    def look(event: ev.Event) -> None:
        if isinstance(event, ev.TrialStarted) and event.trial == 1 and not opened:
            opened.append(open_dashboard(database.url, 0))
            opened[0].serve_beside()
            seen.append([s["study_name"] for s in Page(opened[0]).get("/api/studies")["study_summaries"]])

    for name in ("shown-first", "shown-second"):
        study = tiny_study(name=name, search=Search(trials=2, epochs=0.5), max_drop=60.0)
        where = RunLocation(
            folder=tmp_path / name, database=parse_database_url(database.url), artifacts="s3://models/x"
        )
        run(
            study,
            out=where,
            protection=Protection(plain=True),
            on_event=ev.ignore_event if seen else look,
            command="tiny",
        )
    assert any(name.startswith("shown-first/round-01  running: 2 trials") for name in seen[0])
    time.sleep(3)  # a view may be a little old
    page = Page(opened[0])
    found = page.get("/api/studies")["study_summaries"]
    names = [s["study_name"] for s in found]
    assert any(n.startswith("shown-first/final") for n in names)
    assert any(n.startswith("shown-second/final") for n in names)
    one = next(s["study_id"] for s in found if s["study_name"].startswith("shown-first/round-01"))
    figures = {g["id"] for g in page.get(f"/api/studies/{one}")["plotly_graph_objects"]}
    assert {"path", "widths"} <= figures, "the promoted plan comes from the bucket"
    assert find_labels(f"{database.url}#shown-second") == ["shown-second"]
    if CHROMIUM is not None:
        folder = Path(os.environ.get("AUTOPRUNE_SCREENSHOTS", tmp_path))
        shown = visit(f"{page.root}/dashboard/studies/{one}", folder, "dashboard-postgresql.png")
        assert "Accuracy over cost" in shown
    opened[0].server.shutdown()
    opened[0].server.server_close()
