"""The dashboard as a browser and as a hostile page see it; the run behind it is a real one."""

from __future__ import annotations

import html
import json
import os
import shutil
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from wsgiref.util import setup_testing_defaults

import numpy as np
import optuna
import optuna_dashboard
import pytest
from optuna_dashboard import get_note, save_note
from PIL import Image

from autoprune import events as ev
from autoprune.config import Protection, Search
from autoprune.errors import UsageError
from autoprune.location import DATABASE
from autoprune.pipeline.run import run
from autoprune.report import annotate_studies
from autoprune.report.dashboard import Dashboard, find_labels, open_dashboard
from autoprune.storage import RunStore, set_attrs
from tests.tiny import tiny_study

PLAIN = Protection(plain=True)
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Page:
    """What the dashboard's own page asks for."""

    def __init__(self, dashboard: Dashboard) -> None:
        self.root = dashboard.address.removesuffix("/dashboard")

    def get(self, path: str) -> Any:
        return json.loads(self.raw(path))

    def raw(self, path: str) -> bytes:
        with urllib.request.urlopen(self.root + path) as answer:  # noqa: S310 - our own server
            return bytes(answer.read())

    def status(self, path: str, method: str = "GET", **headers: str) -> int:
        request = urllib.request.Request(self.root + path, method=method, headers=headers)  # noqa: S310
        try:
            with urllib.request.urlopen(request) as answer:  # noqa: S310
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code


class WsgiPage:
    """The same answers from an application without a server."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def get(self, path: str) -> Any:
        environ: dict[str, Any] = {"PATH_INFO": path}
        setup_testing_defaults(environ)
        return json.loads(b"".join(self.app(environ, lambda status, headers, info=None: None)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two finished runs."""
    folder = tmp_path_factory.mktemp("runs")
    study = tiny_study(search=Search(trials=2, epochs=1), max_drop=60.0)
    run(study, out=folder / "first", protection=PLAIN, command="autoprune run tiny")
    shutil.copytree(folder / "first", folder / "deeper" / "second")
    return folder


@pytest.fixture(scope="module")
def shown(runs: Path) -> Iterator[Dashboard]:
    dashboard = open_dashboard(str(runs), 0)
    dashboard.serve_beside()
    yield dashboard
    dashboard.server.shutdown()
    dashboard.server.server_close()


@pytest.fixture(scope="module")
def page(shown: Dashboard) -> Page:
    return Page(shown)


def find(page: Page, start: str) -> Any:
    """The study whose name starts so, as the list has it."""
    listed = page.get("/api/studies")["study_summaries"]
    return next(s for s in listed if s["study_name"].startswith(start))


def test_the_list_reads_as_the_campaign(page: Page) -> None:
    listed = page.get("/api/studies")["study_summaries"]
    names = [s["study_name"] for s in sorted(listed, key=lambda s: int(s["study_id"]))]
    assert len({names.index(n) < len(names) // 2 for n in names if n.startswith("first/")}) == 1, "runs mix"
    firsts = [n for n in names if n.startswith("first/")]
    assert len(firsts) * 2 == len(names), "both runs are in one list"
    assert firsts[0].startswith("first/round-00  original:")
    assert firsts[1].startswith("first/round-01  ")
    assert "left," in firsts[1]
    assert firsts[-1].startswith("first/final  target")
    assert "fewer MACs" in firsts[-1]
    assert {n.rpartition("/")[0] for n in names} == {"first", "deeper/second"}


def test_a_round_says_what_it_did_and_why(page: Page) -> None:
    detail = page.get(f"/api/studies/{find(page, 'first/round-01')['study_id']}")
    attributes = {a["key"]: a["value"] for a in detail["user_attrs"]}
    assert attributes["action"].strip('"') in ("promote", "finish")
    reason = attributes["reason"].strip('"')
    assert "removed" in reason
    note = detail["note"]["body"]
    assert reason[1:] in note
    assert "It started from the original with 100.0 % of the cost left" in note
    assert detail["objective_names"] == ["removed (negative: short of the floor)"]
    titles = {g["id"]: json.loads(g["graph_object"])["layout"]["title"]["text"]
              for g in detail["plotly_graph_objects"]}  # fmt: skip
    assert set(titles) == {"path", "sensitivity", "curves", "widths"}
    assert titles["path"] == "Accuracy over cost"
    assert len(detail["trials"]) == 2
    for trial in detail["trials"]:
        rows = [line for line in note.splitlines() if line.startswith(f"| \u2003{trial['number']} |")]
        assert len(rows) == 1
        assert ("recovered" in rows[0] or "promoted" in rows[0]) == (trial["values"][0] > 0)


def test_the_end_says_what_was_delivered(page: Page) -> None:
    detail = page.get(f"/api/studies/{find(page, 'first/final')['study_id']}")
    assert "fewer MACs" in detail["note"]["body"]
    assert {g["id"] for g in detail["plotly_graph_objects"]} == {"path", "widths"}


def test_the_standard_dashboard_shows_the_same(page: Page, runs: Path) -> None:
    """What a person sees is in the run's own database: no code of ours is between it and the browser."""
    served = page.get(f"/api/studies/{find(page, 'first/round-01')['study_id']}")
    storage = optuna.storages.RDBStorage(f"sqlite:///{runs / 'first' / DATABASE}")
    plain = WsgiPage(optuna_dashboard.wsgi(storage))
    listed = plain.get("/api/studies")["study_summaries"]
    one = next(s for s in listed if s["study_name"] == "tiny/round-01")
    own = plain.get(f"/api/studies/{one['study_id']}")
    for key in ("note", "objective_names", "plotly_graph_objects", "user_attrs"):
        assert own[key] == served[key]
    storage.remove_session()
    storage.engine.dispose()


def test_a_person_s_note_on_a_decided_round_stays(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "first", tmp_path / "own")
    with closing(RunStore(tmp_path / "own", "tiny")) as store:
        study = store.study(1)
        assert study is not None
        save_note(study, "mine")
        annotate_studies(store)
        assert get_note(study) == "mine"
        set_attrs(study, summary="cut off")
        annotate_studies(store)
        assert get_note(study).startswith("# Round 1")


def test_the_dashboards_own_pages_work_on_the_view(page: Page) -> None:
    one = find(page, "first/round-01")["study_id"]
    assert page.status(f"/csv/{one}") == 200
    assert page.status(f"/api/studies/{one}/plot/timeline") == 200
    assert page.status("/api/studies/999") == 404


def test_nothing_that_is_sent_changes_a_run(page: Page, runs: Path) -> None:
    before = (runs / "first" / DATABASE).read_bytes()
    assert page.status("/api/studies/1", "DELETE") == 403
    assert page.status("/api/studies", "POST") == 403
    assert page.status("/api/studies/1/note", "PUT") == 403
    assert (runs / "first" / DATABASE).read_bytes() == before
    assert page.status("/api/studies", Host="attacker.example:8080") == 421
    assert page.status("/api/studies", Host="localhost") == 200


def test_it_listens_on_this_machine_alone(shown: Dashboard) -> None:
    assert shown.server.server_address[0] == "127.0.0.1"


def test_it_works_while_the_run_is_writing(tmp_path: Path) -> None:
    """At every trial and decision the dashboard, asked from inside the run, already knows the round."""
    seen: list[list[str]] = []
    opened: list[Dashboard] = []

    def look(event: ev.Event) -> None:
        if isinstance(event, ev.RoundStarted) and not opened:
            opened.append(open_dashboard(str(tmp_path), 0))
            opened[0].serve_beside()
        if isinstance(event, ev.TrialStarted | ev.RoundDecided):
            listed = Page(opened[0]).get("/api/studies")["study_summaries"]
            seen.append([s["study_name"] for s in listed])

    study = tiny_study(search=Search(trials=1, epochs=0.5), max_drop=60.0)
    run(study, out=tmp_path / "live", protection=PLAIN, on_event=look)
    opened[0].server.shutdown()
    opened[0].server.server_close()
    assert seen[0][1].startswith("live/round-01  running: 1 trial")
    assert any(name.startswith("live/round-02") for name in seen[-1])


def test_what_holds_no_run_is_refused(tmp_path: Path, runs: Path) -> None:
    with pytest.raises(UsageError, match="there is no run"):
        open_dashboard(str(tmp_path), 0)
    assert find_labels(str(runs / "first")) == ["first"]
    first = open_dashboard(str(runs), 0)
    with pytest.raises(UsageError, match="taken"):
        open_dashboard(str(runs), first.server.server_port)
    first.server.server_close()


def visit(url: str, folder: Path, name: str) -> str:
    """What a browser shows at an address; the picture goes beside."""
    browse(folder, f"--screenshot={folder / name}", url)
    return browse(folder, "--dump-dom", url)


def browse(folder: Path, *words: str) -> str:
    """Chromium's output; on a busy machine it hangs now and then, so it is started twice."""
    for attempt in (1, 2):
        command = [
            str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--window-size=1280,1600", "--virtual-time-budget=20000",
            f"--user-data-dir={folder / f'profile-{attempt}'}", *words,
        ]  # fmt: skip
        try:
            done = subprocess.run(command, check=True, capture_output=True, timeout=90)
        except subprocess.TimeoutExpired:
            if attempt == 2:
                raise
        else:
            return done.stdout.decode()
    raise AssertionError("unreachable")


def is_drawn(picture: Path) -> bool:
    """Whether a screenshot shows more than a frame around nothing."""
    pixels = np.asarray(Image.open(picture).convert("L"))
    return bool((pixels < 160).mean() > 0.005 and len(np.unique(pixels)) > 50)


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium here (Debian package chromium)")
def test_a_person_finds_the_decision_and_the_picture(page: Page, tmp_path: Path) -> None:
    """Each page answers what one opens it for. Screenshots go to $AUTOPRUNE_SCREENSHOTS where that is set."""
    folder = Path(os.environ.get("AUTOPRUNE_SCREENSHOTS", tmp_path))
    round_1, final = (find(page, f"first/{part}")["study_id"] for part in ("round-01", "final"))
    wanted = {  # page -> what a person looks for on it
        "list": ("", "first/round-01", "first/final", "fewer MACs", "original:", "left,", "second/final"),
        "round": (f"/studies/{round_1}", "Accuracy over cost", "this round's floor", "target 50.0 %",
                  "this round removes up to", "Units left of each group", "Sensitivity", "Learning curves",
                  "ceiling", "removed (negative"),
        "note": (f"/studies/{round_1}/note", "Round 1:", "It started from", "the original", "before tuning",
                 "95 % interval"),
        "trial": (f"/studies/{round_1}/trials?numbers=0", "prune_rate", "checkpoint"),
        "final": (f"/studies/{final}", "Layer widths", "outcome", "fewer MACs"),
    }  # fmt: skip
    for name, (path, *words) in wanted.items():
        document = visit(f"{page.root}/dashboard{path}", folder, f"dashboard-{name}.png")
        shown = html.unescape(document).replace("\u00a0", " ")
        for word in words:
            assert word in shown, f"the page {name} does not show {word!r}"
        assert is_drawn(folder / f"dashboard-{name}.png"), f"the page {name} is blank"
