"""What a delivered `model.onnx` may hold, checked on its bytes before an ONNX runtime sees them.

A runtime follows external data to whatever path the file names, and looks for operators of other domains in
whatever libraries it was given. Neither is in a delivered file (`docs/format.md`, section 6). The check walks
the protobuf encoding itself, so that a file of 2 GiB is looked at without a copy; field numbers are those of
`onnx.proto`. It sees every occurrence of a field, so a second one cannot hide behind the first.
"""

from __future__ import annotations

from collections.abc import Iterator

from autoprune.errors import ArtifactError

MODEL, GRAPH, NODE, ATTRIBUTE, TENSOR, SPARSE, OPSET = range(7)
# Message -> field -> the message in it.
INNER = {
    MODEL: {7: GRAPH, 8: OPSET},
    GRAPH: {1: NODE, 5: TENSOR, 15: SPARSE},
    NODE: {5: ATTRIBUTE},
    ATTRIBUTE: {5: TENSOR, 6: GRAPH, 10: TENSOR, 11: GRAPH, 22: SPARSE, 23: SPARSE},
    TENSOR: {},
    SPARSE: {1: TENSOR, 2: TENSOR},
    OPSET: {},
}
FORBIDDEN = {
    (MODEL, 14): "metadata", (MODEL, 20): "training information", (MODEL, 25): "functions",
    (TENSOR, 13): "external data",
}  # fmt: skip
TEXTS = {(NODE, 7): "an operator of", (OPSET, 1): "the operator set"}
STANDARD = (b"", b"ai.onnx")
LOCATION = (TENSOR, 14)
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types of protobuf
MAX_DEPTH = 32  # a guess: ten subgraphs inside one another; Python gives up at a thousand


def _refusal(problem: str) -> ArtifactError:
    return ArtifactError(
        f"model.onnx holds what a delivered network may not hold: {problem}",
        "get the file again, or export the network again",
    )


def check_onnx(data: bytes) -> None:
    """Refuse external data, functions, metadata, and operators outside the standard domain.

    Raises:
        ArtifactError: the bytes hold one of these (the message names the first), or are no ONNX model.
    """
    try:
        _check(memoryview(data), MODEL, 0)
    except IndexError:
        raise _refusal("a field that ends early") from None


def _check(message: memoryview, kind: int, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise _refusal("too much nesting")
    for number, value in _fields(message):
        key = (kind, number)
        if key in FORBIDDEN:
            raise _refusal(FORBIDDEN[key])
        if key == LOCATION and value != 0:
            raise _refusal("external data")
        if key in TEXTS and (isinstance(value, int) or bytes(value[:60]) not in STANDARD):
            domain = value if isinstance(value, int) else bytes(value[:60])
            raise _refusal(f"{TEXTS[key]} domain {domain!r}")
        if number in INNER[kind]:
            if isinstance(value, int):
                raise _refusal("a field of another type")
            _check(value, INNER[kind][number], depth + 1)


def _fields(message: memoryview) -> Iterator[tuple[int, memoryview | int]]:
    position, end = 0, len(message)
    while position < end:
        tag, position = _varint(message, position)
        number, wire = tag >> 3, tag & 7
        if wire == VARINT:
            value, position = _varint(message, position)
            yield number, value
        elif wire == BYTES:
            size, position = _varint(message, position)
            if size > end - position:
                raise _refusal("a field that ends early")
            yield number, message[position : position + size]
            position += size
        elif wire in (FIXED64, FIXED32):
            position += 8 if wire == FIXED64 else 4
        else:
            raise _refusal("an unknown kind of field")


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position
        if shift > 63:
            raise _refusal("a number that is too long")
