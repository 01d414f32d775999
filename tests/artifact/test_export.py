"""Export: the runtimes that will run the network are the judges."""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load as load_safetensors
from torch import Tensor, nn

from autoprune.artifact.export import export_model, flat_tensors, probe_inputs, relative_error, run_onnx
from autoprune.artifact.program import load_program
from autoprune.errors import ArtifactError
from tests.delivered import members_of, sample


class ManyWays(nn.Module):
    """Two inputs, nested outputs, a buffer that is not saved, a size in the arithmetic, no_grad inside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3)
        self.add_module("shift-0", nn.Linear(4, 4))  # RegNet's modules have such names
        self.twin = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.twin.weight
        self.register_buffer("table", torch.linspace(0, 1, 4), persistent=False)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Any]:
        with torch.no_grad():
            scale = y.sum() * 0 + x.shape[0]
        z = nn.functional.gelu(self.conv(x), approximate="tanh").mean((2, 3)) + self.table
        z = self.get_submodule("shift-0")(z)
        return {"sum": self.tied(self.twin(z)) + y, "parts": (z * scale, z.softmax(1))}


class FixedBatch(nn.Module):
    """Its own reshape fixes the number of samples."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(3, 4).sin()


class Words(nn.Module):
    """Takes integers."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 6)

    def forward(self, ids: Tensor) -> Tensor:
        return self.embedding(ids).sum(1)


CASES: dict[str, tuple[type[nn.Module], tuple[Tensor, ...], bool]] = {
    "many ways": (ManyWays, (torch.ones(1, 2, 5, 5), torch.ones(1, 4)), True),
    "fixed batch": (FixedBatch, (torch.ones(3, 4),), False),
    "words": (Words, (torch.ones(2, 7, dtype=torch.int64),), True),
}


@pytest.mark.parametrize("case", CASES)
def test_all_forms_compute_what_torch_computes(case: str) -> None:
    kind, example, is_free = CASES[case]
    model = kind().eval()
    exported = export_model(model, example)
    assert [shape[0] for shape in exported.input_shapes] == [None if is_free else len(x) for x in example]
    module = load_program(exported.pt2)
    for batch in (1, 2, 5) if is_free else (len(example[0]),):
        inputs = probe_inputs(exported.input_shapes, exported.input_dtypes, batch=batch)
        with torch.no_grad():
            expected = flat_tensors(model(*inputs))
            same = flat_tensors(module(*inputs))
        assert all(torch.equal(a, b) for a, b in zip(same, expected, strict=True))
        assert exported.onnx is not None
        answers = [torch.as_tensor(a) for a in run_onnx(exported.onnx, inputs)]
        assert all(relative_error(a, b) <= 1e-5 for a, b in zip(answers, expected, strict=True))
    stored = load_safetensors(exported.safetensors)
    assert {n: t.shape for n, t in stored.items()} == {n: t.shape for n, t in model.state_dict().items()}


def test_onnx_is_plain_and_says_nothing_about_the_machine() -> None:
    data = members_of(sample().data)["model.onnx"]
    model = onnx.load_from_string(data)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    assert [i.name for i in model.graph.input] == ["input"]
    assert [o.name for o in model.graph.output] == ["output"]
    assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    assert not any(n.domain or n.doc_string or n.metadata_props for n in model.graph.node)


def test_no_form_holds_the_example_or_a_source_path() -> None:
    model, marked = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), torch.full((2, 12), 1.2345e-17)
    exported = export_model(model, marked)
    pattern = marked.numpy().tobytes()[:8]
    here = str(Path(__file__).parents[1]).encode()
    packages = str(Path(torch.__file__).parent).encode()
    for form in (exported.pt2, exported.onnx or b"", exported.safetensors):
        assert pattern not in form
        assert here not in form
        assert packages not in form
        assert b"forward(" not in form
    assert members_of(exported.pt2)["archive/data/sample_inputs/model.pt"] == b""


ELSEWHERE = {
    "model.pt2": (
        "import torch\n"
        "module = torch.export.load('model.pt2').module()\n"
        "x = torch.sin(torch.arange(3 * 36.)).reshape(3, 1, 6, 6)\n"
        "sys.stdout.write(str(module(x).double().tolist()))"
    ),
    "model.onnx": (
        "sys.modules['torch'] = None\n"
        "import numpy as np, onnxruntime\n"
        "x = np.sin(np.arange(3 * 36, dtype=np.float32)).reshape(3, 1, 6, 6)\n"
        "session = onnxruntime.InferenceSession('model.onnx', providers=['CPUExecutionProvider'])\n"
        "sys.stdout.write(str(session.run(None, {'input': x})[0].astype(float).tolist()))"
    ),
}


@pytest.mark.parametrize("form", ELSEWHERE)
def test_a_form_runs_where_neither_we_nor_the_class_are(form: str, tmp_path: Path) -> None:
    (tmp_path / form).write_bytes(members_of(sample().data)[form])
    code = (
        "import sys; sys.path.append(sys.argv[1])\n"
        "sys.modules['autoprune'] = sys.modules['tests'] = None\n"  # should either be installed there
    ) + ELSEWHERE[form]
    packages = str(Path(torch.__file__).parents[1])
    command = [sys.executable, "-I", "-S", "-c", code, packages]  # -S: no .pth file names our checkout
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False,
        env=os.environ | {"ORT_DISABLE_TELEMETRY": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        expected = sample().dense(torch.sin(torch.arange(3 * 36.0)).reshape(3, 1, 6, 6)).double()
    found = torch.tensor(eval(done.stdout), dtype=torch.float64)  # noqa: S307 - our own child's list
    assert relative_error(found, expected) < 1e-5


class SplitWeight(nn.Module):
    """Attention's way with its projections: one weight, cut where it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.weight.chunk(2)
        return (x @ left.T) * (x @ right.T)


def test_the_exporters_keep_their_worries_to_themselves(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    level = logging.getLogger("onnxscript").level
    export_model(SplitWeight(), torch.randn(2, 4))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("onnxscript").level == level


def test_the_caller_finds_the_model_as_it_was() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout(), nn.Flatten()).train()
    model[1].eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    torch.manual_seed(5)
    random.seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    export_model(model, torch.ones(2, 1, 4, 4))
    assert torch.equal(torch.rand(3), expected)
    assert [m.training for m in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_what_cannot_be_exported_is_an_error_for_people() -> None:
    class Odd(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(ArtifactError, match="cannot be exported"):
        export_model(Odd(), torch.ones(2, 2))


def test_the_relative_error_sees_what_comparing_misses() -> None:
    one = torch.ones(3)
    assert relative_error(one, one) == 0
    assert relative_error(one * float("nan"), one) == float("inf")
    assert relative_error(torch.ones(4), one) == float("inf")
    assert relative_error(one + 1e-3, 100 * one) == pytest.approx(0.99, rel=1e-3)
