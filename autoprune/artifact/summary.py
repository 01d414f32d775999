"""The output of `autoprune inspect`: a delivered file in a few lines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from autoprune.artifact.manifest import Manifest
from autoprune.crypto import AgeHeader
from autoprune.errors import escape_control
from autoprune.formatting import count, milliseconds, percent, size
from autoprune.record import ModelSummary

LABEL_WIDTH = 19
MAX_NAMES = 12
MAX_TEXT = 1000  # of a row: what a stranger wrote need not fill the screen


def artifact_text(file: Path, header: AgeHeader | None, manifest: Manifest | None, signer: str | None) -> str:
    """Return a delivered file as text: all of its manifest, or the part that shows without a key."""
    rows = [("file", f"{file} ({size(file.stat().st_size)})"), ("encrypted to", _recipients(header))]
    if manifest is None:
        rows.append(("content", "name a key with --identity to see it"))
    else:
        rows.append(("signed by", f"{signer} (trust it if you know that key)" if signer else "nobody"))
        rows += list(_manifest_rows(manifest))
    return "".join(
        f"{escape_control(label):<{LABEL_WIDTH}}{escape_control(text[:MAX_TEXT]).replace(chr(10), ' ')}\n"
        for label, text in rows
    )


def _recipients(header: AgeHeader | None) -> str:
    if header is None:
        return "nobody: the file is plain"
    if header.by_passphrase:
        return "a passphrase"
    kinds = [f"{header.kinds.count(kind)} x {kind}" for kind in dict.fromkeys(header.kinds)]
    return ", ".join(kinds) + (" key" if len(header.kinds) == 1 else " keys")


def _manifest_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    source = manifest.architecture
    yield "network", f"{manifest.name}: {source.class_name}, from {source.factory or 'no importable source'}"
    for spec in manifest.inputs:
        yield "input", f"{spec.dtype} {' x '.join('any' if s is None else str(s) for s in spec.shape)}"
    if manifest.preprocessing.mean:
        numbers = (
            " ".join(f"{v:g}" for v in vs) for vs in (manifest.preprocessing.mean, manifest.preprocessing.std)
        )
        yield "preprocessing", "scale to [0, 1], then mean {} std {}".format(*numbers)
    if manifest.class_names:
        more = len(manifest.class_names) - MAX_NAMES
        names = ", ".join(manifest.class_names[:MAX_NAMES])
        yield f"{len(manifest.class_names)} classes", names + (f" and {more} more" if more > 0 else "")
    for label, summary in (("before", manifest.before), ("after", manifest.after)):
        if summary is not None:
            yield label, _summary(summary)
    yield from _history_rows(manifest)
    for name, digest in manifest.members.items():
        yield name, f"{size(digest.size)}, sha256 {digest.sha256}"


def _summary(summary: ModelSummary) -> str:
    interval = f"{percent(summary.low)} to {percent(summary.high)}, n = {summary.num_samples}"
    return (
        f"top-1 {percent(summary.top1, 2)} ({interval}), {count(summary.macs)} MACs, "
        f"{count(summary.params)} parameters, {milliseconds(summary.latency_ms)}"
    )


def _history_rows(manifest: Manifest) -> Iterator[tuple[str, str]]:
    past = manifest.provenance
    if past.run:
        yield "run", f"{past.run}, {past.created}, target {past.target}, {len(past.trials)} trials"
    if past.outcome:
        yield "outcome", past.outcome
    if past.versions:
        yield "made with", ", ".join(f"{name} {version}" for name, version in past.versions.items())
