"""Attacks that are on nobody's list: wild numbers, pipes, files that change, ONNX that reaches out."""

from __future__ import annotations

import contextlib
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from autoprune.artifact.loader import load, read_weights
from autoprune.artifact.onnx_check import check_onnx
from autoprune.artifact.program import load_program
from autoprune.artifact.program_check import WEIGHTS_CONFIG
from autoprune.artifact.reader import open_artifact
from autoprune.artifact.sparse import sparse_safetensors
from autoprune.cli.main import main
from autoprune.crypto import age
from autoprune.errors import ArtifactError, escape_control
from tests.delivered import changed_json, container_of, members_of, sample, with_honest_digests

Members = dict[str, bytes]


def forged(folder: Path, data: bytes) -> Path:
    path = folder / "forged.autoprune"
    path.write_bytes(data)
    return path


def with_manifest(change: Callable[[dict[str, Any]], object]) -> bytes:
    members = members_of(sample().data)
    return container_of(
        members | {"manifest.json": changed_json(members["manifest.json"], lambda d: change(d))}
    )


def with_text(old: bytes, new: bytes) -> bytes:
    """The manifest with another text in it: what `json.dumps` would not write."""
    members = members_of(sample().data)
    assert members["manifest.json"].count(old) == 1
    return container_of(members | {"manifest.json": members["manifest.json"].replace(old, new)})


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value}
    return value


MANIFESTS: dict[str, Callable[[], bytes]] = {
    "an infinite number, as 1e999": lambda: with_text(b'"batch_size":2', b'"batch_size":1e999'),
    "an infinite probe, which every network answers": lambda: with_text(b'"outputs":[', b'"outputs":[1e999,'),
    "a whole number of 4000 digits": lambda: with_text(b'"mean":[0.5]', b'"mean":[1' + b"0" * 4000 + b"]"),
    "a whole number of 5000 digits": lambda: with_text(b'"mean":[0.5]', b'"mean":[1' + b"0" * 5000 + b"]"),
    "more than 64 bits in a shape": lambda: with_manifest(
        lambda d: d["inputs"][0].update(shape=[None, 1 << 70])
    ),
    "more than 64 bits in the plan": lambda: with_manifest(
        lambda d: d["plan"]["groups"]["stem"].update(keep=[1 << 70])
    ),
    "half a character": lambda: with_text(b'"class_names":["a"', b'"class_names":["\\ud800"'),
    "half a character as a key": lambda: with_manifest(
        lambda d: d["provenance"]["study"].update({"\udfff": 1})
    ),
    "nested as deep as Python can read": lambda: with_manifest(
        lambda d: d["provenance"].update(study=nested(900))
    ),
    "a version of a megabyte": lambda: with_manifest(lambda d: d.update(format_version="9" * 1_000_000)),
}


@pytest.mark.parametrize("attack", MANIFESTS)
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_wild_manifests_are_refused_in_plain_words(
    attack: str, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = forged(tmp_path, MANIFESTS[attack]())
    assert main([command, str(path)]) == 1
    said = capsys.readouterr().err
    assert "format version" in said
    assert "defect" not in said
    assert len(said) < 1000


BIG_PROBES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a batch of a billion": lambda d: d["probe"].update(batch_size=10**9),
    "a negative batch": lambda d: d["probe"].update(batch_size=-1),
    "an input of four terabytes": lambda d: d["inputs"][0].update(shape=[None, 1 << 20, 1 << 20]),
    "a negative size": lambda d: d["inputs"][0].update(shape=[None, -1, 6, 6]),
    "no input": lambda d: d.update(inputs=[]),
    "a function as a type": lambda d: d["inputs"][0].update(dtype="load"),
    "a type that is a module": lambda d: d["inputs"][0].update(dtype="hub"),
}


@pytest.mark.parametrize("attack", BIG_PROBES)
def test_a_file_cannot_ask_for_a_probe_of_any_size(
    attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = forged(tmp_path, with_manifest(BIG_PROBES[attack]))
    with pytest.raises(ArtifactError), pytest.warns(UserWarning, match="exported program"):
        load(path)
    assert main(["verify", str(path)]) == 1
    assert "program    FAILED" in capsys.readouterr().out


REMOVED: dict[str, dict[str, list[int]]] = {
    "a million times as much": {"0": list(range(1, 400_001)), "1": list(range(1, 400_001))},
    "the same index again and again": {"0": [1] * 9},
    "an index beyond the end": {"0": [10**9]},
    "a negative index": {"0": [-1]},
    "descending": {"0": [3, 1]},
    "a dimension that is none": {"9": [1]},
    "a dimension that is a word": {"x": [1]},
}


@pytest.mark.parametrize("attack", REMOVED)
def test_removed_indices_cannot_ask_for_any_memory(attack: str, tmp_path: Path) -> None:
    path = forged(tmp_path, with_manifest(lambda d: d.update(removed={"stem.weight": REMOVED[attack]})))
    with open_artifact(path) as artifact, pytest.raises(ArtifactError, match="do not fit"):
        sparse_safetensors(artifact)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "pipe")
    for place in (tmp_path / "pipe", Path("/dev/zero"), tmp_path):
        for words in (["inspect", place], ["verify", place], ["decrypt", place, "-o", tmp_path / "out"]):
            assert main([str(w) for w in words]) == 1
            said = capsys.readouterr().err
            assert "cannot read" in said
            assert "hint: " in said
    assert not (tmp_path / "out").exists()


def test_a_link_in_the_place_of_the_output_is_not_written_through(tmp_path: Path) -> None:
    """A dangling link looks as if nothing were there; what it points to must stay as it was."""
    file, elsewhere, link = forged(tmp_path, sample().data), tmp_path / "elsewhere", tmp_path / "out"
    link.symlink_to(elsewhere)
    assert main(["export", str(file), "--to", "onnx", "-o", str(link)]) == 0
    assert not elsewhere.exists()
    assert not link.is_symlink()
    elsewhere.write_bytes(b"mine")
    link.unlink()
    link.symlink_to(elsewhere)
    assert main(["export", str(file), "--to", "onnx", "-o", str(link)]) == 2
    assert elsewhere.read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt2", "model.onnx"])
def test_a_file_that_changes_after_it_was_checked_is_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check and the use, someone writes other weights, with the right checksum of the zip."""
    monkeypatch.setattr(age, "BUFFER", 512)  # or all of this small file would be read at once, and kept
    file = forged(tmp_path, sample().data)
    members = members_of(sample().data)
    other = container_of(members | {name: members[name][:-1] + bytes([members[name][-1] ^ 1])})
    with open_artifact(file) as artifact:
        with file.open("r+b") as stream:
            stream.write(other)
        with pytest.raises(ArtifactError):
            artifact.member(name)
        with file.open("r+b") as stream:
            stream.truncate(100)
        with pytest.raises(ArtifactError):
            artifact.member(name)


def test_a_strangers_words_cannot_steer_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wild = "\x1b]0;owned\x07\x1b[2J\u202egnp.exe\r"
    path = forged(tmp_path, with_manifest(lambda d: d.update(name=wild, class_names=[wild, "x" * 10**6])))
    assert main(["inspect", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "\\x1b]0;owned" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert len(shown) < 10_000
    keyed = forged(tmp_path, with_manifest(lambda d: d["members"].update({wild: 5})))
    assert main(["inspect", str(keyed)]) == 1
    assert "\x1b]0" not in capsys.readouterr().err
    assert escape_control("Hündchen, 犬\n\tand cat") == "Hündchen, 犬\n\tand cat"


def tensors(**header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


def f32(shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


WEIGHTS: dict[str, bytes] = {
    "overlapping": tensors(a=f32([8], 0, 32), b=f32([12], 16, 64)),
    "twice the same bytes": tensors(a=f32([16], 0, 64), b=f32([16], 0, 64)),
    "beyond the end": tensors(a=f32([1 << 40], 0, 1 << 42)),
    "backwards": tensors(a=f32([16], 64, 0)),
    "a hole": tensors(a=f32([4], 0, 16), b=f32([4], 48, 64)),
    "bytes that no tensor owns": tensors(a=f32([4], 0, 16)),
    "a shape that overflows": tensors(a=f32([1 << 32, 1 << 32, 4], 0, 64)),
    "a negative size": tensors(a=f32([-16], 0, 64)),
    "an unknown type": tensors(a={"dtype": "PICKLE", "shape": [16], "data_offsets": [0, 64]}),
    "a list for a tensor": tensors(a=[1, 2]),
    "deep nesting": struct.pack("<Q", 100_000) + b"[" * 100_000,
    "a name twice": b"".join(
        [struct.pack("<Q", 121), b'{"a":{"dtype":"F32","shape":[8],"data_offsets":[0,32]},',
         b'"a":{"dtype":"F32","shape":[8],"data_offsets":[32,64]}}'.ljust(66), bytes(64)]
    ),
    "a header longer than the file": struct.pack("<Q", 1 << 31) + bytes(64),
    "a header of negative length": struct.pack("<q", -1) + bytes(64),
}  # fmt: skip


@pytest.mark.parametrize("attack", WEIGHTS)
def test_weights_that_lie_about_where_they_are_are_refused(attack: str) -> None:
    with pytest.raises(ArtifactError, match=r"model\.safetensors"):
        read_weights(WEIGHTS[attack])


def model_onnx() -> Any:
    return onnx.load_from_string(members_of(sample().data)["model.onnx"])


def external(tensor: Any) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "../../etc/passwd"), ("offset", "0"), ("length", "4")):
        tensor.external_data.add(key=key, value=value)


def subgraph_with_external_data(model: Any) -> None:
    inner = onnx.GraphProto(name="inner")
    external(inner.initializer.add(name="w", dims=[1], data_type=1))
    model.graph.node.add(op_type="If", input=["c"], output=["y"]).attribute.add(
        name="then_branch", type=onnx.AttributeProto.GRAPH
    ).g.CopyFrom(inner)


def attribute_with_external_data(model: Any) -> None:
    tensor = onnx.TensorProto(dims=[1], data_type=1)
    external(tensor)
    model.graph.node.add(op_type="Constant", output=["c"]).attribute.add(
        name="value", type=onnx.AttributeProto.TENSOR
    ).t.CopyFrom(tensor)


def function(model: Any) -> None:
    model.functions.add(name="Evil", domain="").node.add(op_type="Relu", input=["x"], output=["y"])


ONNX: dict[str, Callable[[Any], object]] = {
    "weights from /etc/passwd": lambda m: external(m.graph.initializer[0]),
    "the same in a branch": subgraph_with_external_data,
    "the same in an attribute": attribute_with_external_data,
    "the same in sparse weights": lambda m: external(m.graph.sparse_initializer.add().values),
    "a path alone": lambda m: m.graph.initializer[0].external_data.add(key="location", value="x"),
    "an operator of a library": lambda m: m.graph.node.add(op_type="Run", domain="evil.custom"),
    "an operator of Microsoft's": lambda m: m.graph.node.add(op_type="FusedConv", domain="com.microsoft"),
    "a library's operator set": lambda m: m.opset_import.add(domain="evil.custom", version=1),
    "a function": function,
    "metadata": lambda m: m.metadata_props.add(key="user", value="ann"),
    "training": lambda m: m.training_info.add(),
}


@pytest.mark.parametrize("attack", ONNX)
def test_onnx_that_reaches_out_never_meets_a_runtime(
    attack: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_onnx()
    ONNX[attack](model)
    path = forged(
        tmp_path, with_honest_digests(members_of(sample().data) | {"model.onnx": model.SerializeToString()})
    )
    with open_artifact(path) as artifact, pytest.raises(ArtifactError, match=r"model\.onnx holds"):
        artifact.member("model.onnx")
    assert main(["verify", str(path)]) == 1
    assert "onnx       FAILED" in capsys.readouterr().out
    assert main(["export", str(path), "--to", "onnx", "-o", str(tmp_path / "x")]) == 1
    assert not (tmp_path / "x").exists()


def test_a_second_graph_behind_the_first_is_seen_too() -> None:
    """Protobuf joins two occurrences of one field; a reader that looks at one of them is fooled."""
    honest, other = members_of(sample().data)["model.onnx"], onnx.ModelProto()
    external(other.graph.initializer.add(name="w"))
    check_onnx(honest)
    with pytest.raises(ArtifactError, match="external data"):
        check_onnx(honest + other.SerializeToString())
    assert len(onnx.load_from_string(honest + other.SerializeToString()).graph.node) > 1


@pytest.mark.parametrize("data", [b"\x3a", b"\x3a\x05ab", b"\xff" * 20, b"\x0b", b"\x38\x01"])
def test_what_is_no_onnx_is_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        check_onnx(data)


def test_any_cut_of_an_onnx_file_is_read_or_refused_politely() -> None:
    honest = members_of(sample().data)["model.onnx"]
    for end in range(0, len(honest), 7):
        with contextlib.suppress(ArtifactError):
            check_onnx(honest[:end])


def program() -> Members:
    return members_of(members_of(sample().data)["model.pt2"])


def test_a_program_that_repeats_four_bytes_a_trillion_times_is_refused() -> None:
    def change(document: Any) -> None:
        meta = next(iter(document["config"].values()))["tensor_meta"]
        meta["sizes"] = [{"as_int": 1 << 20}, {"as_int": 1 << 20}]
        meta["strides"] = [{"as_int": 0}, {"as_int": 0}]

    members = program()
    bomb = members | {WEIGHTS_CONFIG: changed_json(members[WEIGHTS_CONFIG], change)}
    with pytest.raises(ArtifactError, match="repeat"):
        load_program(container_of(bomb))


def test_a_second_archive_in_a_program_is_refused() -> None:
    """A zip reader that looks for the last directory would take the second one."""
    buffer = io.BytesIO()
    torch.save({"x": torch.zeros(2)}, buffer)
    honest = container_of(program())
    for data in (honest + buffer.getvalue(), buffer.getvalue() + honest, buffer.getvalue()):
        with pytest.raises(ArtifactError, match="container"):
            load_program(data)
