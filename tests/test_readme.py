"""What README.md says to type is typed here, as a new user would, in a folder with nothing but own files.

Only time is short: where the page says eight hours, the tests add a few epochs as budget to the line.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn
from torchvision.models import resnet18

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
SHELL = "\n".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL)).replace("\\\n", " ")
LINES = [shlex.split(line, comments=True) for line in SHELL.splitlines() if line.strip()]
ONE_SHOT, *STUDY_LINES = [line[1:] for line in LINES if line[0] == "autoprune"]
COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200))
PROJECT = '''
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
train_set = TensorDataset(images[:1000], labels[:1000])
val_set = TensorDataset(images[1000:1400], labels[1000:1400])
test_set = TensorDataset(images[1400:], labels[1400:])


class MyNet(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(),
            nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.BatchNorm2d(48), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10),
        )
'''  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


def typed(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "AUTOPRUNE_KEY_FILE": str(folder / "key.txt"),
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def autoprune(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return typed(["-m", "autoprune", *words], folder)


def train_(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(32):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()


def test_the_page_has_the_lines_that_are_typed_here() -> None:
    others = [line[:2] for line in LINES if line[0] != "autoprune"]
    assert others == [["pip", "install"], ["make", "demo"], ["make", "test"]]
    assert ONE_SHOT[:3] == ["run", "--model", "torchvision:resnet18"]
    assert [line[0] for line in STUDY_LINES] == ["run", "run", "status", "verify", "export"]
    assert len(PYTHON) == 2


@pytest.mark.slow
def test_the_one_shot_command_prunes_a_folder_of_photographs(folder: Path) -> None:
    """Photographs of three colours, and a torchvision network that was trained on them for a moment."""
    torch.manual_seed(0)
    labels = torch.arange(240) % 3
    images = (torch.tensor(COLOURS)[labels][:, :, None, None] + 12 * torch.rand(240, 3, 64, 64)).byte()
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        kind = folder / "photos" / ("train" if number < 150 else "val") / "rgb"[label]
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(kind / f"{number}.png")
    network = resnet18(num_classes=3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    inputs = (images[:150] / 255 - mean[:, None, None]) / std[:, None, None]
    train_(network, inputs, labels[:150], epochs=2)
    for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.reset_running_stats()
        norm.momentum = None  # ten steps are too few for a moving average
    with torch.no_grad():
        network(inputs)
    torch.save(network.state_dict(), folder / "resnet18.pth")
    checked = autoprune([*ONE_SHOT, "--dry-run"], folder)
    assert checked.returncode == 0, checked.stderr
    short = ["--budget", "epochs=3", "--data", "imagefolder:photos,size=64"]
    done = autoprune([*ONE_SHOT, *short], folder)
    assert done.returncode in (0, 3), done.stderr
    out = folder / "runs/resnet18-imagefolder"
    assert (out / "model.autoprune.age").is_file()
    assert pd.read_csv(out / "trials.csv")["top1"].notna().any(), "a trial was pruned, tuned and measured"


@pytest.mark.slow
def test_the_study_and_every_line_after_it(folder: Path) -> None:
    (folder / "my_project.py").write_text(PROJECT, encoding="utf-8")
    (folder / "my_study.py").write_text(PYTHON[0], encoding="utf-8")
    space: dict[str, object] = {}
    exec(PROJECT, space)  # noqa: S102 - the text above
    network, data = space["MyNet"](), space["train_set"]  # type: ignore[operator]
    torch.manual_seed(0)
    train_(network, *data.tensors, epochs=6)  # type: ignore[attr-defined]
    torch.save(network.state_dict(), folder / "my.pth")
    for words in STUDY_LINES:
        is_run = words[0] == "run" and "--dry-run" not in words
        done = autoprune([*words, "--budget", "epochs=4"] if is_run else words, folder)
        assert done.returncode in ((0, 3) if is_run else (0,)), f"{words}: {done.stderr}"
    assert (folder / "mine.onnx").is_file()
    (folder / "load.py").write_text(
        PYTHON[1] + "\nimport torch\n\nprint(model(torch.zeros(1, 1, 8, 8)).shape)\n", encoding="utf-8"
    )
    loaded = typed(["load.py"], folder)
    assert loaded.returncode == 0, loaded.stderr
    assert "[1, 10]" in loaded.stdout
