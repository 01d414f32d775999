"""Where a run lives, as people write it; and that no password gets in."""

from __future__ import annotations

import errno
import io
import os
import sys
from pathlib import Path

import pytest

from autoprune.errors import RunError, UsageError
from autoprune.location import RunLocation, parse_artifact_url, parse_database_url, parse_run
from autoprune.storage.blobs import open_blobs
from autoprune.storage.database import open_storage


def test_a_folder_holds_all_of_a_run(tmp_path: Path) -> None:
    found = parse_run(str(tmp_path / "runs" / "a"))
    assert found.name is None
    assert found.location.is_local
    assert found.location.url == f"sqlite:///{tmp_path}/runs/a/study.sqlite3"
    assert found.location.checkpoints("a") == str(tmp_path / "runs" / "a" / "artifacts")


def test_a_database_holds_many_runs_by_name() -> None:
    found = parse_run("postgresql://ann@db.site:5433/prune#night", "s3://models/night/")
    assert found.name == "night"
    assert not found.location.is_local
    assert str(found.location) == "postgresql://ann@db.site:5433/prune"
    assert found.location.url == "postgresql+psycopg://ann@db.site:5433/prune"
    assert found.location.checkpoints("night") == "s3://models/night/night"
    assert found.location.folder == Path("runs/night")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://ann:hunter2@db/prune#a",
        "postgresql://db/prune?password=hunter2#a",
        "postgresql://ann:hunter2@db/prune",
    ],
)
def test_a_password_in_a_url_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_run(url)
    assert "hunter2" not in str(caught.value)
    assert "PGPASSWORD" in caught.value.hint


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("postgresql://db/prune", "names no run"),
        ("mysql://db/prune#a", "mysql"),
        ("redis://host#a", "no database URL|not supported|redis"),
    ],
)
def test_what_is_no_place_is_refused(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_run(text)


@pytest.mark.parametrize("text", ["gs://bucket/a", "s3://", "s3://key:secret@bucket/a", "https://host/b"])
def test_an_artifact_store_is_s3_or_a_folder(text: str) -> None:
    with pytest.raises(UsageError, match="--artifacts") as caught:
        parse_artifact_url(text)
    assert "secret" not in caught.value.message
    assert parse_artifact_url("shared") == str(Path.cwd() / "shared")


def test_a_database_that_is_not_there_is_told_at_once() -> None:
    location = RunLocation(folder=Path("x"), database=parse_database_url("postgresql://127.0.0.1:1/none"))
    with pytest.raises(UsageError, match="cannot be opened") as caught:
        open_storage(location)
    assert "PGPASSWORD" in caught.value.hint


def test_a_missing_client_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for missing in ("psycopg", "boto3"):
        monkeypatch.setitem(sys.modules, missing, None)
    location = RunLocation(folder=Path("x"), database="postgresql://127.0.0.1:1/none")
    for opens, missing in (
        (lambda: open_storage(location), "psycopg"), (lambda: open_blobs("s3://b/p"), "boto3"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=f"{missing}, which is missing") as caught:
            opens()
        assert "pip install 'psycopg[binary]' boto3" in caught.value.hint


def test_a_full_disk_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    store = open_blobs(str(tmp_path / "artifacts"))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left") as caught:
        store.write("x", io.BytesIO(bytes(1 << 20)))
    assert "--resume" in caught.value.hint
    assert list((tmp_path / "artifacts").iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    store = open_blobs(str(tmp_path / "artifacts"))
    store.write("y", io.BytesIO(b"y"))
    (tmp_path / "artifacts").chmod(0o500)
    with pytest.raises(RunError, match="Permission denied"):
        store.write("x", io.BytesIO(b"x"))


def test_a_place_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="Not a directory"):
        open_blobs(str(tmp_path / "file" / "artifacts")).write("x", io.BytesIO(b"x"))
