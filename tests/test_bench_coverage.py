"""The coverage benchmark, through its command line, on networks that are quick."""

from __future__ import annotations

import csv
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "bench_coverage.py"
TINY = ("torchvision:squeezenet1_1", "torchvision:mnasnet0_5")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


def rows(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    with out.with_suffix(".csv").open(newline="", encoding="utf-8") as file:
        return {(r["model"], r["tool"]): r for r in csv.DictReader(file)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("coverage") / "tiny"
    result = bench(*TINY, "--no-peer", "--out", str(out))
    assert result.returncode == 0, result.stderr
    return out


def test_networks_are_exact_and_their_cost_is_the_counted_one(measured: Path) -> None:
    found = rows(measured)
    assert {model for model, _ in found} == {"torchvision/squeezenet1_1", "torchvision/mnasnet0_5"}
    for row in found.values():
        assert row["outcome"] == "exact", row
        assert row["macs_after"] == row["counted_macs"] != row["macs"]
        assert row["params_after"] == row["counted_params"]
        assert float(row["difference"]) < 1e-9 < float(row["effect"])
        assert float(row["reach"]) > 0.99
        assert row["note"] == ""


def test_the_page_says_what_was_measured(measured: Path) -> None:
    page = measured.with_suffix(".md").read_text(encoding="utf-8")
    first = page.splitlines()[2]
    assert first.startswith("- **autoprune: 2 of 2 networks exact**")
    assert "command: `python benchmarks/bench_coverage.py torchvision:squeezenet1_1" in page
    assert "| torchvision/mnasnet0_5 | exact |" in page


def test_networks_that_are_in_the_table_are_not_measured_again(measured: Path) -> None:
    before = measured.with_suffix(".csv").read_bytes()
    result = bench(*TINY, "--no-peer", "--out", str(measured))
    assert result.returncode == 0
    assert result.stdout.count("\n") == 1, result.stdout
    assert measured.with_suffix(".csv").read_bytes() == before


@pytest.mark.slow
def test_a_process_is_ended_at_its_limit_and_the_rest_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "short"
    result = bench(*TINY, "--no-peer", "--limit-s", "0.3", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert [r["outcome"] for r in rows(out).values()] == ["timeout", "timeout"]
    assert "0 of 2 networks exact" in out.with_suffix(".md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_name_that_says_nothing_is_refused(tmp_path: Path) -> None:
    result = bench("torchvision:no_such*", "--no-peer", "--out", str(tmp_path / "none"))
    assert result.returncode == 1
    assert "names no network" in result.stderr


@pytest.mark.slow
@pytest.mark.skipif(find_spec("torch_pruning") is None, reason="torch-pruning is only in the `bench` extra")
def test_the_peer_is_measured_beside(tmp_path: Path) -> None:
    out = tmp_path / "both"
    result = bench(TINY[0], "--out", str(out))
    assert result.returncode == 0, result.stderr
    row = rows(out)["torchvision/squeezenet1_1", "torch-pruning"]
    assert row["outcome"] == "ok", row
    assert 0 < int(row["macs_after"]) < int(row["macs"])
    assert "| completed by both | 1 |" in out.with_suffix(".md").read_text(encoding="utf-8")
