from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from autoprune.data.sources import load_data
from autoprune.data.spec import parse_data
from autoprune.data.splits import IMAGENET
from autoprune.errors import DataError


def test_a_name_and_a_folder_are_enough() -> None:
    plain = parse_data("cifar10:/data/cifar,10")
    assert (plain.name, plain.folder, plain.size, plain.normalization) == (
        "cifar10", Path("/data/cifar,10"), None, None,
    )  # fmt: skip
    assert parse_data("digits").folder is None


def test_options_follow_after_commas() -> None:
    spec = parse_data("imagefolder:photos,size=64,normalize=imagenet")
    assert (spec.folder, spec.size, spec.normalization) == (Path("photos"), 64, IMAGENET)


@pytest.mark.parametrize(
    ("how", "mean", "std"),
    [
        ("half", (0.5,) * 3, (0.5,) * 3),
        ("none", (0.0,) * 3, (1.0,) * 3),
        ("0.5/0.25", (0.5,) * 3, (0.25,) * 3),
        ("0.1:0.2:0.3/1:2:3", (0.1, 0.2, 0.3), (1.0, 2.0, 3.0)),
    ],
)
def test_normalizations_have_names_or_numbers(how: str, mean: object, std: object) -> None:
    found = parse_data(f"cifar10:x,normalize={how}").normalization
    assert found is not None
    assert (found.mean, found.std) == (mean, std)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("cifar1:x", "did you mean cifar10?"),
        ("cifar10:x,normalise=half", "did you mean normalize?"),
        ("cifar10:x,normalize=imagnet", "did you mean imagenet?"),
        ("cifar10:x,normalize=0.5", "MEAN/STD"),
        ("cifar10:x,normalize=0.5/0", "MEAN/STD"),
        ("digits,normalize=imagenet", "one for each"),
        ("cifar10:x,size=64", "imagefolder"),
        ("imagefolder:x,size=big", "size=64"),
        ("imagefolder:x,channels=2", "channels=1 for grey"),
        ("cifar10:x,channels=1", "imagefolder"),
    ],
)
def test_what_is_wrong_is_named_with_the_nearest(text: str, hint: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_data(text)
    assert hint in caught.value.hint


def test_small_pictures_of_the_given_size_come_as_they_are(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 2, 16, 16, 3), dtype=np.uint8)
    for number, pair in enumerate(pixels):
        for name, image in zip(("cat", "dog"), pair, strict=True):
            (tmp_path / name).mkdir(exist_ok=True)
            Image.fromarray(image).save(tmp_path / name / f"{number}.png")
    data = load_data(f"imagefolder:{tmp_path},size=16,normalize=none", search_from="train")
    assert data.input_shape == (3, 16, 16)
    assert data.class_names == ("cat", "dog")
    x, _ = next(iter(data.test.batches(4)))
    known = {image.tobytes() for image in pixels.reshape(-1, 16, 16, 3)}
    back_NHWC = (255 * x).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    assert all(image.numpy().tobytes() in known for image in back_NHWC)
    (tmp_path / "dog" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png is no picture"):
        load_data(f"imagefolder:{tmp_path},size=16", search_from="train")


@pytest.mark.parametrize("options", ["channels=1,size=16", "channels=1"])
def test_a_folder_of_grey_pictures_feeds_a_network_of_one_channel(tmp_path: Path, options: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16), dtype=np.uint8)
    for number, image in enumerate(pixels):
        folder = tmp_path / ("cat", "dog")[number % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{number}.png")
    data = load_data(f"imagefolder:{tmp_path},{options},normalize=none", search_from="train")
    x, _ = next(iter(data.train.batches(4)))
    assert tuple(x.shape[1:]) == data.input_shape == (1, *((16, 16) if "size" in options else (224, 224)))
    if "size" in options:
        known = {image.tobytes() for image in pixels}
        assert all((255 * one).round().byte().numpy().tobytes() in known for one in x)
