"""The manifest: what a delivered file says about itself, as values and as strict JSON.

The caller fills in what the run knows; the writer of the file adds what follows from the network (inputs,
probe, removed indices, digests). Reading is as strict as writing: a missing, unknown or doubled key, or a
value of another type, is refused. `docs/format.md`, section 3, is the specification.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from autoprune.errors import ArtifactError, AutopruneError
from autoprune.plan import PruningPlan
from autoprune.record import ModelSummary, RunRecord
from autoprune.serialization import SerializationError, from_plain, parse_json, to_plain

FORMAT_VERSION = 1
MAX_MANIFEST = 32 << 20  # docs/format.md, section 2
# An absolute path, or one below the home folder, up to its last part.
PATH = re.compile(r"(?<![\w.])(?:~|/|[A-Za-z]:\\)[^\s'\",;]*[/\\]")
Plain = bool | int | float | str | None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The class of the original network, and the call that builds it.

    Attributes:
        class_name: the name of the class, for people.
        factory: `module:qualname` of a class or function, or None when it cannot be imported.
        arguments: keyword arguments of the factory.
    """

    class_name: str
    factory: str | None = None
    arguments: dict[str, Plain] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class InputSpec:
    """One input: its shape, with None where any size is allowed (the batch), and its type's name."""

    shape: tuple[int | None, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The mean and standard deviation per channel, of inputs scaled to [0, 1]."""

    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class TrialNote:
    """A summary of one trial of the run."""

    round: int
    number: int
    params: dict[str, Plain]
    top1: float | None
    cost_share: float | None
    promoted: bool


@dataclass(frozen=True, kw_only=True)
class DecisionNote:
    """The controller's decision after one round, and its reason."""

    round: int
    action: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """The origin of the network; `study` holds the resolved settings as plain values."""

    run: str = ""
    created: str = ""
    target: str = ""
    max_drop_pp: float | None = None
    outcome: str = ""
    study: dict[str, Any] = field(default_factory=dict)
    trials: tuple[TrialNote, ...] = ()
    decisions: tuple[DecisionNote, ...] = ()
    data_digests: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """The delivered network's answer to the fixed probe input."""

    batch_size: int
    outputs: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class MemberDigest:
    """The size and SHA-256 of one member."""

    sha256: str
    size: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description that a delivered file gives of itself.

    The writer fills in `removed`, `inputs`, `probe` and `members`.
    """

    name: str
    architecture: Architecture
    plan: PruningPlan | None = None
    preprocessing: Preprocessing = field(default_factory=Preprocessing)
    class_names: tuple[str, ...] = ()
    before: ModelSummary | None = None
    after: ModelSummary | None = None
    provenance: Provenance = field(default_factory=Provenance)
    removed: dict[str, dict[str, tuple[int, ...]]] = field(default_factory=dict)
    inputs: tuple[InputSpec, ...] = ()
    probe: Probe | None = None
    members: dict[str, MemberDigest] = field(default_factory=dict)

    def to_json(self) -> str:
        """Return the manifest as JSON, with the paths of this machine cut down to file names."""
        document = {"format_version": FORMAT_VERSION, **to_plain(replace(self, plan=None))}
        document["plan"] = None if self.plan is None else json.loads(self.plan.to_json())
        tidy = _without_paths(document)
        return json.dumps(tidy, separators=(",", ":"), allow_nan=False, ensure_ascii=False)

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Read a manifest from the JSON that `to_json` wrote.

        Raises:
            ArtifactError: the text has another format version, or anything that version 1 does not allow.
        """
        try:
            document = parse_json(data)
            if not isinstance(document, dict):
                raise SerializationError("it is no object")
            _check_version(document.pop("format_version", None))
            plan = _decode_plan(document.get("plan"))
            result = from_plain(cls, {**document, "plan": None}, exact=True)
        except SerializationError as error:
            raise _refusal(str(error)) from None
        return replace(result, plan=plan)


def _check_version(version: Any) -> None:
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ArtifactError(
            f"the file has format version {repr(version)[:40]}; this autoprune reads {FORMAT_VERSION}",
            "install the version of autoprune that wrote it",
        )


def manifest_of_run(
    record: RunRecord,
    *,
    architecture: Architecture,
    plan: PruningPlan | None,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...],
) -> Manifest:
    """Make the manifest of a run's delivered network from the run's record."""
    trials = tuple(
        TrialNote(
            round=r.number, number=t.number, params=_scalars(t.params), top1=t.top1, cost_share=t.cost_share,
            promoted=t.promoted,
        )
        for r in record.rounds
        for t in r.trials
    )  # fmt: skip
    decisions = tuple(
        DecisionNote(round=r.number, action=r.action, reason=r.reason) for r in record.rounds if r.action
    )
    provenance = Provenance(
        run=record.name, created=record.started, target=record.target, max_drop_pp=record.max_drop_pp,
        outcome=record.outcome.message if record.outcome else "", study=record.study, trials=trials,
        decisions=decisions, data_digests={s.name: s.digest for s in record.data},
        versions=record.environment,
    )  # fmt: skip
    return Manifest(
        name=record.name, architecture=architecture, plan=plan, preprocessing=preprocessing,
        class_names=class_names, before=record.before, after=record.after, provenance=provenance,
    )  # fmt: skip


def _scalars(values: Mapping[str, Any]) -> dict[str, Plain]:
    return {
        k: v if v is None or isinstance(v, bool | int | float | str) else str(v) for k, v in values.items()
    }


def _without_paths(value: Any) -> Any:
    """Cut absolute paths in a plain value down to their last part.

    Folders say who trained where; the last part of a path is enough for people.
    """
    if isinstance(value, str):
        return PATH.sub("", value)
    if isinstance(value, dict):
        return {k: _without_paths(v) for k, v in value.items()}
    return [_without_paths(v) for v in value] if isinstance(value, list) else value


def _refusal(problem: str) -> ArtifactError:
    return ArtifactError(
        f"manifest.json is not of format version {FORMAT_VERSION}: {problem}",
        "get the file again",
    )


def _decode_plan(value: Any) -> PruningPlan | None:
    try:
        return None if value is None else PruningPlan.from_json(json.dumps(value))
    except AutopruneError as error:
        raise _refusal(f"its plan cannot be used ({error.message})") from None
