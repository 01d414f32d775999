"""The manifest is read as strictly as it is written."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoprune.artifact.manifest import (
    Architecture,
    InputSpec,
    Manifest,
    Preprocessing,
    Probe,
    Provenance,
    manifest_of_run,
)
from autoprune.errors import ArtifactError
from autoprune.plan import PruningPlan
from tests.example_record import REACHED

PLAN = PruningPlan(keep={"stem": np.array([0, 2, 5])}, num_units={"stem": 6})
MANIFEST = Manifest(
    name="net",
    architecture=Architecture(
        class_name="a.B", factory="a:b", arguments={"width": 3, "flag": True, "none": None}
    ),
    plan=PLAN,
    preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)),
    class_names=("cat", "Hündchen"),
    removed={"stem.weight": {"0": (1, 3, 4)}},
    inputs=(InputSpec(shape=(None, 3, 8, 8), dtype="float32"),),
    probe=Probe(batch_size=2, outputs=(0.1, -2.5e-7)),
)


def changed(change: Callable[[dict[str, Any]], object]) -> bytes:
    document = json.loads(MANIFEST.to_json())
    change(document)
    return json.dumps(document).encode()


def test_what_is_written_is_read() -> None:
    assert Manifest.from_json(MANIFEST.to_json().encode()) == MANIFEST
    assert Manifest.from_json(replace(MANIFEST, plan=None).to_json().encode()).plan is None


def test_a_run_becomes_a_manifest() -> None:
    manifest = manifest_of_run(
        REACHED,
        architecture=MANIFEST.architecture,
        plan=PLAN,
        preprocessing=MANIFEST.preprocessing,
        class_names=("a", "b"),
    )
    again = Manifest.from_json(manifest.to_json().encode())
    assert again.before == REACHED.before
    assert again.after == REACHED.after
    assert len(again.provenance.trials) == sum(len(r.trials) for r in REACHED.rounds)
    assert again.provenance.data_digests == {s.name: s.digest for s in REACHED.data}


@pytest.mark.parametrize("version", [0, 2, "1", True, None, 1.5])
def test_other_versions_are_refused_by_name(version: object) -> None:
    with pytest.raises(ArtifactError, match="format version"):
        Manifest.from_json(changed(lambda d: d.update(format_version=version)))


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "unknown key": lambda d: d.update(extra=1),
    "unknown inner key": lambda d: d["architecture"].update(code="x"),
    "missing key": lambda d: d.pop("architecture"),
    "missing inner key": lambda d: d["probe"].pop("outputs"),
    "a number for a text": lambda d: d.update(name=3),
    "a text for a number": lambda d: d["probe"].update(batch_size="2"),
    "a bool for a number": lambda d: d["probe"].update(batch_size=True),
    "a float for a count": lambda d: d["probe"].update(batch_size=2.5),
    "null for a text": lambda d: d.update(name=None),
    "an object for a list": lambda d: d.update(class_names={"a": 1}),
    "a list as an argument": lambda d: d["architecture"]["arguments"].update(x=[1]),
    "a plan of another version": lambda d: d["plan"].update(autoprune_plan=2),
    "a plan that keeps nothing": lambda d: d["plan"]["groups"]["stem"].update(keep=[]),
    "a plan that keeps too much": lambda d: d["plan"]["groups"]["stem"].update(keep=[7]),
    "a plan that is a list": lambda d: d.update(plan=[]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_version_1_does_not_allow_is_refused(change: str) -> None:
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        Manifest.from_json(changed(CHANGES[change]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"[]",
        b"1",
        b"\xff",
        b'{"format_version":1,"format_version":1}',
        b'{"format_version":NaN}',
        b"[" * 99_999,
    ],
)
def test_what_is_no_plain_json_is_refused(data: bytes) -> None:
    with pytest.raises(ArtifactError):
        Manifest.from_json(data)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
), st.sampled_from(sorted(json.loads(MANIFEST.to_json()))))  # fmt: skip
def test_any_value_anywhere_is_read_or_refused_politely(value: object, key: str) -> None:
    with contextlib.suppress(ArtifactError):
        Manifest.from_json(changed(lambda d: d.update({key: value})))


def test_paths_of_the_machine_stay_behind() -> None:
    study = {
        "data": "cifar10:/home/alice/sets/c10",
        "note": "see ~/x/y.txt, 3/4 done",
        "list": ["/a/b", {"k": "C:\\U\\z"}],
    }
    text = replace(MANIFEST, provenance=Provenance(study=study)).to_json()
    assert "alice" not in text
    read = Manifest.from_json(text.encode()).provenance.study
    assert read == {"data": "cifar10:c10", "note": "see y.txt, 3/4 done", "list": ["b", {"k": "z"}]}
