"""What docs/recipes.md and docs/python.md say to type is typed here."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import autoprune
from autoprune.crypto.age import encrypt_chunks
from autoprune.crypto.keys import keygen
from tests.delivered import sample

ROOT = Path(__file__).resolve().parents[1]
RECIPES = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
PYTHON = (ROOT / "docs/python.md").read_text(encoding="utf-8")
SCRIPTS = {
    re.match(r"# (\w+\.py)\n", text)[1]: text  # type: ignore[index]  # each block names its file
    for text in re.findall(r"```python\n(.*?)```", RECIPES, re.DOTALL)
}
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", RECIPES, re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


def command(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "AUTOPRUNE_KEY_FILE": str(folder / "key.txt"),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("recipes")
    for name, text in SCRIPTS.items():
        (made / name).write_text(text, encoding="utf-8")
    return made


def test_every_public_name_is_on_the_page() -> None:
    missing = [name for name in autoprune.__all__ if not re.search(rf"`[^`]*\b{name}\b", PYTHON)]
    assert not missing, f"docs/python.md does not name {missing}"


def test_every_recipe_is_a_file_that_compiles() -> None:
    assert set(SCRIPTS) == {"own_network.py", "boxes.py", "serve.py", "classify.py"}
    for name, text in SCRIPTS.items():
        compile(text, name, "exec")


def test_a_picture_is_classified_with_the_delivered_file_alone(folder: Path) -> None:
    """The answer is that of the network on the picture, prepared as the manifest says."""
    pixels = torch.randint(0, 256, (3, 6, 6), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)
    with torch.no_grad():
        scores = sample().dense(((pixels.float() / 255 - 0.5) / 0.25).unsqueeze(1))
    recipient = keygen(folder / "own.txt")
    encrypt_chunks(folder / "small.age", iter([sample().data]), recipients=[recipient])
    said = []
    for number, image in enumerate(pixels):
        Image.fromarray(image.numpy()).save(folder / f"{number}.png")
        done = command(["classify.py", "small.age", "own.txt", f"{number}.png"], folder)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout.strip())
    assert said == ["abcde"[i] for i in scores.argmax(1).tolist()]


@pytest.mark.slow
def test_every_command_of_the_recipes_runs(folder: Path) -> None:
    """One after the other, as they stand on the page: some go on from what others made."""
    assert len(COMMANDS) > 5
    for line in COMMANDS:
        words = shlex.split(line)
        assert words[0] == "autoprune"
        done = command(["-m", *words], folder)
        assert done.returncode in ((0, 3) if words[1] == "run" else (0,)), f"{line}: {done.stderr}"


@pytest.mark.slow
def test_the_result_is_served_without_torch(folder: Path) -> None:
    assert command(["-m", "autoprune", "run", "boxes.py", "--out", "locked"], folder).returncode in (0, 3)
    done = command(["serve.py", "locked/model.autoprune.age", "key.txt"], folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 2)"


@pytest.mark.slow
def test_the_session_runs_from_top_to_bottom(folder: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PYTHON, re.DOTALL)
    (folder / "session.py").write_text("\n".join(blocks), encoding="utf-8")
    done = command(["session.py"], folder)
    assert done.returncode == 0, done.stderr
    assert "params_lr" in done.stdout
