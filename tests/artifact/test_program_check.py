"""Hostile programs: torch would run them, so torch must never see them."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoprune.artifact.program import load_program
from autoprune.artifact.program_check import MODEL, SAMPLES, WEIGHTS_CONFIG, check_program
from autoprune.errors import ArtifactError, UsageError
from tests.delivered import changed_json, container_of, members_of, sample

Members = dict[str, bytes]
TOUCHED = "touched-by-the-attack"


class Payload:
    """Unpickling it leaves a file behind."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(TOUCHED),))


def program() -> Members:
    return members_of(members_of(sample().data)["model.pt2"])


def graph_of(document: Any) -> Any:
    return document["graph_module"]["graph"]


def edit(change: Callable[[Any], None], member: str = MODEL) -> Callable[[Members], Members]:
    return lambda members: members | {member: changed_json(members[member], change)}


def first_node(**values: Any) -> Callable[[Members], Members]:
    return edit(lambda d: graph_of(d)["nodes"][0].update(values))


def first_size(expression: str) -> Callable[[Members], Members]:
    def change(document: Any) -> None:
        sizes = graph_of(document)["tensor_values"]["x_bchw"]["sizes"]
        assert "as_expr" in sizes[0]
        sizes[0]["as_expr"]["expr_str"] = expression

    return edit(change)


def first_payload(**values: Any) -> Callable[[Members], Members]:
    return edit(lambda d: next(iter(d["config"].values())).update(values), WEIGHTS_CONFIG)


def in_spec(spec: Any) -> Callable[[Members], Members]:
    def change(document: Any) -> None:
        document["graph_module"]["module_call_graph"][0]["signature"]["in_spec"] = json.dumps([1, spec])

    return edit(change)


def huge_tensor(members: Members) -> Members:
    def change(document: Any) -> None:
        meta = next(iter(document["config"].values()))
        meta["tensor_meta"]["sizes"][0]["as_int"] = 1 << 50

    changed = edit(change, WEIGHTS_CONFIG)(members)
    return changed | {"archive/data/weights/weight_0": b""}


DEFAULTDICT = {
    "type": "collections.defaultdict",
    "context": json.dumps(
        {"default_factory_module": "antigravity", "default_factory_name": "x", "dict_context": []}
    ),
    "children_spec": [],
}
ATTACKS: dict[str, Callable[[Members], Members]] = {
    "pickled sample inputs": lambda m: m | {SAMPLES: pickle.dumps(Payload())},
    "a pickled weight": first_payload(use_pickle=True),
    "a weight from elsewhere": first_payload(path_name="../../x"),
    "a custom object": first_payload(path_name="custom_obj_0"),
    "a weight without data": first_payload(path_name="weight_99"),
    "a tensor larger than its data": huge_tensor,
    "the old weights pickle": lambda m: m | {"archive/data/weights/model.pt": pickle.dumps(Payload())},
    "a compiled library": lambda m: m | {"archive/data/aotinductor/model/x.so": b"\x7fELF"},
    "an extra file": lambda m: m | {"archive/extra/x": b""},
    "the old layout": lambda m: m | {"version": b"8.20", "serialized_state_dict.pt": pickle.dumps(Payload())},
    "a second model": lambda m: m | {"archive/models/other.json": m[MODEL]},
    "a missing member": lambda m: {k: v for k, v in m.items() if k != WEIGHTS_CONFIG},
    "torch.os.system": first_node(target="torch.os.system"),
    "torch.load": first_node(target="torch.load"),
    "torch.ops.load_library": first_node(target="torch.ops.load_library"),
    "an extension operator": first_node(target="#x.y"),
    "another namespace": first_node(target="torch.ops.prim.Print.default"),
    "operator.attrgetter": first_node(target="_operator.attrgetter"),
    "reading files": first_node(target="torch.ops.aten.from_file.default"),
    "writing files": first_node(target="torch.ops.aten.save.default"),
    "a method of an operator": first_node(target="torch.ops.aten.add.__class__"),
    "an unknown operator": first_node(target="torch.ops.aten.no_such_thing.default"),
    "code as a name": first_node(name="x = __import__('os')"),
    "code as a module's name": edit(
        lambda d: d["config"].update({'x"), exec("1"), ("': d["config"].popitem()[1]}), WEIGHTS_CONFIG
    ),
    "metadata": first_node(metadata={"source_fn_stack": "a,torch.os.system"}),
    "code in an expression": first_size("__import__('pathlib').Path('touched-by-the-attack').touch()"),
    "an attribute in an expression": first_size("Symbol('s77', positive=True).__class__"),
    "a string in an expression": first_size("Symbol('x')"),
    "a power tower": first_size("9**9**9**9"),
    "Pow": first_size("Pow(Integer(9), Integer(999999999))"),
    "a long expression": first_size("1+" * 1000 + "1"),
    "a named function": first_size("eval(1)"),
    "guards": edit(lambda d: d.update(guards_code=["__import__('os')"])),
    "importing containers": in_spec(DEFAULTDICT),
    "a named class": in_spec({"type": "os.stat_result", "context": "null", "children_spec": []}),
    "an unknown key": edit(lambda d: d.update(novelty=1)),
    "a sub-graph": edit(
        lambda d: graph_of(d)["nodes"][0]["inputs"].append({"name": "g", "arg": {"as_graph": {}}, "kind": 1})
    ),
    "a foreign device": edit(lambda d: graph_of(d)["tensor_values"]["x_bchw"]["device"].update(type="cuda")),
    "no JSON": lambda m: m | {MODEL: b"{"},
    "deep JSON": lambda m: m | {MODEL: b"[" * 100_000},
    "a doubled key": lambda m: m | {MODEL: b'{"a":1,"a":2}'},
    "nested deeply": lambda m: m | {MODEL: b'{"graph":' * 40 + b"1" + b"}" * 40},
}


def test_what_we_write_passes_and_loads() -> None:
    data = container_of(program())
    check_program(data)
    module = load_program(data)
    with torch.no_grad():
        assert torch.equal(module(sample().example), sample().dense(sample().example))


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_are_refused_before_torch_sees_them(
    attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    forged = ATTACKS[attack](program())
    assert forged != program(), "the attack changes nothing"
    with pytest.raises(ArtifactError, match=r"model\.pt2"):
        load_program(container_of(forged))
    assert not Path(TOUCHED).exists()


def test_torch_alone_would_have_run_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If this fails torch has become safer, and some of the check may go."""
    monkeypatch.chdir(tmp_path)
    buffer = io.BytesIO()
    torch.save(Payload(), buffer)
    forged = program() | {SAMPLES: buffer.getvalue()}
    with pytest.raises(Exception):  # noqa: B017, PT011 - torch stumbles after the damage is done
        torch.export.load(io.BytesIO(container_of(forged)))
    assert Path(TOUCHED).exists()


def test_a_program_is_for_evaluation_only() -> None:
    module = load_program(container_of(program()))
    assert module.eval() is module
    assert not any(m.training for m in module.modules())
    with pytest.raises(UsageError, match="cannot be trained"):
        module.train()
    assert not module.training
    assert len(list(module.parameters())) == len(list(sample().dense.parameters()))


def test_damage_is_an_error_for_people() -> None:
    members = program()
    with pytest.raises(ArtifactError, match="cannot load"):
        load_program(container_of(members | {"archive/archive_version": b"99"}))
    with pytest.raises(ArtifactError):
        load_program(container_of(members)[:-1])
