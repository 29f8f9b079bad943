"""Where the files of data sets are searched for, and which contents are valid."""

from __future__ import annotations

import dataclasses
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from simmatch.config import ConfigError
from simmatch.data.builtin import DATASETS, DataNotFoundError, download
from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError
from simmatch.data.sources import Dataset, load_dataset, to_unit, without_damage
from tests.image_files import IDX_FILES, cifar_arrays, idx_bytes, python2_batch, write_mnist
from tests.live_bytes import LiveBytes


@pytest.fixture(autouse=True)
def nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Only files created by a test can be found: no environment, no system folder, an empty working directory."""
    monkeypatch.delenv("SIMMATCH_DATA", raising=False)
    monkeypatch.setitem(
        DATASETS, "fashion_mnist", replace(DATASETS["fashion_mnist"], system_folder=tmp_path / "system")
    )
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path


# -- finding -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("below", ["", "fashion-mnist", "usr/share/datasets/fashion-mnist", "FashionMNIST/raw"])
def test_layouts_of_fashion_mnist(nowhere, below, gz):
    arrays = write_mnist(nowhere / "root" / below, gz=gz)
    dataset = load_dataset(DataConfig(name="fashion_mnist", root=str(nowhere / "root")))
    assert np.array_equal(dataset.train_images.numpy(), arrays[0][:, None])
    assert np.array_equal(dataset.train_labels.numpy(), arrays[1])
    assert np.array_equal(dataset.test_images.numpy(), arrays[2][:, None])
    assert np.array_equal(dataset.test_labels.numpy(), arrays[3])
    assert (dataset.in_channels, dataset.image_size, dataset.num_classes) == (1, (4, 3), 10)
    assert dataset.train_labels.dtype == torch.int64


def test_places_are_searched_in_order(nowhere, monkeypatch):
    monkeypatch.setenv("SIMMATCH_DATA", str(nowhere / "env"))
    places = {"cwd/data": 1, "system": 2, "env": 3, "given": 4}
    for place, mark in places.items():  # from the last searched to the first
        write_mnist(nowhere / place, mark=mark)
        root = str(nowhere / "given") if place == "given" else None
        assert load_dataset(DataConfig(name="fashion_mnist", root=root)).train_images[0, 0, 0, 0] == mark


def test_root_is_the_only_place_once_given(nowhere):
    write_mnist(nowhere / "system")
    with pytest.raises(DataNotFoundError, match=r"data\.root .*absent: no such folder"):
        load_dataset(DataConfig(name="fashion_mnist", root=str(nowhere / "absent")))


def test_not_found_names_places_and_remedies(nowhere, monkeypatch):
    monkeypatch.setenv("SIMMATCH_DATA", str(nowhere / "env"))
    write_mnist(nowhere / "env")
    (nowhere / "env" / IDX_FILES[3]).unlink()
    with pytest.raises(DataNotFoundError) as caught:
        load_dataset(DataConfig(name="fashion_mnist"))
    message = str(caught.value)
    for part in (
        "env",
        f"lacks {IDX_FILES[3]}",
        "system",
        "cwd/data",
        "make data",
        "dataset-fashion-mnist",
        "data.root",
    ):
        assert part in message
    assert "\n" not in message


def test_mnist_is_not_read_from_a_folder_of_fashion_mnist(nowhere):
    """Their files have the same names: a folder named for the one is never taken for the other."""
    for below in ("fashion-mnist", "FashionMNIST/raw"):
        write_mnist(nowhere / below)
        with pytest.raises(DataNotFoundError):
            load_dataset(DataConfig(name="mnist", root=str(nowhere / below)))
        load_dataset(DataConfig(name="fashion_mnist", root=str(nowhere / below)))


def test_unknown_name_suggests_one():
    with pytest.raises(ConfigError, match=r"data\.name: expected one of cifar10, .* did you mean 'fashion_mnist'"):
        load_dataset(DataConfig(name="fashion-mnist"))


def test_first_images_only(nowhere):
    arrays = write_mnist(nowhere)
    dataset = load_dataset(DataConfig(name="mnist", root=str(nowhere), train_images=7, test_images=2))
    assert np.array_equal(dataset.train_images[:, 0].numpy(), arrays[0][:7])
    assert np.array_equal(dataset.test_labels.numpy(), arrays[3][:2])
    with pytest.raises(ConfigError, match=r"data\.test_images: expected at most 10, got 11"):
        load_dataset(DataConfig(name="mnist", root=str(nowhere), test_images=11))


def test_download_only_where_allowed(nowhere, monkeypatch):
    calls = []

    def fake(name: str, root: Path) -> None:
        calls.append((name, root))
        write_mnist(root / "MNIST" / "raw")

    monkeypatch.setattr("simmatch.data.builtin.download", fake)
    with pytest.raises(DataNotFoundError):
        load_dataset(DataConfig(name="mnist"))
    with pytest.raises(DataNotFoundError):
        load_dataset(DataConfig(name="mnist", root="."), allow_download=True)
    assert len(load_dataset(DataConfig(name="mnist"), allow_download=True).train_images) == 20
    assert calls == [("mnist", Path("data"))]


def test_failed_download_is_one_line_and_restores_the_timeout(monkeypatch, tmp_path):
    import socket

    import torchvision.datasets

    seen = []

    def refuse(root: str, download: bool) -> None:
        seen.append(socket.getdefaulttimeout())
        raise RuntimeError("Error downloading:\nTried a mirror")

    monkeypatch.setattr(torchvision.datasets, "MNIST", refuse)
    with pytest.raises(DataError, match="download failed: Error downloading: Tried a mirror"):
        download("mnist", tmp_path, timeout_s=3.0)
    assert seen == [3.0]
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("suffix", ["py", "bin"])
def test_cifar10_folder(nowhere, suffix):
    folder = nowhere / f"cifar-10-batches-{suffix}"
    folder.mkdir()
    everything = []
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        data, labels = cifar_arrays(4, seed)
        everything.append((data, labels))
        if suffix == "py":
            (folder / name).write_bytes(python2_batch(data, labels))
        else:
            records = np.concatenate([np.array(labels, np.uint8)[:, None], data], axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
    for root in (nowhere, folder):
        dataset = load_dataset(DataConfig(name="cifar10", root=str(root)))
        assert dataset.in_channels == 3
        assert dataset.image_size == (32, 32)
        train = np.concatenate([data for data, _ in everything[:5]]).reshape(20, 3, 32, 32)
        assert np.array_equal(dataset.train_images.numpy(), train)
        assert dataset.train_labels.tolist() == [label for _, labels in everything[:5] for label in labels]
        assert np.array_equal(dataset.test_images.numpy(), everything[5][0].reshape(4, 3, 32, 32))


# -- contents ----------------------------------------------------------------------------------------------------------


def make_dataset(**changes) -> Dataset:
    values = {
        "train_images": torch.zeros(6, 1, 2, 2),
        "train_labels": torch.arange(6),
        "test_images": torch.zeros(3, 1, 2, 2),
        "test_labels": torch.arange(3),
    }
    return Dataset("toy", **{**values, **changes}, num_classes=6)


def test_contents_are_checked():
    make_dataset()
    for changes, expected in [
        ({"test_labels": torch.arange(2)}, "got 3 images and 2 labels"),
        ({"train_labels": torch.zeros(6)}, "expected int64 labels"),
        ({"train_images": torch.zeros(6, 2, 2)}, r"expected uint8 or float32 images \[N, C, H, W\]"),
        ({"test_images": torch.zeros(3, 1, 2, 3)}, "training images' shape"),
    ]:
        with pytest.raises(DataError, match=expected):
            make_dataset(**changes)


def broken_images(value: float) -> torch.Tensor:
    images = torch.zeros(6, 1, 2, 2)
    images[4, 0, 1, 0] = value
    return images


DAMAGED = [
    ({"train_labels": torch.tensor([0, 1, 9, 3, 4, 5])}, "toy train: expected labels 0 to 5, got 9 at index 2", 2),
    ({"train_labels": torch.tensor([0, 1, 2, 3, -1, 5])}, "toy train: expected labels 0 to 5, got -1 at index 4", 4),
    ({"train_images": broken_images(float("inf"))}, r"got inf in image 4 at \[0, 1, 0\]", 4),
    ({"train_images": broken_images(float("nan"))}, r"got nan in image 4 at \[0, 1, 0\]", 4),
    ({"train_images": broken_images(-0.5)}, r"expected values in \[0, 1\], got -0.5 in image 4", 4),
    ({"train_images": broken_images(1.5)}, r"expected values in \[0, 1\], got 1.5 in image 4", 4),
]


@pytest.mark.parametrize(("changes", "message", "index"), DAMAGED)
def test_a_damaged_image_stops_or_is_skipped(changes, message, index):
    dataset = make_dataset(**changes)
    with pytest.raises(DataError, match=message):
        without_damage(dataset, DataConfig(name="toy"))
    kept = without_damage(dataset, DataConfig(name="toy", damaged="skip"))
    others = [place for place in range(6) if place != index]
    assert kept.skipped == 1
    assert torch.equal(kept.train_images, dataset.train_images[others])
    assert torch.equal(kept.train_labels, dataset.train_labels[others])
    assert torch.equal(kept.test_images, dataset.test_images)


def test_a_damaged_test_image_is_named_and_skipped_too():
    dataset = make_dataset(test_labels=torch.tensor([0, -1, 2]))
    with pytest.raises(DataError, match="toy test: expected labels 0 to 5, got -1 at index 1"):
        without_damage(dataset, DataConfig(name="toy"))
    kept = without_damage(dataset, DataConfig(name="toy", damaged="skip"))
    assert kept.test_labels.tolist() == [0, 2]
    assert len(kept.train_labels) == 6


def test_too_many_damaged_images_are_a_fault_of_the_data_set():
    dataset = make_dataset(train_labels=torch.tensor([0, 9, 9, 9, 4, 5]))
    assert without_damage(dataset, DataConfig(name="toy", damaged="skip", max_skipped=3)).skipped == 3
    with pytest.raises(DataError, match=r"expected at most data.max_skipped=2 damaged images, got 3"):
        without_damage(dataset, DataConfig(name="toy", damaged="skip", max_skipped=2))
    nothing = make_dataset(train_labels=torch.full((6,), 9))
    with pytest.raises(DataError, match="toy train: expected uint8 or float32 images"):
        without_damage(nothing, DataConfig(name="toy", damaged="skip"))


def test_images_are_counted_after_damaged_ones_are_left_out(nowhere):
    """A file with a label that is not a class, as a user would have it."""
    labels = write_mnist(nowhere / "root")[1]
    labels[2] = 77
    (nowhere / "root" / IDX_FILES[1]).write_bytes(idx_bytes(labels))
    with pytest.raises(DataError, match="expected labels 0 to 9, got 77 at index 2"):
        load_dataset(DataConfig(name="mnist", root=str(nowhere / "root")))
    for count in (3, None):
        config = DataConfig(name="mnist", root=str(nowhere / "root"), damaged="skip", train_images=count)
        dataset = load_dataset(config)
        assert dataset.train_labels.tolist() == np.delete(labels, 2)[:count].tolist()
        assert dataset.skipped == 1


def test_digits_are_all_of_scikit_learns_stratified():
    before = torch.random.get_rng_state()
    dataset = load_dataset(DataConfig(name="digits"))
    assert torch.equal(before, torch.random.get_rng_state())
    assert dataset.train_images.shape == (1437, 1, 8, 8)
    assert dataset.test_images.shape == (360, 1, 8, 8)
    assert dataset.train_images.max() == 1
    oracle = load_digits()
    rows = np.concatenate([oracle.images.reshape(-1, 64) / 16, oracle.target[:, None]], axis=1)
    mine = [
        torch.cat([images.flatten(1), labels[:, None]], dim=1)
        for images, labels in [
            (dataset.train_images, dataset.train_labels),
            (dataset.test_images, dataset.test_labels),
        ]
    ]
    assert sorted(map(tuple, torch.cat(mine).tolist())) == sorted(map(tuple, rows.tolist()))
    # every class gives its share of the test images, rounded up or down
    share = np.bincount(oracle.target) * 360 / 1797
    assert np.all(np.abs(np.bincount(dataset.test_labels.numpy()) - share) < 1)
    assert torch.equal(load_dataset(DataConfig(name="digits")).test_images, dataset.test_images)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_to_unit(dtype):
    values = torch.arange(256, dtype=torch.uint8).reshape(4, 1, 8, 8)
    expected = torch.tensor([value / 255 for value in range(256)], dtype=torch.float64).reshape(4, 1, 8, 8)
    unit = to_unit(values, dtype)
    assert unit.dtype == dtype
    # one rounding, or two where float32 stands between
    assert (unit.double() - expected).abs().max() <= torch.finfo(dtype).eps / 2 + 2**-25
    assert torch.equal(to_unit(unit, torch.float64), unit.double())
    with pytest.raises(ValueError, match=r"got torch\.int64"):
        to_unit(values.long(), dtype)


def test_a_digest_names_everything(digits: Dataset) -> None:
    """One value of any tensor, the order, the name and the number of classes; equal content has an equal digest."""
    every = slice(None)
    assert digits.digest() == dataclasses.replace(digits, train_images=digits.train_images.clone()).digest()
    others = [
        digits.take(slice(1, None), every),
        digits.take(every, slice(0, 10)),
        digits.take(torch.arange(len(digits.train_labels)).flip(0), every),
        dataclasses.replace(digits, name="other"),
        dataclasses.replace(digits, num_classes=11),
        dataclasses.replace(digits, skipped=1),
    ]
    for field in ("train_images", "train_labels", "test_images", "test_labels"):
        changed = getattr(digits, field).clone()
        changed[-1] = 1 - changed[-1]
        others.append(dataclasses.replace(digits, **{field: changed}))
    digests = [other.digest() for other in others]
    assert digests.count(digits.digest()) == 1
    assert digests[5] == digits.digest()  # the counts show how many were left out
    assert len({*digests}) == len(digests)
    assert len(digits.digest()) == 16


@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_a_digest_copies_no_data_set_and_is_computed_once(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the order of the values, however they lie in memory."""
    images = torch.arange(5000 * 3 * 4 * 4).reshape(5000, 3, 4, 4).to(torch.uint8)
    held = images if layout == "contiguous" else images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    labels = torch.zeros(5000, dtype=torch.int64)
    dataset = Dataset("held", held, labels, held[:10], labels[:10], num_classes=10)
    with LiveBytes() as live:
        digest = dataset.digest()
    assert live.peak <= (0 if layout == "contiguous" else 2 * 1024 * images[0].nbytes)
    assert digest == Dataset("held", images, labels, images[:10], labels[:10], num_classes=10).digest()
    monkeypatch.setattr("simmatch.data.sources.sha256", None)
    assert dataset.digest() == digest
