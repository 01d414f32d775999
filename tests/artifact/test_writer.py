"""The delivered file as a whole: what comes back, what is refused, and what never touches the disk."""

from __future__ import annotations

import copy
import io
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import pyrage
import pytest
import torch

from autoprune.artifact.loader import architecture_of, build_original, load
from autoprune.artifact.manifest import Architecture
from autoprune.artifact.program import DeliveredProgram
from autoprune.artifact.reader import open_artifact
from autoprune.artifact.sparse import sparse_safetensors
from autoprune.artifact.verification import verify_artifact
from autoprune.artifact.writer import write_artifact
from autoprune.config import Protection
from autoprune.crypto.keys import keygen
from autoprune.crypto.signing import sign_manifest, signing_keygen
from autoprune.errors import ArtifactError, AutopruneError, UsageError
from autoprune.plan import PruningPlan
from autoprune.structure.densify import densify, masked
from autoprune.structure.tracing import trace
from tests.delivered import (
    SmallNet,
    SmallNetOf,
    changed_json,
    container_of,
    members_of,
    sample,
    small_net,
    with_honest_digests,
    without_source,
)
from tests.structure.test_engine import Trunk

Members = dict[str, bytes]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.autoprune"
    path.write_bytes(sample().data)
    return path


def written(folder: Path, data: bytes) -> Path:
    path = folder / "forged.autoprune"
    path.write_bytes(data)
    return path


@cache
def sourceless() -> bytes:
    """The same file, with a class that nobody can import."""
    members = members_of(sample().data)
    source = {"class_name": without_source(sample().manifest).class_name, "factory": None, "arguments": {}}
    changed = changed_json(members["manifest.json"], lambda d: d.update(architecture=source))
    return container_of(members | {"manifest.json": changed})


def answer(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(sample().example)


def test_the_users_class_comes_back_with_the_same_numbers(file: Path) -> None:
    module = load(file)
    assert type(module) is SmallNet
    assert not any(m.training for m in module.modules())
    assert torch.equal(answer(module), answer(sample().dense))
    assert module.train().training, "the user's class can be trained on"


def test_without_the_class_the_program_gives_the_same_numbers(tmp_path: Path) -> None:
    module = load(written(tmp_path, sourceless()))
    assert isinstance(module, DeliveredProgram)
    module.eval()
    assert torch.equal(answer(module), answer(sample().dense))
    again = copy.deepcopy(module)
    assert torch.equal(answer(again), answer(module))


def test_a_class_that_changed_is_not_used(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Same names and shapes, another function: only the probe can tell."""
    monkeypatch.setattr(SmallNet, "forward", lambda self, x: self.head(self.stem(x).mean((2, 3))) * 0)
    with pytest.warns(UserWarning, match="using the exported program"):
        module = load(file)
    assert isinstance(module, DeliveredProgram)
    monkeypatch.undo()
    assert torch.equal(answer(module), answer(sample().dense))


def test_a_trunk_pruned_behind_layer_norms_comes_back_in_its_class(tmp_path: Path) -> None:
    original, example = Trunk().eval(), torch.randn(4, 6)
    graph = trace(original, example, norms="rescale")
    plan = PruningPlan.random(graph, 0.4, seed=0)
    dense = densify(original, graph, plan)
    manifest = replace(sample().manifest, architecture=architecture_of(original, Trunk), plan=plan)
    path = tmp_path / "trunk.autoprune"
    write_artifact(path, model=dense, example_inputs=example, manifest=manifest, graph=graph)
    module = load(path)
    assert isinstance(module, Trunk)
    assert torch.equal(module(example), dense(example))


def test_loading_leaves_the_random_numbers_alone(file: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    load(file)
    assert torch.equal(torch.rand(2), expected)


def test_the_original_takes_the_sparse_weights(file: Path) -> None:
    from safetensors.torch import load as load_safetensors

    with open_artifact(file) as artifact:
        weights = load_safetensors(sparse_safetensors(artifact))
    untouched = small_net().eval()
    untouched.load_state_dict(weights, strict=True)
    assert {n: t.shape for n, t in weights.items()} == {
        n: t.shape for n, t in sample().original.state_dict().items()
    }
    assert torch.allclose(answer(untouched), answer(sample().dense), rtol=1e-5, atol=1e-6)
    assert sample().manifest.plan is not None
    reference = masked(sample().original, sample().graph, sample().manifest.plan)
    assert torch.allclose(answer(untouched), answer(reference), rtol=1e-5, atol=1e-6)


def test_verification_compares_all_forms(file: Path) -> None:
    with open_artifact(file) as artifact:
        found = {c.name: c.passed for c in verify_artifact(artifact)}
    assert found.pop("signature") is None
    assert all(found.values())
    assert list(found) == ["digests", "program", "weights", "onnx", "dense", "sparse"]


def test_verification_finds_forms_that_disagree(tmp_path: Path) -> None:
    members = members_of(sample().data)
    data = bytearray(members["model.safetensors"])
    data[-1] ^= 0x40  # the exponent of the last weight
    forged = written(tmp_path, with_honest_digests(members | {"model.safetensors": bytes(data)}))
    with open_artifact(forged) as artifact:
        found = {c.name: c.passed for c in verify_artifact(artifact)}
    assert found["weights"] is False
    assert found["dense"] is False
    with pytest.warns(UserWarning, match="exported program"):
        assert isinstance(load(forged), DeliveredProgram)


def resigned(members: Members, key: Path) -> bytes:
    signature = sign_manifest(members["manifest.json"], key)
    rest = {n: d for n, d in members.items() if not n.startswith("manifest")}
    return container_of({"manifest.json": members["manifest.json"], "manifest.sig": signature, **rest})


def test_a_required_signature_is_checked_before_any_tensor_is_built(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = signing_keygen(tmp_path / "author")
    signing_keygen(tmp_path / "mallory")
    signed = written(tmp_path, resigned(members_of(sample().data), tmp_path / "author"))
    assert type(load(signed, require_signature=public)) is SmallNet
    with open_artifact(signed) as artifact:
        assert artifact.signer == public
    monkeypatch.setattr(torch, "empty", None)
    monkeypatch.setattr(torch, "tensor", None)
    with pytest.raises(ArtifactError, match="not signed"):
        load(file, require_signature=public)
    foreign = written(tmp_path, resigned(members_of(sample().data), tmp_path / "mallory"))
    with pytest.raises(ArtifactError, match="another key"):
        load(foreign, require_signature=public)
    with pytest.raises(UsageError):
        load(foreign, require_signature=tmp_path / "no.pub")


def test_writing_signs_and_encrypts(tmp_path: Path) -> None:
    key, author = tmp_path / "key", tmp_path / "author"
    protection = Protection(recipients=(keygen(key),), signing_key=author)
    public = signing_keygen(author)
    target = tmp_path / "model.autoprune.age"
    plain = replace(sample().manifest, removed={}, members={}, probe=None, inputs=())
    write_artifact(
        target, model=sample().dense, example_inputs=sample().example, manifest=plain, protection=protection
    )
    assert torch.equal(answer(load(target, identity=key, require_signature=public)), answer(sample().dense))
    with pytest.raises(ArtifactError, match="cannot be opened"):
        load(target, identity=str(pyrage.x25519.Identity.generate()))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "author",
        "author.pub",
        "key",
        "model.autoprune.age",
    ]


def members_changed(**changes: bytes) -> Callable[[Members], bytes]:
    named = {name.replace("_", ".", 1): data for name, data in changes.items()}
    return lambda members: container_of(members | named)


def oversized_header(members: Members) -> bytes:
    data = (1 << 62).to_bytes(8, "little") + members["model.safetensors"][8:]
    return with_honest_digests(members | {"model.safetensors": data})


def pickled_weights(members: Members) -> bytes:
    return with_honest_digests(members | {"model.safetensors": pickle.dumps({"stem.weight": 1})})


def torch_weights(members: Members) -> bytes:
    buffer = io.BytesIO()
    torch.save(sample().dense.state_dict(), buffer)
    return with_honest_digests(members | {"model.safetensors": buffer.getvalue()})


def another_program(members: Members) -> bytes:
    """Honest digests, harmless program, other numbers: the probe is what is left to tell."""
    inner = members_of(members["model.pt2"])
    name = next(n for n in inner if n.endswith("weight_1"))
    return with_honest_digests(
        members | {"model.pt2": container_of(inner | {name: b"\x01" * len(inner[name])})}
    )


ATTACKS: dict[str, Callable[[Members], bytes]] = {
    "other weights": members_changed(model_safetensors=b"x" * 5000),
    "older manifest, newer weights": lambda m: container_of(
        m | {"model.safetensors": m["model.safetensors"][:-1] + b"\1"}
    ),
    "other program": members_changed(model_pt2=b""),
    "other onnx": members_changed(model_onnx=b""),
    "no onnx though listed": lambda m: container_of({k: v for k, v in m.items() if k != "model.onnx"}),
    "no weights": lambda m: container_of({k: v for k, v in m.items() if k != "model.safetensors"}),
    "no manifest": lambda m: container_of({k: v for k, v in m.items() if k != "manifest.json"}),
    "another member": lambda m: container_of(m | {"model.pkl": pickle.dumps(1)}),
    "a checkpoint inside": lambda m: container_of(m | {"data.pkl": pickle.dumps(1)}),
    "another order": lambda m: container_of(dict(reversed(m.items()))),
    "a short signature": lambda m: container_of(
        {"manifest.json": m["manifest.json"], "manifest.sig": b"x", **m}
    ),
    "a long signature": lambda m: container_of(
        {"manifest.json": m["manifest.json"], "manifest.sig": bytes(97), **m}
    ),
    "a null signature": lambda m: container_of(
        {"manifest.json": m["manifest.json"], "manifest.sig": bytes(96), **m}
    ),
    "no manifest text": members_changed(manifest_json=b""),
    "oversized safetensors header": oversized_header,
    "a pickle as weights": pickled_weights,
    "a torch file as weights": torch_weights,
    "an empty file": lambda m: b"",
    "a pickle": lambda m: pickle.dumps(m),
    "an ELF file": lambda m: b"\x7fELF" + bytes(500),
    "cut": lambda m: container_of(m)[:-100],
    "a trailing byte": lambda m: container_of(m) + b"\0",
    "two in a row": lambda m: 2 * container_of(m),
}
ONLY_THE_CLASS_MINDS = {"oversized safetensors header", "a pickle as weights", "a torch file as weights"}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused(attack: str, tmp_path: Path) -> None:
    forged = ATTACKS[attack](members_of(sample().data))
    path = written(tmp_path, forged)
    if attack in ONLY_THE_CLASS_MINDS:
        with open_artifact(path) as artifact, pytest.raises(ArtifactError, match="safetensors"):
            sparse_safetensors(artifact)
    else:
        with pytest.raises(ArtifactError):
            load(path)


def test_a_program_with_other_numbers_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path, another_program(members_of(sourceless())))
    with pytest.raises(ArtifactError, match="probe"):
        load(path)


TOUCH = "touched-by-the-attack"
HOSTILE = {
    "os:mkdir": {"path": TOUCH},
    "posix:mkdir": {"path": TOUCH},
    "subprocess:getoutput": {"cmd": f"touch {TOUCH}"},
    "tests.delivered:members_of": {"data": TOUCH},
    f"{__name__}:unannotated": {},
    f"{__name__}:Path": {},
    "torch.hub:load": {"repo_or_dir": "x", "model": "y"},
    "torch.nn:Linear.__init__.__globals__": {},
    "no.such.module:x": {},
    "tests.delivered:no_such": {},
    "tests.delivered:small_net:x": {},
    "": {},
}


def unannotated() -> object:
    """A function that builds a network, but does not say so: it could be anything."""
    Path(TOUCH).touch()
    return SmallNet()


@pytest.mark.parametrize("factory", HOSTILE)
def test_a_file_cannot_make_us_call_what_it_likes(
    factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = {"class_name": "x", "factory": factory, "arguments": HOSTILE[factory]}
    members = members_of(sample().data)
    changed = changed_json(members["manifest.json"], lambda d: d.update(architecture=source))
    module = load(written(tmp_path, container_of(members | {"manifest.json": changed})))
    assert isinstance(module, DeliveredProgram)
    assert not Path(TOUCH).exists()


def test_arguments_that_are_places_are_not_passed_on() -> None:
    source = architecture_of(SmallNet(), SmallNetOf({"width": 8}))
    assert build_original(source) is not None
    assert build_original(replace(source, arguments={"width": "hf-hub:x/y"})) is None
    assert build_original(replace(source, arguments={"width": "/etc/passwd"})) is None
    assert build_original(replace(source, arguments={"nonsense": 1})) is None


def test_the_source_of_a_network_is_found_where_it_can_be_called_again() -> None:
    network = SmallNet()
    assert architecture_of(network, SmallNet).factory == "tests.delivered:SmallNet"
    assert architecture_of(network, small_net).factory == "tests.delivered:small_net"
    assert architecture_of(network, SmallNetOf({"width": 8})).arguments == {"width": 8}
    for factory in (None, network, lambda: network, partial(small_net, width=8), network.forward):
        assert architecture_of(network, factory) == Architecture(class_name="SmallNet")
    assert architecture_of(network, SmallNetOf({"width": [8]})).factory is None, "a list is no plain value"


UNABLE_TO_WRITE = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8, 8))
import torch
from autoprune.artifact.loader import load
from autoprune.artifact.export import run_onnx
from autoprune.artifact.reader import open_artifact
from autoprune.plan import PruningPlan
file, key = sys.argv[1:]
module = load(file, identity=key)
module(torch.ones(2, 1, 6, 6))
with open_artifact(file, identity=key) as artifact:
    run_onnx(artifact.member("model.onnx"), (torch.ones(2, 1, 6, 6),))
sys.stdout.write(type(module).__name__)
"""


@pytest.mark.parametrize("kind", ["SmallNet", "DeliveredProgram"])
def test_no_plaintext_touches_the_disk_when_loading(tmp_path: Path, kind: str) -> None:
    """The kernel lets that process, native code included, write no file of more than 8 bytes.

    Eight, because Python's `tempfile` tries a folder out with four.
    """
    key, file, tmp = tmp_path / "key", tmp_path / "model.age", tmp_path / "tmp"
    recipient = pyrage.x25519.Recipient.from_str(keygen(key))
    file.write_bytes(pyrage.encrypt(sample().data if kind == "SmallNet" else sourceless(), [recipient]))
    tmp.mkdir()
    root = str(Path(__file__).parents[2])
    environment = {"TMPDIR": str(tmp), "PYTHONPATH": root, "PYTHONDONTWRITEBYTECODE": "1", "HOME": str(tmp)}
    command = [sys.executable, "-c", UNABLE_TO_WRITE, file, key]
    done = subprocess.run(command, env=environment, cwd=tmp, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == kind
    assert [p for p in tmp.rglob("*") if p.is_file()] == []


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    manifest = replace(sample().manifest, members={})
    arguments = {"model": sample().dense, "example_inputs": sample().example, "manifest": manifest}
    with pytest.raises(AutopruneError):
        write_artifact(tmp_path / "no" / "folder", **arguments)  # type: ignore[arg-type]
    for protection in (
        Protection(recipients=("age1nonsense",)),
        Protection(plain=True, signing_key=tmp_path / "none"),
    ):
        with pytest.raises(UsageError):
            write_artifact(tmp_path / "out", protection=protection, **arguments)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_where_the_network_comes_from(file: Path) -> None:
    document = json.loads(members_of(file.read_bytes())["manifest.json"])
    assert document["format_version"] == 1
    assert document["architecture"]["factory"] == "tests.delivered:small_net"
    assert document["inputs"] == [{"shape": [None, 1, 6, 6], "dtype": "float32"}]
    assert set(document["members"]) == {"model.safetensors", "model.pt2", "model.onnx"}


def test_loading_warns_of_nothing(file: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(file)
