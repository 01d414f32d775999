"""The studies that come with autoprune, and the networks that they share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autoprune.cli.study_file import built_in_studies, load_study
from autoprune.config import Study, check_study
from autoprune.data.sources import Data
from autoprune.errors import DataError
from autoprune.structure.tracing import trace
from autoprune.training.evaluation import evaluate

NAMES = (
    "digits", "mobilenetv2_photos", "resnet20_cifar10", "resnet56_cifar10", "resnet8_fashionmnist",
    "vit_digits",
)  # fmt: skip
PHOTOS = ("mobilenetv2_photos",)


@pytest.fixture(autouse=True)
def _paths(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "studies"))
    return


def made(study: Study) -> tuple[torch.nn.Module, Data]:
    assert callable(study.model)
    assert callable(study.data)
    return study.model(), study.data()


@pytest.mark.parametrize("name", NAMES)
def test_every_study_is_in_order_and_says_what_to_expect(name: str) -> None:
    check_study(load_study(name))
    text = built_in_studies()[name].read_text(encoding="utf-8")
    assert text.startswith('"""')
    assert "%" in text or "top-1" in text


def test_the_demo_takes_its_images() -> None:
    model, data = made(load_study("digits"))
    inputs, targets = next(data.search.batches(8))
    assert model(inputs).shape == (8, data.num_classes)
    assert targets.max() < data.num_classes


def test_no_study_is_forgotten() -> None:
    assert set(built_in_studies()) == set(NAMES)


@pytest.mark.parametrize("name", PHOTOS)
def test_a_study_of_photographs_asks_for_them(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = load_study(name)
    monkeypatch.delenv("AUTOPRUNE_PHOTOS", raising=False)
    assert callable(study.data)
    with pytest.raises(DataError, match="AUTOPRUNE_PHOTOS is not set"):
        study.data()


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("digits", "vit_digits", *PHOTOS)])
def test_a_study_without_its_data_says_what_to_set(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = load_study(name)
    assert callable(study.data)
    monkeypatch.delenv("AUTOPRUNE_DATA", raising=False)
    with pytest.raises(DataError, match="AUTOPRUNE_DATA is not set"):
        study.data()
    monkeypatch.setenv("AUTOPRUNE_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"lacks cifar10/train\.npz|does not exist"):
        study.data()


def test_the_networks_have_the_sizes_that_are_known_of_them() -> None:
    from models import resnet8, resnet20, resnet56  # type: ignore[import-not-found]  # studies/ is on the path

    example = torch.zeros(1, 3, 32, 32)
    cost = trace(resnet20(), example).cost()
    assert (cost.params, cost.macs) == (269_722, 40_551_040)  # He et al. 2016, table 6: 0.27 million
    assert trace(resnet56(), example).cost().params == 853_018  # 0.85 million
    assert trace(resnet8(), torch.zeros(1, 1, 16, 16)).cost().params == 77_754


@pytest.mark.data
@pytest.mark.skipif(not os.environ.get("AUTOPRUNE_DATA"), reason="AUTOPRUNE_DATA names no folder")
def test_the_published_network_scores_what_is_published_of_it() -> None:
    model, data = made(load_study("resnet20_cifar10"))
    results = [evaluate(model, s, device=os.environ.get("DEVICE", "cpu")) for s in (data.search, data.test)]
    assert [r.num_samples for r in results] == [5000, 5000]
    assert sum(r.top1 for r in results) / 2 == pytest.approx(0.9173, abs=3.5e-4)  # three images
