"""What an exported program (`model.pt2`) may hold: a list, and a check that admits nothing else.

`torch.export.load` trusts its input: it unpickles sample inputs and weights, loads libraries, passes shape
expressions to `eval` and calls whatever below `torch` a node names. `check_program` runs before torch sees a
byte. `docs/format.md`, section 5, is the specification; the schema is torch's `_export/serde/schema.py`.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from typing import Any

import torch

from autoprune.artifact.container import Container
from autoprune.errors import ArtifactError
from autoprune.serialization import SerializationError, parse_json
from autoprune.torch_private import OpOverload, OpOverloadPacket, schema_of

ROOT = "archive/"
MODEL = ROOT + "models/model.json"
WEIGHTS, CONSTANTS = ROOT + "data/weights/", ROOT + "data/constants/"
WEIGHTS_CONFIG = WEIGHTS + "model_weights_config.json"
CONSTANTS_CONFIG = CONSTANTS + "model_constants_config.json"
SAMPLES = ROOT + "data/sample_inputs/model.pt"
FIXED_MEMBERS = {
    MODEL, WEIGHTS_CONFIG, CONSTANTS_CONFIG, SAMPLES, ROOT + "archive_format", ROOT + "archive_version",
    ROOT + "byteorder", ROOT + ".data/version", ROOT + ".data/serialization_id",
}  # fmt: skip
# Guesses, far above what the largest networks need; each bounds the work on a hostile file.
MAX_MEMBERS = 100_000
MAX_JSON = 256 << 20
MAX_DEPTH = 32
MAX_REPEATED = 1 << 28  # elements that tensors may have beyond their data, by strides of zero; a guess

IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,200}")
# Names of modules, which torch writes into code as getattr(..., "NAME"): nothing that could end that text.
DOTTED = re.compile(r"[A-Za-z0-9_+:@ -]+(\.[A-Za-z0-9_+:@ -]+)*")
# Sizes as sympy and torch print them (s0, u0), and the functions of shapes that torch knows by name.
SYMBOL = re.compile(
    r"Symbol\('([suz][0-9]{1,9})'(, (positive|integer|nonnegative)=(True|False)){0,3}\)|\b[suz][0-9]{1,9}\b"
)
EXPRESSION = re.compile(
    r"(?:\b(?:Integer|Add|Mul|Max|Min|Mod|PythonMod|FloorDiv|CleanDiv|CeilDiv|ModularIndexing|Equality"
    r"|Unequality|GreaterThan|StrictGreaterThan|LessThan|StrictLessThan|And|Or|Not|true|false)\b"
    r"|\b[0-9]{1,12}\b|[(), +-]|(?<!\*)\*(?!\*)|//)*"
)
# Text arguments of operators, such as padding modes and einsum equations.
MODE_WORD = re.compile(r"[A-Za-z0-9_ ,.<>=()-]{0,200}")
ATEN = re.compile(r"torch\.ops\.aten\.([A-Za-z0-9_]+)\.([A-Za-z0-9_]+)")
SCALAR_OPERATORS = {
    *(f"_operator.{n}" for n in (
        "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pos", "getitem",
        "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_",
    )),
    *(f"math.{n}" for n in ("ceil", "floor", "trunc")),
    *(f"torch.sym_{n}" for n in ("max", "min", "sum", "not", "int", "float", "ite")),
}  # fmt: skip
CONTAINERS = {"builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None}
TEXT_RULES = {
    "name": IDENTIFIER, "as_name": IDENTIFIER, "forward_arg_names": IDENTIFIER,
    "parameter_name": DOTTED, "buffer_name": DOTTED, "tensor_constant_name": DOTTED,
    "as_string": MODE_WORD, "fqn": re.compile(""), "type": re.compile("cpu"),
    "torch_version": re.compile(r"[0-9A-Za-z.+-]{1,60}"), "verifiers": re.compile("[A-Z]{1,20}"),
    "path_name": re.compile("(weight|tensor)_[0-9]{1,9}"),
}  # fmt: skip
NAMED_MAPS = {
    "tensor_values": IDENTIFIER, "sym_int_values": IDENTIFIER, "sym_float_values": IDENTIFIER,
    "sym_bool_values": IDENTIFIER, "range_constraints": re.compile("[suz][0-9]{1,9}"), "config": DOTTED,
}  # fmt: skip
EMPTY = {"metadata", "guards_code", "custom_obj_values", "treespec_namedtuple_fields"}
KNOWN_KEYS = {
    *TEXT_RULES, *NAMED_MAPS, *EMPTY, "target", "expr_str", "in_spec", "out_spec", "graph_module",
    "graph", "signature", "module_call_graph", "opset_version", "aten", "schema_version", "major",
    "minor", "inputs", "outputs", "nodes", "arg", "kind", "is_hop_single_tensor_return",
    "is_single_tensor_return", "input_specs", "output_specs", "parameter", "buffer", "tensor_constant",
    "user_input", "user_output", "persistent", "min_val", "max_val", "dtype", "sizes", "strides",
    "storage_offset", "requires_grad", "device", "index", "layout", "as_none", "as_tensor", "as_tensors",
    "as_int", "as_ints", "as_float", "as_floats", "as_bool", "as_bools", "as_sym_int", "as_sym_ints",
    "as_sym_bool", "as_sym_bools", "as_sym_float", "as_sym_floats", "as_scalar_type", "as_memory_format",
    "as_layout", "as_device", "as_optional_tensor", "as_optional_tensors", "as_expr", "as_int_lists",
    "as_nested_tensors", "hint", "is_param", "use_pickle", "tensor_meta",
}  # fmt: skip


def _refusal(problem: str) -> ArtifactError:
    return ArtifactError(
        f"model.pt2 holds what a delivered program may not hold: {problem}",
        "export it again; a network with custom operators or control flow has no safe program",
    )


def check_program(data: bytes) -> None:
    """Refuse a program that could do anything but compute on its inputs.

    Raises:
        ArtifactError: the program holds something that is not on the list; the message names the first.
    """
    archive = Container(io.BytesIO(data), max_entries=MAX_MEMBERS)
    if missing := FIXED_MEMBERS - set(archive.entries):
        raise _refusal(f"not all of its members ({min(missing)} is missing)")
    if archive.entries[SAMPLES].size:
        raise _refusal("sample inputs")
    allowed = set(FIXED_MEMBERS)
    for config, folder in ((WEIGHTS_CONFIG, WEIGHTS), (CONSTANTS_CONFIG, CONSTANTS)):
        allowed |= _check_payloads(_json(archive, config), folder, archive)
    if extra := set(archive.entries) - allowed:
        raise _refusal(f"the member {min(extra)}")
    document = _json(archive, MODEL)
    _check_value(document, "", 0)


def _json(archive: Container, name: str) -> Any:
    try:
        return parse_json(archive.read(name, limit=MAX_JSON))
    except SerializationError:
        raise _refusal(f"{name} is no plain JSON") from None


def _check_payloads(config: Any, folder: str, archive: Container) -> set[str]:
    _check_value(config, "", 0)
    members, repeated = set(), 0
    try:
        for payload in config["config"].values():
            member = folder + payload["path_name"]
            members.add(member)
            if payload["use_pickle"] is not False or member not in archive.entries:
                raise _refusal(f"a pickle, or no data, for {payload['path_name']}")
            size = archive.entries[member].size
            if _extent_bytes(payload["tensor_meta"]) > size:
                raise _refusal(f"a tensor larger than its data, {payload['path_name']}")
            repeated += max(0, _elements(payload["tensor_meta"]) - size)
            if repeated > MAX_REPEATED:
                raise _refusal("tensors that repeat a little data without measure")
    except (KeyError, TypeError, AttributeError):
        raise _refusal("an incomplete list of tensors") from None
    return members


def _elements(meta: Mapping[str, Any]) -> int:
    return math.prod(int(s["as_int"]) for s in meta["sizes"])


def _extent_bytes(meta: Mapping[str, Any]) -> int:
    sizes = [int(s["as_int"]) for s in meta["sizes"]]
    strides = [int(s["as_int"]) for s in meta["strides"]]
    offset = int(meta["storage_offset"]["as_int"])
    if min([*sizes, *strides, offset]) < 0 or len(sizes) != len(strides):
        raise _refusal("a negative size")
    if 0 in sizes:
        return 0
    last = offset + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return last + 1  # at least one byte an element; torch checks the rest against the data


def _check_value(value: Any, key: str, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _refusal("too much nesting")
    if key in EMPTY and value:
        raise _refusal(f"a {key} that is not empty")
    if isinstance(value, dict):
        for name, inner in value.items():
            _check_key(name, key)
            _check_value(inner, key + "[]" if key in NAMED_MAPS else name, depth + 1)
    elif isinstance(value, list):
        for inner in value:
            _check_value(inner, key, depth + 1)
    elif isinstance(value, str):
        _check_text(value, key)


def _check_key(name: str, parent: str) -> None:
    rule = NAMED_MAPS.get(parent)
    if not (rule.fullmatch(name) if rule else name in KNOWN_KEYS):
        raise _refusal(f"the key {name[:60]!r}")


def _check_text(text: str, key: str) -> None:
    if key == "target":
        _check_operator(text)
    elif key == "expr_str":
        if len(text) > 1000 or not EXPRESSION.fullmatch(SYMBOL.sub("1", text)):
            raise _refusal(f"the expression {text[:60]!r}")
    elif key in ("in_spec", "out_spec"):
        _check_tree(text)
    elif key not in TEXT_RULES or not TEXT_RULES[key].fullmatch(text):
        raise _refusal(f"the text {text[:60]!r} as {key[:60]!r}")


def _check_operator(target: str) -> None:
    if target in SCALAR_OPERATORS:
        return
    match = ATEN.fullmatch(target)
    packet = getattr(torch.ops.aten, match[1], None) if match else None
    if match and isinstance(packet, OpOverloadPacket) and hasattr(packet, match[2]):
        operator = getattr(packet, match[2])
        is_operator = isinstance(operator, OpOverload)
        if is_operator and not any(a.name == "filename" for a in schema_of(operator).arguments):
            return
    raise _refusal(f"the operator {target[:80]!r}")


def _check_tree(text: str) -> None:
    def check(spec: Any) -> None:
        if set(spec) != {"type", "context", "children_spec"} or spec["type"] not in CONTAINERS:
            raise ValueError
        keys = json.loads(spec["context"]) if spec["context"] is not None else None
        if not (keys is None or (isinstance(keys, list) and all(isinstance(k, str | int) for k in keys))):
            raise ValueError
        for child in spec["children_spec"]:
            check(child)

    try:
        version, spec = json.loads(text)
        if version != 1:
            raise ValueError
        check(spec)
    except (ValueError, TypeError, KeyError, RecursionError):
        raise _refusal("inputs or outputs other than tuples, lists and dictionaries of tensors") from None
