"""The commands around the delivered file: results on stdout, errors with a hint, nothing overwritten."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from autoprune.artifact.export import relative_error, run_onnx
from autoprune.cli.main import main
from autoprune.crypto.keys import keygen
from autoprune.crypto.signing import signing_keygen
from tests.delivered import sample, small_net


@dataclass(frozen=True, kw_only=True)
class Said:
    """What a command said."""

    code: int
    out: str
    err: str


class Shell:
    """Runs commands in this process."""

    def __init__(self, capture: pytest.CaptureFixture[str]) -> None:
        self.capture = capture

    def __call__(self, *words: str | Path) -> Said:
        self.capture.readouterr()
        code = main([str(w) for w in words])
        said = self.capture.readouterr()
        return Said(code=code, out=said.out, err=said.err)


@pytest.fixture
def shell(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Shell]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AUTOPRUNE_KEY_FILE", str(tmp_path / "default.txt"))
    (tmp_path / "model.autoprune").write_bytes(sample().data)
    return Shell(capsys)


def test_keygen_prints_the_public_half_and_overwrites_nothing(shell: Shell) -> None:
    said = shell("keygen", "key.txt")
    assert said.code == 0
    assert said.out.startswith("age1")
    assert "SECRET" not in said.out + said.err
    again = shell("keygen", "key.txt")
    assert again.code == 2
    assert "never overwritten" in again.err
    assert shell("keygen", "--signing", "sign").out.startswith("ssh-ed25519 ")
    assert shell("keygen").code == 0
    assert Path("default.txt").stat().st_mode & 0o777 == 0o600


def test_a_file_goes_all_the_way_round(shell: Shell) -> None:
    team = [keygen(name) for name in ("anna.key", "ben.key")]
    public = signing_keygen("author")
    said = shell(
        "encrypt", "model.autoprune", "-o", "m.age", "-r", team[0], "-r", team[1], "--sign", "author"
    )
    assert said.code == 0, said.err
    shown = json.loads(shell("inspect", "m.age", "--json").out)
    assert shown["recipients"] == ["X25519", "X25519"]
    assert shown["manifest"] is None
    opened = json.loads(shell("inspect", "m.age", "-i", "ben.key", "--json").out)
    assert opened["manifest"]["name"] == "small"
    assert opened["signer"] == public
    assert shell("verify", "m.age", "-i", "anna.key", "--require-signature", "author.pub").code == 0
    assert shell("rewrap", "m.age", "-o", "n.age", "-i", "anna.key").code == 0, "to the default key"
    assert shell("decrypt", "n.age", "-o", "plain").code == 0
    assert shell("decrypt", "n.age", "-o", "no", "-i", "anna.key").code == 1
    assert shell("verify", "plain", "--require-signature", public).code == 0
    assert not Path("no").exists()


def test_inspect_tells_people_what_the_file_is(shell: Shell) -> None:
    text = shell("inspect", "model.autoprune").out
    for part in (
        "nobody: the file is plain",
        "tests.delivered:small_net",
        "any x 1 x 6 x 6",
        "5 classes",
        "sha256",
    ):
        assert part in text
    shell("encrypt", "model.autoprune", "-o", "m.age", "-r", keygen("other.key"))
    locked = shell("inspect", "m.age")
    assert locked.code == 0
    assert "1 x X25519 key" in locked.out
    assert "--identity" in locked.out
    assert "small" not in locked.out


def test_verify_names_every_check(shell: Shell) -> None:
    said = shell("verify", "model.autoprune")
    assert said.code == 0
    rows = {line.split()[0]: line.split()[1] for line in said.out.splitlines()}
    assert rows == {
        "digests": "ok",
        "signature": "-",
        **dict.fromkeys(["program", "weights", "onnx", "dense", "sparse"], "ok"),
    }
    listed = json.loads(shell("verify", "model.autoprune", "--json").out)
    assert [c["name"] for c in listed] == list(rows)


def test_export_gives_each_form(shell: Shell) -> None:
    for form in ("onnx", "pt2", "safetensors", "sparse"):
        assert shell("export", "model.autoprune", "--to", form, "-o", f"out.{form}").code == 0
    example = sample().example
    with torch.no_grad():
        expected = sample().dense(example)
        untouched = small_net().eval()
        untouched.load_state_dict(load_file("out.sparse"))
        assert relative_error(untouched(example), expected) < 1e-5
        assert torch.equal(torch.export.load("out.pt2").module()(example), expected)
    answer = torch.as_tensor(run_onnx(Path("out.onnx").read_bytes(), [example])[0])
    assert relative_error(answer, expected) < 1e-5
    assert load_file("out.safetensors").keys() == sample().dense.state_dict().keys()
    again = shell("export", "model.autoprune", "--to", "onnx", "-o", "out.onnx")
    assert again.code == 2
    assert "nothing is overwritten" in again.err


def secret_in(text: str) -> int:
    """A file descriptor from which a passphrase can be read."""
    read_end, write_end = os.pipe()
    os.write(write_end, text.encode() + b"\n")
    os.close(write_end)
    return read_end


def test_passphrases_come_from_file_descriptors(shell: Shell) -> None:
    descriptor = str(secret_in("open sesame"))
    said = shell("encrypt", "model.autoprune", "-o", "m.age", "--passphrase-fd", descriptor)
    assert said.code == 0, said.err
    assert "a passphrase" in shell("inspect", "m.age").out
    assert (
        shell("decrypt", "m.age", "-o", "plain", "--passphrase-fd", str(secret_in("open sesame"))).code == 0
    )
    assert Path("plain").read_bytes() == sample().data


@pytest.mark.parametrize(
    ("words", "code", "error"),
    [
        (["inspect", "nowhere"], 1, "cannot read nowhere"),
        (["inspect", "model.autoprune", "--passphrase", "-i", "x"], 2, "not both"),
        (["encrypt", "model.autoprune", "-o", "x", "-r", "age1zz"], 2, "no public key"),
        (["encrypt", "model.autoprune", "-o", "x", "-r", "age1zz", "--passphrase"], 2, "not both"),
        (["encrypt", "model.autoprune", "-o", "model.autoprune"], 2, "nothing is overwritten"),
        (["encrypt", "default.txt", "-o", "x"], 1, "cannot read default.txt"),
        (["decrypt", "model.autoprune", "-o", "x"], 1, "is not encrypted"),
        (["rewrap", "model.autoprune", "-o", "x"], 1, "is not encrypted"),
        (["decrypt", "model.autoprune", "-o", "x", "-i", "AGE-SECRET-KEY-1QQQ"], 2, "secret key stands"),
        (["verify", "model.autoprune", "--require-signature", "no.pub"], 2, "cannot read the key file"),
        (["export", "model.autoprune", "--to", "tflite", "-o", "x"], 2, "tflite"),
        (["verify", "model.autoprune", "--passphrase-fd", "77"], 2, "file descriptor 77"),
    ],
)
def test_mistakes_are_told_with_a_hint(shell: Shell, words: list[str], code: int, error: str) -> None:
    said = shell(*words)
    assert said.code == code, said.err
    assert error in said.err
    assert "hint: " in said.err
    assert "Traceback" not in said.err
    assert "QQQ" not in said.err
    assert not Path("x").exists()


def test_a_damaged_file_does_not_verify(shell: Shell) -> None:
    data = bytearray(sample().data)
    data[len(data) // 2] ^= 1
    Path("damaged").write_bytes(data)
    said = shell("verify", "damaged")
    assert said.code == 1
    assert said.err.startswith("error: ")


def test_encrypting_twice_points_to_rewrap(shell: Shell) -> None:
    assert shell("encrypt", "model.autoprune", "-o", "m.age").code == 0
    said = shell("encrypt", "m.age", "-o", "n.age")
    assert said.code == 2
    assert "rewrap" in said.err


def test_a_passphrase_is_asked_for_twice_on_the_terminal(shell: Shell) -> None:
    """Through a real terminal; the two answers differ, so nothing is written."""
    pid, terminal = pty.fork()
    if pid == 0:
        command = [sys.executable, "-m", "autoprune", "encrypt", "model.autoprune", "-o", "x", "--passphrase"]
        os.environ["PYTHONPATH"] = str(Path(__file__).parents[2])
        os.execv(sys.executable, command)  # noqa: S606 - the command under test, no shell
    shown, answers = b"", [b"one\n", b"two\n"]
    while b"do not match" not in shown and select.select([terminal], [], [], 30)[0]:
        shown += os.read(terminal, 1024)
        if answers and shown.endswith(b": "):  # the blank comes when the terminal has stopped to echo
            os.write(terminal, answers.pop(0))
    os.kill(pid, 15)
    os.waitpid(pid, 0)
    assert b"do not match" in shown, shown
    assert b"one" not in shown
    assert not Path("x").exists()


def test_without_a_terminal_a_passphrase_is_not_asked_for(shell: Shell) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    for words in (
        ["encrypt", "model.autoprune", "-o", "x", "--passphrase"],
        ["inspect", "model.autoprune", "--passphrase"],
    ):
        done = subprocess.run(
            [sys.executable, "-m", "autoprune", *words], env=environment, input="secret\nsecret\n", text=True,
            capture_output=True, check=False, start_new_session=True,
        )  # fmt: skip
        assert done.returncode == 2
        assert "no terminal" in done.stderr
        assert "--passphrase-fd 3" in done.stderr
        assert "Warning" not in done.stderr
        assert not Path("x").exists()


def test_inspect_does_not_load_torch(shell: Shell) -> None:
    code = (
        "import sys; from autoprune.cli.main import main\n"
        "main(['inspect', 'model.autoprune']); sys.exit('torch' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, check=False)
    assert done.returncode == 0
