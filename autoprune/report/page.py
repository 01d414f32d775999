"""The result of a run for people: one self-contained HTML page, the same numbers as JSON, plots as PNG.

Everything is made from a `RunRecord`, that is from storage alone, so a report can be made again at any
time, also while the run goes on. The page needs no network and no script, and follows the reader's choice
of light or dark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from autoprune import formatting, serialization
from autoprune.config import DECAYS
from autoprune.files import atomic_write
from autoprune.record import RoundRecord, RunRecord, TrialRecord
from autoprune.report import narrative, plots
from autoprune.report.trial_table import importances, trials_csv

CHOSEN = ("lr", "decay", "criterion")
DELIVERED = {
    "model.autoprune.age": "the delivered model, encrypted (age v1)",
    "model.autoprune": "the delivered model: weights, .pt2, ONNX and manifest in one file",
    "study.sqlite3": "every round and trial (Optuna storage)",
    "report.json": "every number of this page",
    "trials.csv": "every trial as a table",
}


@dataclass(frozen=True, kw_only=True)
class DeliveredFile:
    """A file beside the report that a reader may want."""

    name: str
    meaning: str
    size_bytes: int

    @property
    def is_model(self) -> bool:
        """Whether the file holds the model, whose size is worth showing; a storage grows as it is read."""
        return self.name.startswith("model.")


@dataclass(frozen=True, kw_only=True)
class HowToLoad:
    """A sentence and the lines of Python that load the delivered model, and the file that they load."""

    text: str
    code: str
    file: Path


def write_report(record: RunRecord, out: Path) -> Path:
    """Write `report.html`, `report.json`, `trials.csv` and `plots/*.png` into `out`; return the page's path.

    Earlier files are replaced, each in one step, so a page that is open elsewhere is never half written.
    """
    figures = plots.draw_all(record)
    (out / "plots").mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        plots.save_png(figure, out / "plots" / f"{name}.png")
    _replace(out / "report.json", to_json(record))
    _replace(out / "trials.csv", trials_csv(record))
    svgs = {name: plots.to_svg(figure, name) for name, figure in figures.items()}
    _replace(out / "report.html", _render(record, out, svgs))
    return out / "report.html"


def _replace(path: Path, text: str) -> None:
    with atomic_write(path) as file:
        file.write(text.encode())


def to_json(record: RunRecord) -> str:
    """Return every number of the page as JSON: the answer, the derived differences, the record itself."""
    document = {
        "answer": narrative.answer(record),
        "caution": narrative.caution(record),
        "ending": narrative.ending(record),
        "derived": derived(record),
        "comparison": narrative.comparison(record.before, record.after, record.difference),
        "importances": importances(record),
        "record": record,
    }
    return serialization.json_text(document, indent=1) + "\n"


def derived(record: RunRecord) -> dict[str, float | None]:
    """Return the numbers that are computed from the record for showing."""
    before, after = record.before, record.after
    if after is None:
        return {}
    return {
        "top1_delta_pp": 100 * (after.top1 - before.top1),
        "macs_removed": 1 - after.macs / before.macs,
        "params_removed": 1 - after.params / before.params,
        "size_removed": 1 - after.size_bytes / before.size_bytes,
        "speedup": before.latency_ms / after.latency_ms if before.latency_ms and after.latency_ms else None,
    }


def _render(record: RunRecord, out: Path, svgs: Mapping[str, str]) -> str:
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page.filters |= {
        "percent": formatting.percent, "duration": formatting.duration, "size": formatting.size,
        "setting": formatting.setting, "plural": formatting.plural, "when": _when,
        "trial_status": narrative.trial_status, "keep_units_together": keep_units_together,
        "sentence": _sentence, "shown": _displayed_params,
    }  # fmt: skip
    template = page.from_string(read_asset("report.html.j2"))
    return template.render(
        css=read_asset("page.css"),
        record=record,
        out=out,
        answer=narrative.answer(record),
        rows=narrative.comparison(record.before, record.after, record.difference),
        plots={name: svgs.get(name) for name in plots.PLOTS},
        actions=formatting.ACTIONS,
        ending=narrative.ending(record),
        caution=narrative.caution(record),
        winners=list(_winners(record)),
        params=_columns(record),
        mattered=importances(record),
        total_s=sum(t.seconds for t in record.timings),
        files=_delivered(out),
        load=_how_to_load(out),
        settings=list(_flat(record.study)),
    )


def read_asset(name: str) -> str:
    """Return the text of a file that lies beside this module."""
    return (files("autoprune.report") / name).read_text(encoding="utf-8")


def _winners(record: RunRecord) -> Iterator[tuple[RoundRecord, TrialRecord]]:
    source = narrative.delivered_trial(record)
    pairs = ((round_record, trial) for round_record in record.rounds for trial in round_record.trials)
    return (pair for pair in pairs if pair[1].promoted or pair == source)


def keep_units_together(text: str) -> str:
    """Keep a number and its unit on one line, by spaces and hyphens at which no line breaks."""
    text = re.sub(r" (?=[%→]|pp\b|epochs\b)|(?<=→) ", "\u00a0", text).replace("top-1", "top\u20111")
    return text.replace("--", "-\u2060-\u2060")  # an option is not broken after its hyphens


def _sentence(text: str) -> str:
    """Make a sentence of a text: begin it with a capital and end it with a full stop."""
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def _displayed_params(trial: TrialRecord) -> dict[str, str]:
    """Return a trial's parameters for a table, those that belong to its decay written beside the decay."""
    decay = str(trial.params.get("decay", ""))
    own = {k.removeprefix(f"{decay}_"): v for k, v in trial.params.items() if _is_of(k, decay)}
    extra = "".join(f", {name} {formatting.setting(value)}" for name, value in own.items())
    plain = {
        k: formatting.setting(v) for k, v in trial.params.items() if not any(_is_of(k, d) for d in DECAYS)
    }
    return plain | ({"decay": decay + extra} if decay else {})


def _is_of(parameter: str, decay: str) -> bool:
    return bool(decay) and parameter.startswith(f"{decay}_")


def _columns(record: RunRecord) -> list[str]:
    """Return the parameters that get a column: those that every trial chooses, and others that differ.

    A value that all trials share is a setting of the run.
    """
    trials = [_displayed_params(t) for r in record.rounds for t in r.trials]
    names = dict.fromkeys(name for t in trials for name in t)
    own_columns = {"prune_rate"}  # as what was removed, in its own column
    values = {n: {t[n] for t in trials if n in t} for n in names if n not in own_columns}
    return [n for n, texts in values.items() if n in CHOSEN or len(texts) > 1]


def _when(started: str) -> str:
    try:
        return datetime.fromisoformat(started).strftime("%Y-%m-%d %H:%M %Z").strip()
    except ValueError:
        return started


def _delivered(out: Path) -> list[DeliveredFile]:
    return [
        DeliveredFile(name=name, meaning=meaning, size_bytes=(out / name).stat().st_size)
        for name, meaning in DELIVERED.items()
        if (out / name).is_file()
    ]


def _how_to_load(out: Path) -> HowToLoad | None:
    encrypted, plain = out / "model.autoprune.age", out / "model.autoprune"
    if encrypted.is_file():
        text = "The encrypted file loads in memory, with the key (or passphrase=...) it was encrypted to."
        file, call = encrypted, f'autoprune.load("{encrypted}", identity="KEY.txt")'
    elif plain.is_file():
        text = "The file loads without the training code."
        file, call = plain, f'autoprune.load("{plain}")'
    else:
        return None
    return HowToLoad(text=text, code=f"import autoprune\n\nmodel = {call}", file=file)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
            yield f"{prefix}{name}", text
