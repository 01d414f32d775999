"""The way to the quantizer, with the tool that is always at hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import onnx
import pyrage
import pytest
import torch

from autoprune.artifact.manifest import Architecture, Manifest
from autoprune.artifact.writer import write_artifact
from autoprune.config import Protection
from autoprune.crypto.keys import keygen, read_identities

ROOT = Path(__file__).resolve().parents[1]


def files_in(folder: Path) -> Iterator[tuple[str, bytes]]:
    """Names and first bytes of the files that hold more than `tempfile` writes to try a folder out."""
    for path in folder.rglob("*"):
        with suppress(OSError):
            if path.is_file() and path.stat().st_size > 8:
                yield path.name, path.read_bytes()[:40]


@pytest.mark.slow
def test_an_encrypted_file_is_quantized_and_measured(tmp_path: Path) -> None:
    layers = [torch.nn.Conv2d(1, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()]
    model = torch.nn.Sequential(*layers, torch.nn.Linear(32, 10))
    key = tmp_path / "key"
    recipient = keygen(key)
    file = tmp_path / "model.age"
    write_artifact(
        file, model=model, example_inputs=torch.zeros(2, 1, 16, 16),
        manifest=Manifest(name="tiny", architecture=Architecture(class_name="x")),
        protection=Protection(recipients=(recipient,)),
    )  # fmt: skip
    command = [sys.executable, str(ROOT / "scripts/quantize_quark.py"), str(file), "-i", str(key)]
    command += ["--data", "digits", "--config", "ORT", "--calibration", "64", "-r", recipient, "-o", "q.age"]
    scratch, given = tmp_path / "scratch", {file.name, key.name}
    scratch.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(scratch), "HOME": str(scratch)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:  # fmt: skip
        touched = dict[str, bytes]()
        while process.poll() is None:
            touched |= {name: head for name, head in files_in(tmp_path) if name not in given}
            time.sleep(0.005)
        told, complained = process.communicate()
    assert process.returncode == 0, complained
    closed = [name for name, head in touched.items() if head.startswith(b"age-encryption.org/v1")]
    assert closed, "the result was seen on its way"
    assert touched.keys() <= {*closed}, "whatever touches the disk is encrypted"
    result = json.loads(told)
    assert result["num_calibration"] == 64
    assert result["bytes_after"] > 0
    assert 0 <= result["top1_after"] <= 1
    quantized = pyrage.decrypt((tmp_path / "q.age").read_bytes(), read_identities(key))
    assert any(n.op_type == "QuantizeLinear" for n in onnx.load_from_string(quantized).graph.node)
    again = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 2
    assert "nothing is overwritten" in again.stderr
