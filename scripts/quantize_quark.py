"""Delivered file -> decrypted in memory -> AMD Quark -> quantized ONNX, with top-1 before and after.

    python scripts/quantize_quark.py runs/digits/model.autoprune.age --study digits -o digits-xint8.onnx
    python scripts/quantize_quark.py model.autoprune.age --data cifar10:DIR --config VINT8 -o model.onnx

Runs in Quark's own virtual environment (docs/quantize.md says how to make it); with `--config ORT`, ONNX
Runtime's static quantization, any environment with autoprune will do. Calibrates on part of the `train`
split and measures on the `search` split, as the run did; the test split stays unread.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from autoprune.artifact.export import silent_onnxruntime
from autoprune.artifact.reader import ONNX, Artifact, open_artifact
from autoprune.cli.study_file import load_study
from autoprune.crypto.age import encrypt_chunks
from autoprune.data.sources import Data, Split, load_data
from autoprune.errors import AutopruneError, UsageError
from autoprune.files import write_chunks
from autoprune.metrics import Evaluation, difference_pp

BATCH = 32
Images = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Result:
    """What quantization cost: top-1 on the search split, the difference with its paired interval."""

    artifact: str
    config: str
    tool: str
    num_calibration: int
    num_samples: int
    top1_before: float
    top1_after: float
    difference_pp: float
    low_pp: float
    high_pp: float
    bytes_before: int
    bytes_after: int


class Calibration:
    """The reader that both quantizers want: one dictionary of inputs after another, then None."""

    def __init__(self, name: str, batches: list[Images]) -> None:
        self.name = name
        self.batches = batches
        self.rewind()

    def rewind(self) -> None:
        """Start again."""
        self._rest: Iterator[Images] = iter(self.batches)

    def get_next(self) -> dict[str, Images] | None:
        """The next batch."""
        batch = next(self._rest, None)
        return None if batch is None else {self.name: batch}


def quark_config(name: str) -> Any:
    """Quark's configuration for in-memory quantization."""
    from quark.onnx import VINT8_QCONFIG, Int8Spec, QConfig, QLayerConfig, XInt8Spec

    spec = Int8Spec if name == "A8W8" else XInt8Spec
    options: dict[str, Any] = {"EnableNPUCnn": True} if name == "XINT8" else {}
    if name == "VINT8":  # the options of its ready-made configuration, but with real calibration data
        options = {**VINT8_QCONFIG.extra_options["extra_options"], "UseRandomData": False}
    return QConfig(
        global_config=QLayerConfig(input_tensors=spec(), weight=spec()),
        extra_options={**options, "CryptoMode": True, "PrintSummary": False},
    )


def quantize_with_quark(model: onnx.ModelProto, reader: Calibration, config: str) -> onnx.ModelProto:
    """Quantize in memory (`CryptoMode`: without it, two plaintext files lie in TMPDIR meanwhile).

    Raises:
        UsageError: Quark is not here.
        AutopruneError: it gave nothing; it logs its errors and returns None.
    """
    try:
        from quark.onnx import ModelQuantizer
    except ImportError:
        raise UsageError(
            "AMD Quark is not installed in this environment", "see docs/quantize.md, or use --config ORT"
        ) from None
    quantized = ModelQuantizer(quark_config(config)).quantize_model(model, calibration_data_reader=reader)
    if not isinstance(quantized, onnx.ModelProto) or not _quantize_nodes(quantized):
        raise AutopruneError("Quark gave no quantized model", "its own messages above say why")
    return quantized


def _quantize_nodes(model: onnx.ModelProto) -> int:
    return sum(
        "QuantizeLinear" in node.op_type or "QuantizeLinear" in node.domain for node in model.graph.node
    )


def quantize_with_onnxruntime(model: onnx.ModelProto, reader: Calibration) -> onnx.ModelProto:
    """ONNX Runtime's static quantization: int8, per channel, QDQ.

    It works through files. They lie in memory (/dev/shm) while it does, for its owner alone.
    """
    import tempfile

    silent_onnxruntime()
    from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Images] | None:
            return reader.get_next()

    memory = Path("/dev/shm")  # noqa: S108 - a file system in memory; the folder in it is made safely
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
        target, usual = Path(name) / "quantized.onnx", tempfile.tempdir
        tempfile.tempdir = name  # ONNX Runtime makes temporary folders of its own, with the weights in them
        try:
            quantize_static(
                model,
                target,
                Reader(),
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
            )
        finally:
            tempfile.tempdir = usual
        return onnx.load(target)


def evaluate(model: onnx.ModelProto, split: Split) -> Evaluation:
    """Top-1 of an ONNX classifier on a split."""
    runtime = silent_onnxruntime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    if any(node.domain not in ("", "ai.onnx", "ai.onnx.ml", "com.microsoft") for node in model.graph.node):
        from quark.onnx import get_library_path

        options.register_custom_ops_library(get_library_path())
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    correct = []
    for images, labels in split.batches(BATCH):
        scores = session.run(None, {name: images.numpy()})[0]
        correct.append(scores.argmax(1) == labels.numpy())
    joined = np.concatenate(correct)
    return Evaluation(top1=float(joined.mean()), loss=float("nan"), num_samples=len(joined), correct=joined)


def calibration_of(data: Data, name: str, count: int) -> Calibration:
    """`count` samples of the train split, evenly spread over it, without augmentation."""
    chosen = np.unique(
        np.linspace(0, len(data.train) - 1, min(count, len(data.train))).round().astype(np.int64)
    )
    part = data.train.take(chosen)
    return Calibration(name, [images.numpy() for images, _ in part.batches(BATCH)])


def quantize(artifact: Artifact, data: Data, config: str, count: int) -> tuple[onnx.ModelProto, Result]:
    """Quantize the ONNX form of an opened file and measure what it cost."""
    float_bytes = artifact.member(ONNX)
    model = onnx.load_from_string(float_bytes)
    before = evaluate(model, data.search)
    reader = calibration_of(data, model.graph.input[0].name, count)
    if config == "ORT":
        quantized = quantize_with_onnxruntime(model, reader)
    else:
        quantized = quantize_with_quark(model, reader, config)
    after = evaluate(quantized, data.search)
    delta, interval = difference_pp(after, before)
    tool = f"onnxruntime {version('onnxruntime')}" if config == "ORT" else f"amd-quark {version('amd-quark')}"
    return quantized, Result(
        artifact=artifact.manifest.name, config=config, tool=tool,
        num_calibration=sum(len(b) for b in reader.batches), num_samples=after.num_samples,
        top1_before=before.top1, top1_after=after.top1, difference_pp=delta, low_pp=interval.low,
        high_pp=interval.high, bytes_before=len(float_bytes), bytes_after=quantized.ByteSize(),
    )  # fmt: skip


def data_of(arguments: argparse.Namespace) -> Data:
    """The run's data, from its study or from a data spec."""
    if arguments.study:
        made = load_study(arguments.study).data
        return made() if callable(made) else made
    return load_data(arguments.data, seed=arguments.seed)


def main() -> int:
    """Parse the command line, quantize, write, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("artifact", type=Path)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--study", help="the study of the run: a built-in name or a .py file")
    source.add_argument("--data", help="or its data: cifar10:DIR, fashionmnist:DIR, imagefolder:DIR, digits")
    parser.add_argument("--seed", type=int, default=0, help="of the data's cut, as in the run")
    parser.add_argument("--config", choices=["XINT8", "VINT8", "A8W8", "ORT"], default="XINT8")
    parser.add_argument("--calibration", type=int, default=256, help="samples to calibrate on")
    parser.add_argument("--identity", "-i", action="append", help="key file, as for autoprune inspect")
    parser.add_argument(
        "--recipient", "-r", action="append", default=[], help="encrypt the result to this key"
    )
    parser.add_argument("--out", "-o", type=Path, required=True)
    arguments = parser.parse_args()
    try:
        result = run(arguments)
    except AutopruneError as error:
        sys.stderr.write(f"error: {error.message}\nhint: {error.hint}\n")
        return error.exit_code
    print(json.dumps(asdict(result), indent=1))
    return 0


def run(arguments: argparse.Namespace) -> Result:
    """Open, quantize, write."""
    out: Path = arguments.out
    if out.exists():
        raise UsageError(f"{out} exists, and nothing is overwritten", "choose another name with -o")
    opened = open_artifact(arguments.artifact, identity=arguments.identity)
    with opened as artifact, redirect_stdout(sys.stderr):  # Quark talks on stdout, which is for the result
        model, result = quantize(artifact, data_of(arguments), arguments.config, arguments.calibration)
    content = model.SerializeToString()
    if arguments.recipient:
        encrypt_chunks(out, iter([content]), recipients=arguments.recipient)
    else:
        write_chunks(out, [content])
    return result


if __name__ == "__main__":
    sys.exit(main())
