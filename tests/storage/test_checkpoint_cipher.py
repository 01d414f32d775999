"""Checkpoints at rest: what is encrypted, who can open it, and what a run does without its key."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pyrage
import pytest
from safetensors.torch import load as load_safetensors

from autoprune.artifact.reader import open_artifact
from autoprune.config import Protection, Search
from autoprune.crypto.keys import default_recipient, keygen, read_identities
from autoprune.crypto.signing import signing_keygen
from autoprune.errors import ArtifactError, UsageError
from autoprune.location import ARTIFACTS
from autoprune.pipeline.run import run
from autoprune.plan import PruningPlan
from autoprune.storage.checkpoint_cipher import run_cipher
from autoprune.storage.run_store import RunStore, quiet_optuna
from tests.tiny import tiny_net, tiny_study

PLAN = PruningPlan(keep={}, num_units={})
AGE = b"age-encryption.org/v1\n"


@pytest.fixture(autouse=True)
def own_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOPRUNE_KEY_FILE", str(tmp_path / "own.txt"))


def sealed_store(folder: Path, protection: Protection, *, create: bool = False) -> RunStore:
    with quiet_optuna():
        return RunStore(folder, "a", create=create, cipher=run_cipher(protection))


def test_a_sealed_checkpoint_is_closed_on_the_disk_and_opens_again(tmp_path: Path) -> None:
    own, colleague = keygen(tmp_path / "own"), keygen(tmp_path / "colleague")
    protection = Protection(run_recipients=(own, colleague), run_identities=(str(tmp_path / "own"),))
    store = sealed_store(tmp_path / "run", protection, create=True)
    model = tiny_net()
    artifact = store.save_checkpoint(model, PLAN)
    assert store.save_checkpoint(model, PLAN) == artifact, "equal content is kept once"
    (file,) = (tmp_path / "run" / ARTIFACTS).iterdir()
    content = file.read_bytes()
    assert content.startswith(AGE)
    assert model.conv1.weight.detach().numpy().tobytes()[:64] not in content
    assert store.load_checkpoint(artifact).matches(model)
    plaintext = pyrage.decrypt(content, read_identities(tmp_path / "colleague"))
    assert set(load_safetensors(plaintext)) == set(model.state_dict())
    store.close()


def test_damage_and_a_missing_key_are_told_apart_from_each_other(tmp_path: Path) -> None:
    protection = Protection(run_recipients=(default_recipient(),))
    store = sealed_store(tmp_path / "run", protection, create=True)
    artifact = store.save_checkpoint(tiny_net(), PLAN)
    store.close()
    without = sealed_store(tmp_path / "run", Protection())
    with pytest.raises(UsageError, match="are encrypted"):
        without.load_checkpoint(artifact)
    without.close()
    file = tmp_path / "run" / ARTIFACTS / artifact
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    store = sealed_store(tmp_path / "run", protection)
    with pytest.raises(ArtifactError, match="damaged"):
        store.load_checkpoint(artifact)
    assert store.save_checkpoint(tiny_net(), PLAN) == artifact, "a damaged one is written again"
    assert store.load_checkpoint(artifact).matches(tiny_net())
    store.close()


def test_what_the_run_could_not_read_again_is_refused_before_it_starts(tmp_path: Path) -> None:
    stranger = keygen(tmp_path / "stranger")
    with pytest.raises(UsageError, match="there is no key file"):
        run_cipher(Protection(run_recipients=(stranger,)))
    default_recipient()
    with pytest.raises(UsageError, match="could not read its own checkpoints"):
        run_cipher(Protection(run_recipients=(stranger,)))
    with pytest.raises(UsageError, match="without --encrypt-run"):
        run_cipher(Protection(run_identities=(str(tmp_path / "stranger"),)))
    with pytest.raises(UsageError, match="--plain"):
        run_cipher(Protection(run_recipients=(stranger,), plain=True))
    with pytest.raises(UsageError):
        run(tiny_study(), out=tmp_path / "r", protection=Protection(run_recipients=(stranger,)))
    assert not (tmp_path / "r").exists()


def test_a_run_leaves_no_open_weights_and_goes_on_only_with_its_key(tmp_path: Path) -> None:
    """One run from start to signed, encrypted file; then its last step again, with and without the key."""
    public = signing_keygen(tmp_path / "signer")
    protection = Protection(run_recipients=(default_recipient(),), signing_key=str(tmp_path / "signer"))
    study = tiny_study(search=Search(trials=1, epochs=0.5), max_drop=60.0)
    result = run(study, out=tmp_path / "r", protection=protection)
    kept = list((tmp_path / "r" / ARTIFACTS).iterdir())
    assert len(kept) >= 3
    assert all(f.read_bytes().startswith(AGE) for f in kept)
    with open_artifact(result.model_file, require_signature=public) as opened:
        assert opened.signer is not None
        weights = opened.member("model.safetensors")
    result.model_file.unlink()
    with pytest.raises(UsageError, match="are encrypted"):
        run(study, out=tmp_path / "r", protection=Protection(), resume=True)
    again = run(study, out=tmp_path / "r", protection=protection, resume=True)
    with open_artifact(again.model_file) as opened:
        assert opened.member("model.safetensors") == weights


@pytest.mark.skipif(not shutil.which("age"), reason="the age tool (Debian package age) is not here")
def test_the_age_tool_opens_a_checkpoint(tmp_path: Path) -> None:
    store = sealed_store(tmp_path / "run", Protection(run_recipients=(default_recipient(),)), create=True)
    file = tmp_path / "run" / ARTIFACTS / store.save_checkpoint(tiny_net(), PLAN)
    store.close()
    command = ["age", "--decrypt", "--identity", str(tmp_path / "own.txt"), str(file)]
    done = subprocess.run(command, capture_output=True, check=True)
    assert "conv1.weight" in load_safetensors(done.stdout)
