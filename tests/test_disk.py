"""A disk that is really full, or really read-only: a file system in memory that the test alone sees."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from autoprune.cli.main import main

ROOT = Path(__file__).resolve().parents[1]
PRIVATE = ["unshare", "--map-root-user", "--mount"]
pytestmark = pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*PRIVATE, "true"], capture_output=True).returncode != 0,
    reason="needs Linux's private mounts",
)
MOUNTED = 'mount -t tmpfs -o size=8m none "$1" && shift && exec "$@"'
FILLED = """
import json, os, shutil, sys
from pathlib import Path
from autoprune import events as ev
from autoprune.config import Protection
from autoprune.errors import AutopruneError
from autoprune.pipeline.run import run
from autoprune.location import RunLocation
from autoprune.config import Search
from tests.tiny import tiny_study, trained_net

study = tiny_study(model=trained_net, baseline=None, target="macs=0.7", max_drop=20.0,
                   search=Search(trials=2, epochs=0.5))
disk, kind, out = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
# The database alone is on the small disk, or the checkpoints alone.
places = {
    "database": RunLocation(folder=disk / "run", artifacts=str(out / "artifacts")),
    "checkpoints": RunLocation(folder=out / "run", artifacts=str(disk / "artifacts")),
}
filler = disk / "filler"

def fill(event):
    if isinstance(event, ev.EpochFinished) and not filler.exists():
        with filler.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(1 << 16))
            except OSError:
                pass

if os.fork() == 0:  # a process that dies of it, as a user's does
    try:
        run(study, out=places[kind], protection=Protection(plain=True), on_event=fill)
    except AutopruneError as error:
        (out / "told").write_text(json.dumps([error.message, error.hint]))
    os._exit(0)
os.wait()
assert filler.exists()
half = [p.name for p in (out / "artifacts", disk / "artifacts") if p.is_dir()
        for p in p.iterdir() if p.name.endswith(".part")]
filler.unlink()
result = run(study, out=places[kind], resume=True, protection=Protection(plain=True))
print(json.dumps({"told": json.loads((out / "told").read_text()), "half": half, "reached": result.reached,
                  "trials": [t.state for r in result.record.rounds for t in r.trials]}))
shutil.copy(result.model_file, out / "model.autoprune")
"""
READ_ONLY = """
import io, subprocess, sys
from pathlib import Path
from autoprune.errors import AutopruneError
from autoprune.storage.blobs import open_blobs
from autoprune.storage.run_store import RunStore, quiet_optuna

disk = Path(sys.argv[1])
with quiet_optuna():
    store = RunStore(disk / "run", "a", create=True)
    store.create_study(1, {})
    store.blobs.write("x", io.BytesIO(b"x"))
    store.close()
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for what in (lambda: open_blobs(str(disk / "run" / "artifacts")).write("y", io.BytesIO(b"y")),
                 lambda: RunStore(disk / "run", "a").create_study(2, {})):
        try:
            what()
        except AutopruneError as error:
            print(error.message, "|", error.hint)
"""


def on_a_small_disk(folder: Path, code: str, *words: str) -> list[str]:
    """Run Python on a disk of 8 MB that nobody else sees; gives its lines."""
    disk = folder / "disk"
    disk.mkdir()
    command = [*PRIVATE, "sh", "-c", MOUNTED, "sh", str(disk), sys.executable, "-c", code, str(disk), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.mark.parametrize("kind", ["database", "checkpoints"])
def test_a_run_on_a_full_disk_says_what_to_do_and_goes_on_when_there_is_room(
    kind: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    found = json.loads(on_a_small_disk(tmp_path, FILLED, kind, str(out))[-1])
    message, hint = found["told"]
    assert {"database": "disk is full", "checkpoints": "No space left"}[kind] in message
    assert "make room" in hint
    assert "--resume" in hint
    assert found["half"] == []
    assert found["reached"]
    assert found["trials"] == ["failed", "complete", "complete"], "only the one that met it is repeated"
    assert main(["verify", str(out / "model.autoprune")]) == 0


def test_a_read_only_disk_is_named(tmp_path: Path) -> None:
    artifacts, database = on_a_small_disk(tmp_path, READ_ONLY)
    assert "Read-only file system" in artifacts
    assert "make it writable" in artifacts
    assert "readonly database" in database or "unable to open" in database
    assert "writ" in database.partition("|")[2]
