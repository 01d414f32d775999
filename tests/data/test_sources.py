from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset

from autoprune.data.sources import Data, LoaderSplit, TensorSplit, cut, from_datasets, load_data
from autoprune.data.splits import Augmentation, Normalization
from autoprune.errors import DataError

GREY = Normalization(mean=(0.5,), std=(0.25,))


def grey_split(count: int, *, start: int = 0, augmentation: Augmentation | None = None) -> TensorSplit:
    """Images that are all different: image i holds i in its first two pixels."""
    images = torch.full((count, 1, 6, 6), 100, dtype=torch.uint8)
    numbers = torch.arange(start, start + count)
    images[:, 0, 0, 0], images[:, 0, 0, 1] = numbers // 256, numbers % 256
    how = augmentation or Augmentation()
    return TensorSplit(images, numbers % 5, normalization=GREY, augmentation=how)


class Numbers(Dataset[tuple[Tensor, int]]):
    classes = ("even", "odd")

    def __init__(self, count: int, *, noisy: bool = False) -> None:
        self.count, self.noisy = count, noisy

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        noise = torch.rand(3) if self.noisy else torch.zeros(3)
        return torch.full((3,), float(index)) + noise, index % 2


def stacked(split: TensorSplit | LoaderSplit, **how: object) -> Tensor:
    return torch.cat([x for x, _ in split.batches(7, **how)])  # type: ignore[arg-type]


def test_in_order_every_sample_comes_once_and_normalised() -> None:
    split = grey_split(20)
    images = stacked(split)
    labels = torch.cat([y for _, y in split.batches(7)])
    assert images.shape == (20, 1, 6, 6)
    assert labels.tolist() == [i % 5 for i in range(20)]
    assert images[3, 0, 0, 1].item() == pytest.approx((3 / 255 - 0.5) / 0.25)


def test_training_batches_are_full_shuffled_and_the_same_for_a_seed() -> None:
    split = grey_split(20)
    batches = list(split.batches(7, seed=1))
    assert [len(x) for x, _ in batches] == [7, 7]
    assert split.num_batches(7) == 2
    assert torch.equal(stacked(split, seed=1), stacked(split, seed=1))
    assert not torch.equal(stacked(split, seed=1), stacked(split, seed=2))
    assert [len(x) for x, _ in split.batches(64, seed=1)] == [20], "one short batch rather than none"


def test_augmentation_shifts_and_flips_each_image_by_its_own_draw() -> None:
    image = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6) + 1
    how = Augmentation(crop_pad=1, flip=True)
    split = TensorSplit(image.repeat(200, 1, 1, 1), torch.zeros(200), normalization=GREY, augmentation=how)
    seen = stacked(split, seed=3, augment=True) * 0.25 + 0.5
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1)).float() / 255
    possible = [
        window if flip else window.flip(-1)
        for dy in range(3) for dx in range(3) for flip in (False, True)
        for window in [padded[..., dy : dy + 6, dx : dx + 6]]
    ]  # fmt: skip
    matches = torch.stack([((seen - p).abs().amax((1, 2, 3)) < 1e-6) for p in possible])
    assert matches.any(0).all(), "every image is one of the 18 that crop and flip allow"
    assert matches.any(1).all(), "and each of them occurs"
    assert torch.equal(stacked(split, seed=3), stacked(split, seed=4)), "without augment nothing changes"


def test_the_callers_random_state_is_left_alone() -> None:
    state = torch.get_rng_state()
    stacked(grey_split(20), seed=1, augment=True)
    stacked(LoaderSplit(Numbers(8, noisy=True)), seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_cut_is_stratified_disjoint_and_always_the_same() -> None:
    split = grey_split(100)
    parts = cut(split, 0.3, seed=0)
    again = cut(split, 0.3, seed=0)
    assert (len(parts.part), len(parts.rest)) == (30, 70)
    assert isinstance(parts.part, TensorSplit)
    assert torch.bincount(parts.part.labels_N).tolist() == [6] * 5
    assert not set(parts.part.identities()) & set(parts.rest.identities())
    assert parts.part.digest() == again.part.digest()
    assert parts.part.digest() != cut(split, 0.3, seed=1).part.digest()
    with pytest.raises(DataError, match="leaves one side empty"):
        cut(split, 0.0, seed=0)


def test_a_share_of_a_split_is_the_same_for_a_seed() -> None:
    split = grey_split(50)
    assert len(split.subset(0.5, seed=0)) == 25
    assert split.subset(0.5, seed=0).digest() == split.subset(0.5, seed=0).digest()
    assert split.subset(1.0, seed=0) is split


def test_splits_that_share_an_image_are_refused() -> None:
    def data(search: TensorSplit) -> Data:
        return Data(train=grey_split(20), search=search, test=grey_split(9, start=90), num_classes=5,
                    input_shape=(1, 6, 6))  # fmt: skip

    data(grey_split(10, start=20))
    with pytest.raises(DataError, match=r"2 of the 10 search samples are in the train split too"):
        data(grey_split(10, start=18))
    with pytest.raises(DataError, match="the search split is empty"):
        data(grey_split(0))


def test_overlap_is_found_through_subsets_of_one_dataset() -> None:
    numbers = Numbers(30)
    data = from_datasets(Subset(numbers, range(20)), Subset(numbers, range(20, 30)))
    assert (len(data.train), len(data.search), len(data.test)) == (18, 2, 10)
    with pytest.raises(DataError, match="5 of the 15 test samples are in the train split too"):
        from_datasets(Subset(numbers, range(20)), Subset(numbers, range(15, 30)), val=Numbers(4))


def test_any_map_style_dataset_will_do() -> None:
    data = from_datasets(Numbers(40), Numbers(10), val=Numbers(12), augmented=Numbers(40, noisy=True))
    assert (data.num_classes, data.class_names, data.input_shape) == (2, ("even", "odd"), (3,))
    assert data.mean == ()
    plain = torch.cat([x for x, _ in data.train.batches(8, seed=0)])
    noisy = torch.cat([x for x, _ in data.train.batches(8, seed=0, augment=True)])
    assert not torch.equal(plain, noisy)
    assert torch.equal(plain, noisy.floor()), "the same samples, other noise"
    assert len(set(data.digests.values())) == 3


def test_a_samples_augmentation_depends_on_seed_and_sample_alone() -> None:
    noisy = Numbers(12, noisy=True)
    alone = LoaderSplit(noisy, np.array([5]))
    many = LoaderSplit(noisy)
    first = next(iter(alone.batches(1, seed=3)))[0][0]
    batches = torch.cat([x for x, _ in many.batches(4, seed=3)])
    assert any(torch.equal(first, row) for row in batches)


@pytest.mark.slow
def test_workers_change_nothing() -> None:
    split = Numbers(12, noisy=True)
    here = stacked(LoaderSplit(split), seed=3)
    assert torch.equal(here, stacked(LoaderSplit(split, num_workers=2), seed=3))


def test_a_dataset_without_pairs_is_refused() -> None:
    class Alone(Numbers):
        def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
            return torch.zeros(3)

    with pytest.raises(DataError, match="no pair of an input tensor and a target"):
        from_datasets(Alone(10), Alone(10))
    with pytest.raises(DataError, match="does not have the 10 samples"):
        from_datasets(Numbers(10), Numbers(10), augmented=Numbers(9))


def test_digits_come_with_scikit_learn() -> None:
    trained_here = load_data("digits", search_from="train")
    came_trained = load_data("digits", search_from="test")
    sizes = [len(s) for s in (trained_here.train, trained_here.search, trained_here.test)]
    assert sum(sizes) == 1797
    assert min(sizes) >= 400
    assert trained_here.input_shape == (1, 16, 16)
    assert abs(len(came_trained.search) - len(came_trained.test)) <= 10
    assert trained_here.digests == load_data("digits", search_from="train").digests
    assert trained_here.digests != load_data("digits", search_from="train", seed=1).digests


@pytest.mark.parametrize(
    ("spec", "message", "hint"),
    [
        ("digit", "no data set 'digit'", "did you mean digits"),
        ("fashion-mnist:/tmp", "no data set 'fashion-mnist'", "did you mean fashionmnist"),
        ("xyz", "no data set 'xyz'", "known are digits, cifar10:DIR"),
        ("cifar10", "needs a folder", "cifar10:DIR"),
        ("cifar10:/no/such/folder", "there is no folder /no/such/folder", "nearest folder that exists is /"),
        ("digits:/tmp", "comes with scikit-learn", "just digits"),
    ],
)
def test_what_cannot_be_found_is_named(spec: str, message: str, hint: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        load_data(spec)
    assert hint in caught.value.hint


def some_cifar(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
    return images, np.arange(count, dtype=np.uint8) % 10


def test_cifar10_is_read_from_arrays(tmp_path: Path) -> None:
    for seed, part in enumerate(("train", "test")):
        images, labels = some_cifar(40, seed)
        np.savez(tmp_path / f"{part}.npz", images=images, labels=labels)
    data = load_data(f"cifar10:{tmp_path}", search_from="test")
    assert (len(data.train), len(data.search), len(data.test)) == (40, 20, 20)
    assert data.class_names[3] == "cat"
    assert isinstance(data.train, TensorSplit)
    assert torch.equal(
        data.train.images_NCHW[7], torch.from_numpy(some_cifar(40, 0)[0][7].transpose(2, 0, 1))
    )


def test_cifar10_is_read_from_the_binary_batches(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for seed, name in enumerate(("test_batch", *(f"data_batch_{i}" for i in range(1, 6)))):
        images, labels = some_cifar(20, seed)
        records = np.concatenate([labels[:, None], images.transpose(0, 3, 1, 2).reshape(20, -1)], axis=1)
        (folder / f"{name}.bin").write_bytes(records.tobytes())
    data = load_data(f"cifar10:{tmp_path}", search_from="test")
    assert len(data.train) == 100
    assert isinstance(data.train, TensorSplit)
    assert torch.equal(
        data.train.images_NCHW[0], torch.from_numpy(some_cifar(20, 1)[0][0].transpose(2, 0, 1))
    )


@pytest.mark.parametrize("damage", ["empty", "text", "shape", "labels", "pickle", "missing"])
def test_a_damaged_cifar10_is_refused(tmp_path: Path, damage: str) -> None:
    images, labels = some_cifar(20, 0)
    path = tmp_path / "train.npz"
    np.savez(tmp_path / "test.npz", images=images, labels=labels)
    if damage == "empty":
        path.touch()
    elif damage == "text":
        path.write_text("no archive")
    elif damage == "shape":
        np.savez(path, images=images[:, :16], labels=labels)
    elif damage == "labels":
        np.savez(path, images=images, labels=labels + 1)
    elif damage == "pickle":
        np.savez(path, images=images.astype(object), labels=labels)
    with pytest.raises(DataError, match=r"train.npz (is damaged|does not exist)"):
        load_data(f"cifar10:{tmp_path}")


def write_idx(path: Path, array: np.ndarray) -> None:
    shape = b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    path.write_bytes(gzip.compress(bytes((0, 0, 8, array.ndim)) + shape + array.tobytes()))


@pytest.mark.parametrize("below", ["", "raw", "FashionMNIST/raw"])
def test_fashionmnist_is_read_wherever_it_lies(tmp_path: Path, below: str) -> None:
    folder = tmp_path / below
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for part, count in (("train", 100), ("t10k", 30)):
        write_idx(
            folder / f"{part}-images-idx3-ubyte.gz", rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        )
        write_idx(folder / f"{part}-labels-idx1-ubyte.gz", np.arange(count, dtype=np.uint8) % 10)
    data = load_data(f"fashionmnist:{tmp_path}", search_from="train")
    assert (len(data.train), len(data.search), len(data.test)) == (90, 10, 30)
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(b"not gzip")
    with pytest.raises(DataError, match="is damaged or of another kind"):
        load_data(f"fashionmnist:{tmp_path}")
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="does not exist") as caught:
        load_data(f"fashionmnist:{tmp_path}")
    assert "t10k-images-idx3-ubyte.gz" in caught.value.hint, "says what the folder does hold"


def write_images(folder: Path, count: int) -> None:
    from PIL import Image

    folder.mkdir(parents=True)
    for index in range(count):
        Image.new("RGB", (40, 30), (index, 0, 0)).save(folder / f"{index}.png")


def test_a_folder_of_images_is_read_with_its_own_held_out_part(tmp_path: Path) -> None:
    for part, count in (("train", 20), ("val", 4)):
        for name in ("cat", "dog"):
            write_images(tmp_path / part / name, count)
    data = load_data(f"imagefolder:{tmp_path}", search_from="test")
    assert (len(data.train), len(data.search), len(data.test)) == (40, 4, 4)
    assert data.class_names == ("cat", "dog")
    assert isinstance(data.search, LoaderSplit)
    data.search.num_workers = 0
    images, _ = next(data.search.batches(4))
    assert images.shape == (4, *data.input_shape)


def test_one_folder_of_images_is_cut(tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        write_images(tmp_path / name, 20)
    data = load_data(f"imagefolder:{tmp_path}", search_from="train")
    assert (len(data.train), len(data.search), len(data.test)) == (29, 3, 8)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images in folders of classes"):
        load_data(f"imagefolder:{tmp_path}")
    write_images(tmp_path / "train" / "cat", 2)
    write_images(tmp_path / "val" / "dog", 2)
    with pytest.raises(DataError, match="do not have the same classes; only one has cat, dog"):
        load_data(f"imagefolder:{tmp_path}")


def test_images_of_another_type_are_refused() -> None:
    with pytest.raises(DataError, match="do not go with"):
        TensorSplit(torch.zeros(3, 1, 4, 4), torch.zeros(3), normalization=GREY)
