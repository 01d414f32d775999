"""A file that an earlier autoprune wrote is read, and would be written again byte for byte.

`vectors/format1.autoprune` is the network of `tests/delivered.py`, pruned and signed, as commit 1f64e8b wrote
it (2026-11-26, torch 2.14.1). It is never made anew: a reader that refuses it breaks format version 1.
"""

from __future__ import annotations

from pathlib import Path

from autoprune.artifact.loader import load
from autoprune.artifact.manifest import DecisionNote, Manifest
from autoprune.artifact.reader import MANIFEST, member_chunks, open_artifact
from autoprune.artifact.verification import verify_artifact
from tests.delivered import SmallNet

FILE = Path(__file__).parent / "vectors/format1.autoprune"
AUTHOR = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDLM2tKCYGWzsifzwsULiB6P5bh9uYSQwmXdw7GMDMf5"


def test_a_file_of_an_earlier_autoprune_is_what_it_was() -> None:
    with open_artifact(FILE, require_signature=AUTHOR) as artifact:
        assert {c.name: c.passed for c in verify_artifact(artifact)} == dict.fromkeys(
            ("digests", "signature", "program", "weights", "onnx", "dense", "sparse"), True
        )
        manifest = artifact.manifest
    assert isinstance(load(FILE), SmallNet)
    assert manifest.before is not None
    assert manifest.after is not None
    assert (manifest.before.latency_ms, manifest.after.latency_ms) == (0.5, None)
    assert manifest.provenance.study == {"seed": 0, "search": {"lr": [0.001, 0.1], "trials": None}}
    assert manifest.provenance.trials[0].params["decay"] == "cosine"
    assert manifest.provenance.decisions == (
        DecisionNote(round=1, action="finish", reason="the target is reached"),
    )


def test_the_same_manifest_and_members_are_the_same_bytes() -> None:
    with open_artifact(FILE) as artifact:
        text = artifact.container.read(MANIFEST)
        assert Manifest.from_json(text).to_json().encode() == text
        assert b"".join(bytes(chunk) for chunk in member_chunks(artifact)) == FILE.read_bytes()
