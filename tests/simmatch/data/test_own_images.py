"""Own images by configuration: the same images in every layout are the same data set; every fault is one clear line."""

from __future__ import annotations

import os
import pickle
import re
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import simmatch.data.places
from simmatch.config import ConfigError, parse
from simmatch.data.config import DataConfig
from simmatch.data.decoding import ImagePolicy
from simmatch.data.formats import DataError
from simmatch.data.listing import list_samples
from simmatch.data.loading import decoded
from simmatch.data.sources import Dataset, load_dataset
from tests.object_store import BUCKET, ObjectStore, object_store
from tests.own_images import CLASSES, Item, items, png, write_folder, write_parquet, write_tar, write_tars

LAYOUTS: dict[str, Callable[[Path, list[Item]], object]] = {
    "folder": write_folder,
    "tar": write_tars,
    "parquet": lambda folder, some: write_parquet(folder / "data.parquet", some),
    "parquet, binary": lambda folder, some: write_parquet(folder / "a.parquet", some, structs=False, names=()),
}


def found(dataset: Dataset) -> dict[int, int]:
    """Grey level → label of all images."""
    pairs = [(dataset.train_images, dataset.train_labels), (dataset.test_images, dataset.test_labels)]
    return {
        int(image.max()): int(label) for images, labels in pairs for image, label in zip(images, labels, strict=True)
    }


def load(path: object, **options: Any) -> Dataset:
    return load_dataset(parse(DataConfig, {"path": str(path), "test_fraction": 0.2, **options}))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_the_same_images(layout: str, tmp_path: Path) -> None:
    some = items()
    some[4] = ("004", -1, png(4)) if layout != "folder" else some[4]
    LAYOUTS[layout](tmp_path, some)
    dataset = load(tmp_path)
    assert found(dataset) == {index: label for index, (_, label, _) in enumerate(some)}
    assert (dataset.train_images.shape[1:], dataset.num_classes) == ((3, 6, 8), 3)
    assert len(dataset.test_images) == pytest.approx(6, abs=1)
    listing = list_samples(DataConfig(path=str(tmp_path), test_fraction=0.2))
    assert listing.classes == (CLASSES if layout in ("folder", "parquet") else ("0", "1", "2"))
    assert layout.partition(",")[0] in listing.note


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_part_of_a_list_can_be_sent_elsewhere_and_read_there(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path, items())
    listing = list_samples(DataConfig(path=str(tmp_path), test_fraction=0.2))
    part = pickle.loads(pickle.dumps(listing.train[5:8]))
    assert list(part) == list(listing.train)[5:8]
    with part.origin.open() as read:
        shuffled = [read(part[index]) for index in (2, 0, 1)]
    assert set(shuffled) <= {data for _, _, data in items()}
    names = [name for name, _ in decoded(part, policy=simmatch.data.decoding.ImagePolicy())]
    assert all(str(tmp_path) in name for name in names)


# -- the split ---------------------------------------------------------------------------------------------------------


def test_the_split_depends_on_names_labels_and_seed_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the smallest hashes of each class, computed here. The order in which a disk lists files has no effect."""
    write_folder(tmp_path, items(60))
    config = DataConfig(path=str(tmp_path), test_fraction=0.25, split_seed=7)
    listing = list_samples(config)
    expected = []
    for label, name in enumerate(CLASSES):
        keys = [f"{name}/{index:03d}.png" for index in range(label, 60, 3)]
        keys.sort(key=lambda key: int.from_bytes(blake2b(key.encode(), digest_size=8, key=b"7").digest(), "little"))
        expected += keys[:5]
    assert sorted(listing.test.keys) == sorted(expected)

    class Backwards:
        def __init__(self, path: str) -> None:
            with scandir(path) as scan:
                self.entries = sorted(scan, key=lambda entry: entry.name, reverse=True)

        def __enter__(self) -> Iterator[os.DirEntry[str]]:
            return iter(self.entries)

        def __exit__(self, *_: object) -> None: ...

    scandir = os.scandir
    digest = load_dataset(config).digest()
    monkeypatch.setattr(os, "scandir", Backwards)
    again = list_samples(config)
    assert list(again.train) == list(listing.train)
    assert list(again.test) == list(listing.test)
    assert load_dataset(config).digest() == digest
    other = list_samples(config.model_copy(update={"split_seed": 8}))
    assert sorted(other.test.keys) != sorted(expected)


def test_a_smaller_sample_is_part_of_a_larger_one_and_holds_all_classes(tmp_path: Path) -> None:
    write_folder(tmp_path, items(120))
    small, large = (load(tmp_path, train_images=count) for count in (24, 48))
    assert torch.equal(large.train_images[:24], small.train_images)
    assert torch.bincount(small.train_labels).min() > 2
    assert small.digest() != large.digest()


def test_test_images_of_their_own_place(tmp_path: Path) -> None:
    """Classes are matched by name; the test images need not have all of them."""
    write_folder(tmp_path / "a", items(12))
    write_folder(tmp_path / "b", [item for item in items(30)[20:] if item[1] > 0])
    dataset = load(tmp_path / "a", test_path=str(tmp_path / "b"), test_fraction=None)
    assert found(dataset) == {i: i % 3 for i in [*range(12), *(i for i in range(20, 30) if i % 3)]}


@pytest.mark.parametrize("layout", ["folder", "folders of parquet", "parquet", "tar"])
def test_a_place_that_names_its_parts_is_split_accordingly(layout: str, tmp_path: Path) -> None:
    train, test = items(20), items(30)[20:]
    if layout == "folder":
        write_folder(tmp_path / "train", train)
        write_folder(tmp_path / "val", test)
    elif layout == "folders of parquet":
        write_parquet(tmp_path / "train" / "0.parquet", train)
        write_parquet(tmp_path / "val" / "0.parquet", test)
    elif layout == "parquet":
        write_parquet(tmp_path / "train-00000-of-00002.parquet", train[:9])
        write_parquet(tmp_path / "train-00001-of-00002.parquet", train[9:])
        write_parquet(tmp_path / "validation-00000-of-00001.parquet", test)
    else:
        write_tars(tmp_path, train)
        for path in list(tmp_path.iterdir()):
            path.rename(path.with_name(f"toy_train-{path.name}"))
        write_tars(tmp_path / "later", test, shards=1)
        (tmp_path / "later" / "shard-000.tar").rename(tmp_path / "toy_test.tar")
        (tmp_path / "later").rmdir()
    dataset = load(tmp_path, test_fraction=None)
    assert sorted(int(image.max()) for image in dataset.test_images) == list(range(20, 30))
    assert found(dataset) == {index: index % 3 for index in range(30)}
    with pytest.raises(ConfigError, match=r"data\.test_fraction: expected null, as .* holds train and test images"):
        load(tmp_path)


# -- what is in a folder -----------------------------------------------------------------------------------------------


def test_names_of_every_kind(tmp_path: Path) -> None:
    """Accents, a newline, bytes that are not UTF-8, upper-case suffixes, deep folders; hidden files are no images."""
    names = [b"a/\xc3\xa9.PNG", b"a/x\ny.Png", b"b/\xff\xfe.png", b"b/deep/er/1.png", b"b/[1]{2}*.png"]
    hidden = [b"a/.hidden.png", b".git/x.png", b"a/.DS_Store"]
    others = [b"a/notes.txt", b"b/label", b"b/x.png.part"]
    for index, name in enumerate([*names, *hidden, *others]):
        path = os.path.join(os.fsencode(tmp_path), name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(png(index))
    listing = list_samples(DataConfig(path=str(tmp_path), test_fraction=0.3))
    dataset = load(tmp_path, test_fraction=0.3)
    assert found(dataset) == {0: 0, 1: 0, 2: 1, 3: 1, 4: 1}
    assert "3 other files left out" in listing.note
    for bad in (b"a/x\ny.Png", b"b/\xff\xfe.png"):
        with open(os.path.join(os.fsencode(tmp_path), bad), "wb") as file:
            file.write(b"no image")
        with pytest.raises(DataError, match=r"/(a/x y\.Png|b/.*\.png): cannot be decoded: not an image") as caught:
            load(tmp_path, test_fraction=0.3)
        assert str(caught.value).isprintable()


def test_images_beside_folders_have_no_label_if_that_is_asked_for(tmp_path: Path) -> None:
    some = [(key, -1 if index % 5 == 0 else label, data) for index, (key, label, data) in enumerate(items())]
    write_folder(tmp_path, some)
    with pytest.raises(ConfigError, match=r"data\.labels: .* holds images both beside and in folders"):
        load(tmp_path)
    assert found(load(tmp_path, labels=True)) == {index: label for index, (_, label, _) in enumerate(some)}
    without = load(tmp_path, labels=False)
    assert set(found(without).values()) == {-1}
    assert without.num_classes == 0


def test_links_are_followed_and_loops_found(tmp_path: Path) -> None:
    write_folder(tmp_path / "real", items(12))
    (tmp_path / "own").mkdir()
    for name in CLASSES:
        (tmp_path / "own" / name).symlink_to(tmp_path / "real" / name)
    assert len(found(load(tmp_path / "own"))) == 12
    (tmp_path / "real" / "cat" / "again").symlink_to(tmp_path / "real")
    with pytest.raises(DataError, match=r"again: expected a folder, got a link to a folder around it"):
        load(tmp_path / "real")


def test_a_list_of_many_images_is_small_and_looks_at_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20,000 names that no disk holds: any look at a file would fail."""

    class Entry:
        def __init__(self, name: str, folder: bool) -> None:
            self.name, self._folder = name, folder

        def is_dir(self) -> bool:
            return self._folder

    class Scan:
        def __init__(self, path: str) -> None:
            top = Path(path) == tmp_path
            names = [f"n{k:08d}" for k in range(20)] if top else [f"n_{k:010d}.JPEG" for k in range(1000)]
            self.entries = [Entry(name, top) for name in names]

        def __enter__(self) -> Iterator[Entry]:
            return iter(self.entries)

        def __exit__(self, *_: object) -> None: ...

    state = os.stat(tmp_path)
    numbers = iter(range(1 << 30))
    monkeypatch.setattr(os, "scandir", Scan)
    monkeypatch.setattr(os, "stat", lambda path: os.stat_result((state.st_mode, next(numbers), *state[2:])))
    monkeypatch.setattr(os.path, "isdir", lambda path: True)
    tracemalloc.start()
    try:
        listing = list_samples(DataConfig(path=str(tmp_path), test_fraction=0.1))
        kept, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(listing.train), len(listing.test)) == (18_000, 2_000)
    assert kept < 100 * 20_000
    assert most < 400 * 20_000


# -- damage ------------------------------------------------------------------------------------------------------------


def test_damaged_images_stop_or_are_left_out_and_named(tmp_path: Path) -> None:
    some = items(60)
    for index in (7, 20):
        some[index] = (some[index][0], some[index][1], b"no image")
    write_folder(tmp_path, some)
    with pytest.raises(DataError, match=r"/(dog/007|élan/020)\.png: cannot be decoded: .*; data\.damaged: skip"):
        load(tmp_path)
    dataset = load(tmp_path, damaged="skip")
    assert dataset.skipped == 2
    assert found(dataset) == {index: index % 3 for index in range(60) if index not in (7, 20)}
    assert any("007.png" in note and "020.png" in note for note in dataset.notes)
    with pytest.raises(DataError, match=r"expected at most data\.max_skipped=1 damaged images, got more; .*\.png"):
        load(tmp_path, damaged="skip", max_skipped=1)
    whole = load(write_folder(tmp_path / "whole", items(60)))
    for count in (10, 40):  # as many as asked for, others in their place
        some_images = load(tmp_path, damaged="skip", train_images=count, labels=None)
        assert len(some_images.train_images) == count
    assert len(whole.train_images) + len(whole.test_images) == 60


def test_no_image_that_can_be_decoded(tmp_path: Path) -> None:
    write_folder(tmp_path, [(key, label, b"text") for key, label, _ in items()])
    with pytest.raises(DataError, match=r"expected images, got none that can be decoded; the first: .*png: cannot be"):
        load(tmp_path, damaged="skip")


@pytest.mark.parametrize("layout", ["folder", "tar", "parquet"])
def test_sizes_and_channels_that_differ_are_named(layout: str, tmp_path: Path) -> None:
    some = items()
    some[11] = ("011", 2, png(11, (5, 9)))
    LAYOUTS[layout](tmp_path, some)
    with pytest.raises(
        DataError, match=r"expected images of one size, got . × . in .+ and . × . in .+; set data\.size"
    ):
        load(tmp_path)
    assert load(tmp_path, size=[4, 4]).train_images.shape[1:] == (3, 4, 4)
    some[11] = ("011", 2, png(11, channels=1))
    LAYOUTS[layout](tmp_path, some)
    with pytest.raises(DataError, match=r"one number of channels, got . in .+ and . in .+; set data\.channels"):
        load(tmp_path)
    assert load(tmp_path, channels=1).train_images.shape[1:] == (1, 6, 8)
    assert load(tmp_path, channels=1).digest() != load(tmp_path, channels=3).digest()


def some_tar(folder: Path, **members: str) -> None:
    write_tar(folder / "a.tar", [(name.replace("_", "."), text.encode()) for name, text in members.items()])


def cut(path: Path, end: int | None = None, *, at: int | None = None) -> None:
    """Cut a file off, or overwrite a few of its bytes."""
    data = bytearray(path.read_bytes())
    if at is not None:
        data[at : at + 8] = b"\xff" * 8
    path.write_bytes(data[:end])


def test_a_row_group_with_fewer_images_than_it_says_is_damaged(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", items(8))
    listing = list_samples(DataConfig(path=str(tmp_path), test_fraction=0.2))
    write_parquet(tmp_path / "a.parquet", items(1))
    with pytest.raises(DataError, match=r"a\.parquet: expected a row \d in row group 0, of which it has 1;"):
        list(decoded(listing.train, ImagePolicy()))


def with_parquet(folder: Path, **columns: Any) -> None:
    pq.write_table(pa.table(columns), folder / "a.parquet")


def broken_parquet(folder: Path) -> None:
    write_parquet(folder / "a.parquet", items())
    cut(folder / "a.parquet", at=100)
    cut(folder / "a.parquet", end=-20)


def tar_and(folder: Path, **change: Any) -> None:
    write_tars(folder, items(), shards=1)
    cut(folder / "shard-000.tar", **change)


ONE = [png(1)] * 4

FAULTS: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "missing": (
        lambda f: (f.parent / "photos").mkdir(),
        {"path": "{}/../photo"},
        r"/photo: no such folder; beside it: ",
    ),
    "missing pattern": (lambda f: None, {"path": "{}/a-{{0..3}}.tar"}, r"/a-0\.tar: expected a file, found none"),
    "missing tar": (lambda f: None, {"path": "{}/a.tar"}, r"/a\.tar: no such file or folder"),
    "empty": (lambda f: None, {}, r"expected images \(\.jpg, .*\), got an empty folder"),
    "no images": (lambda f: (f / "a.txt").touch(), {}, r"expected images \(.*\), got other files \(1\)"),
    "a file of another kind": (
        lambda f: (f / "a.zip").touch(),
        {"path": "{}/a.zip"},
        r"/a\.zip: expected a folder of images, or files \.tar or \.parquet, got another file",
    ),
    "one class": (
        lambda f: write_folder(f, [(key, 0, data) for key, _, data in items()]),
        {},
        r"expected labels of two classes at least, got 'cat' only; set data\.labels: false",
    ),
    "no labels": (
        lambda f: write_folder(f, [(key, -1, data) for key, _, data in items()]),
        {"labels": True},
        r"expected training images with labels, got none",
    ),
    "text as label, tar": (
        lambda f: some_tar(f, a_png="x", a_cls="tabby cat"),
        {},
        r"/a\.tar: expected a tar file .*: a\.cls: expected the number of a class, .*, got 'tabby cat'; write numbers",
    ),
    "text as label, json": (
        lambda f: some_tar(f, a_png="x", a_json='{"label": "3"}'),
        {},
        r"a\.json: expected the number of a class, .*, got '3'",
    ),
    "not JSON": (lambda f: some_tar(f, a_png="x", a_json="{"), {}, r"a\.json: expected JSON"),
    "two images of a key": (
        lambda f: some_tar(f, a_png="x", a_jpg="y"),
        {},
        r"a\.tar: .*expected one image of each key, got two of a",
    ),
    "labels apart from their images": (
        lambda f: some_tar(f, a_png="x", b_png="x", a_cls="0", b_cls="1"),
        {},
        r"a\.tar: .*: expected each label next to its image, got the label of a without an image",
    ),
    "no images in a tar": (lambda f: some_tar(f, a_txt="x"), {}, r"expected images \(.*\), got 1 other members"),
    "text for a tar": (lambda f: (f / "a.tar").write_text("x" * 600), {}, r"a\.tar: expected a tar file .*"),
    "tar cut off in a member": (
        lambda f: tar_and(f, end=700),
        {},
        r"shard-000\.tar: expected a tar file .*: unexpected end",
    ),
    "tar cut off in a header": (lambda f: tar_and(f, end=1024 + 100), {}, r"shard-000\.tar: .*: damaged header"),
    "tar with a damaged header": (lambda f: tar_and(f, at=1024 + 150), {}, r"shard-000\.tar: .*: damaged header"),
    "text as label, parquet": (
        lambda f: with_parquet(f, image=ONE, label=["cat", "dog"] * 2),
        {},
        r"a\.parquet: column 'label': expected the number of a class, .*, got string; write numbers, name another",
    ),
    "no such column": (
        lambda f: with_parquet(f, img=ONE, label=[0, 1, 0, 1]),
        {},
        r"a\.parquet: expected a column 'image' \(data\.image_column\), got \['img', 'label'\]",
    ),
    "no column of labels": (
        lambda f: with_parquet(f, image=ONE, fine=[0, 1, 0, 1]),
        {"labels": True},
        r"a\.parquet: expected a column 'label' \(data\.label_column\), got \['image', 'fine'\]",
    ),
    "no bytes": (
        lambda f: with_parquet(f, image=["a.jpg"] * 4, label=[0, 1, 0, 1]),
        {},
        r"a\.parquet: column 'image': expected bytes of images, .*, got string",
    ),
    "a label below": (
        lambda f: with_parquet(f, image=ONE, label=[0, 1, -2, 1]),
        {},
        r"expected labels 0 to .*, got -2",
    ),
    "a label beyond the classes": (
        lambda f: write_parquet(f / "a.parquet", [("1", 3, png(1)), *items()]),
        {},
        r"expected labels 0 to 2, or -1 for none, got 3",
    ),
    "a test label beyond the classes": (
        lambda f: (
            write_parquet(f / "a.parquet", items()),
            write_parquet(f.parent / "t.parquet", [("1", 3, png(1))], names=CLASSES[::-1]),
        ),
        {"test_path": "{}/../t.parquet", "test_fraction": None},
        r"t\.parquet: expected labels 0 to 2, or -1 for none, got 3",
    ),
    "huge labels": (lambda f: with_parquet(f, image=ONE, label=[0, 1, 1 << 40, 1]), {}, r"got 1099511627776"),
    "text for parquet": (
        lambda f: (f / "a.parquet").write_text("x" * 600),
        {},
        r"a\.parquet: expected a Parquet file: ",
    ),
    "parquet cut off": (broken_parquet, {}, r"a\.parquet: expected a Parquet file: "),
    "both kinds": (
        lambda f: (write_tars(f, items()), write_parquet(f / "a.parquet", items())),
        {},
        r"data\.format: expected one of parquet, tar, as .* holds both, got auto",
    ),
    "no test images": (
        lambda f: write_folder(f, items()),
        {"test_fraction": None},
        r"data\.test_path: expected test images, or a share of .* in data\.test_fraction, got neither",
    ),
    "too small a share": (
        lambda f: write_folder(f, items()),
        {"test_fraction": 0.01},
        r"data\.test_fraction: .* one test image of 30, got 0\.01",
    ),
    "more than there are": (
        lambda f: write_folder(f, items()),
        {"train_images": 31},
        r"data\.train_images: expected at most 24, got 31",
    ),
    "a class of its own": (
        lambda f: (write_folder(f, items(2)), write_folder(f.parent / "test", items(3))),
        {"test_path": "{}/../test", "test_fraction": None},
        r"class 'élan' of the test images: expected one of the training images' classes",
    ),
    "protocol": (lambda f: None, {"path": "gopher://photos"}, r"data\.path: expected a folder or a URI"),
    "credentials": (
        lambda f: None,
        {"path": "s3://me:secret@bucket/x"},
        r"data\.path: expected a URI without credentials",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_one_line(fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    write, options, message = FAULTS[fault]
    write(folder)
    texts = {key: value.format(folder) if isinstance(value, str) else value for key, value in options.items()}
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        load(**{"path": folder, **texts})
    assert re.match(r"data\.[a-z_]+: ", str(caught.value))
    assert str(caught.value).isprintable()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected either name or path, got neither"),
        ({"name": "digits", "path": "x"}, "expected either name or path, got both"),
        ({"path": "x", "root": "y"}, "expected root with name only, got path and root"),
        ({"name": "digits", "size": 8}, "expected path with size, got name"),
        ({"name": "digits", "order": "blocks"}, "expected path with order: blocks, got name"),
        (
            {"name": "digits", "test_fraction": 0.1, "labels": False},
            "expected path with labels, test_fraction, got name",
        ),
        ({"path": "x", "test_path": "y", "test_fraction": 0.1}, "expected test_path or test_fraction, got both"),
        ({"path": ""}, "expected a folder, a file or a URI as path, got nothing"),
        (
            {"path": "x", "format": "zip"},
            "format: expected 'auto', .* or 'ts', got 'zip'",
        ),
        ({"path": "x", "channels": 4}, "channels: expected 1 or 3, got 4"),
        ({"path": "x", "test_fraction": 1.0}, "test_fraction: expected less than 1, got 1.0"),
        ({"path": "x", "size": [8]}, r"size: expected 1 to 8192 pixels, or \[height, width\], got \[8\]$"),
        ({"path": "x", "size": 0}, r"size: expected 1 to 8192 pixels, or \[height, width\], got 0$"),
        ({"path": "x", "size": 100_000}, r"size: expected 1 to 8192 pixels, .*, got 100000$"),
        ({"path": "x", "size": [8, True]}, r"size: expected 1 to 8192 pixels, .*, got \[8, True\]$"),
    ],
)
def test_keys_that_do_not_go_together(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(DataConfig, values)


# -- object stores -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


def upload(folder: Path, prefix: str) -> str:
    import s3fs

    system = s3fs.S3FileSystem(use_listings_cache=False)
    for path in folder.rglob("*"):
        if path.is_file():
            system.put_file(str(path), f"{BUCKET}/{prefix}/{path.relative_to(folder)}")
    return f"s3://{BUCKET}/{prefix}"


@pytest.mark.parametrize("layout", ["folder", "tar", "parquet"])
def test_a_bucket_holds_the_same_data_set_as_the_folder(store: ObjectStore, layout: str, tmp_path: Path) -> None:
    place = tmp_path / layout
    LAYOUTS[layout](place, items())
    uri = upload(place, layout)
    assert load(uri).digest() == load(place).digest()
    if layout == "tar":
        assert load(f"{uri}/shard-{{000..002}}.tar", labels=None).train_images.shape == load(uri).train_images.shape
        assert found(load(f"{uri}/shard-*.tar")) == found(load(place))
    with pytest.raises(DataError, match=r"s3://simmatch-test/absent: no such folder"):
        load(f"s3://{BUCKET}/absent")


def test_a_bucket_that_is_away_is_asked_again(
    store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And it is said at once what is waited for, once."""
    expected = load(write_tars(tmp_path / "away", items())).digest()
    uri = upload(tmp_path / "away", "away")
    monkeypatch.setattr(simmatch.remote, "ATTEMPTS", 1)
    store.stop()

    def start_once_told() -> None:
        deadline = time.monotonic() + 30.0
        while not caplog.messages and time.monotonic() < deadline:
            time.sleep(0.05)
        store.start()

    starts = threading.Thread(target=start_once_told)
    starts.start()
    try:
        assert load(uri).digest() == expected
    finally:
        starts.join()
    [told] = caplog.messages
    assert told.startswith(f"{uri}: cannot be read: Could not connect to the endpoint URL")
    assert told.endswith("; asked again for 60 s")
    store.stop()
    monkeypatch.setattr(simmatch.data.places, "PATIENCE_S", 1.0)
    try:
        with pytest.raises(DataError, match=rf"^data\.path: {uri}: cannot be read: ") as caught:
            load(uri)
        assert str(caught.value).isprintable()
    finally:
        store.start()
