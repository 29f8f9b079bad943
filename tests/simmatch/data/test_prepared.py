"""Prepared data sets: what is written is what own images are in memory, and what is damaged is named.

Oracles: `load_dataset` of the same images in memory, `numpy.memmap` of the shards, a second preparation.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import simmatch.data.cache
import simmatch.data.preparation
import simmatch.data.shards
import simmatch.files
import simmatch.remote
from simmatch.config import ConfigError, LayerConfig, ModelConfig, TrainConfig
from simmatch.data.cache import ShardCache
from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError
from simmatch.data.listing import list_samples
from simmatch.data.location import Location
from simmatch.data.order import Batches, epoch_order
from simmatch.data.preparation import finished, in_threads, prepare
from simmatch.data.prepared import PreparedData, PreparedImages
from simmatch.data.preparing import Plan
from simmatch.data.shards import MANIFEST, read_manifest
from simmatch.data.sources import Dataset, load_dataset
from simmatch.files import locked
from simmatch.fit import Trainer
from simmatch.model import Stack
from simmatch.observer import Observer
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.mesh import Mesh
from tests.exchanges import run_owners
from tests.object_store import BUCKET, ObjectStore, object_store

IMAGES, SIDE = 60, 5
SHARD = 10 * SIDE * SIDE
"""Bytes of a shard of ten images."""


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simmatch.data.shards, "SHARD_BYTES", SHARD)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Sixty grey images of three classes."""
    folder = tmp_path / "photos"
    generator = np.random.default_rng(0)
    for index in range(IMAGES):
        path = folder / f"class{index % 3}" / f"{index:03d}.pgm"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, SIDE * SIDE, dtype=np.uint8).tobytes()
        path.write_bytes(b"P5 %d %d 255 " % (SIDE, SIDE) + pixels)
    return folder


def config_of(photos: Path | str, **more: object) -> DataConfig:
    return DataConfig(path=str(photos), test_fraction=0.2, **more)


def prepared(config: DataConfig, folder: Path) -> Path:
    to = Location(folder)
    prepare(Plan(config, list_samples(config)), to, in_threads, lambda done, total: None)
    return folder


@pytest.fixture
def folder(photos: Path, tmp_path: Path) -> Path:
    """The same images, prepared: five shards of training images and three of test images."""
    return prepared(config_of(photos), tmp_path / "prepared")


def same(data: Dataset, other: Dataset) -> bool:
    """Whether images, labels and classes are equal, in this order."""
    return (
        torch.equal(data.train_images[:], other.train_images[:])
        and torch.equal(data.test_images[:], other.test_images[:])
        and torch.equal(data.train_labels, other.train_labels)
        and torch.equal(data.test_labels, other.test_labels)
        and data.num_classes == other.num_classes
    )


# -- the format --------------------------------------------------------------------------------------------------------


def test_prepared_images_are_those_in_memory_in_the_same_order(photos: Path, folder: Path) -> None:
    memory, data = load_dataset(config_of(photos)), load_dataset(DataConfig(path=str(folder)))
    assert isinstance(data.train_images, PreparedImages)
    assert isinstance(memory.train_images, torch.Tensor)
    assert same(memory, data)
    unused = "data.order: blocks: no effect on images in memory"
    assert unused in load_dataset(config_of(photos, order="blocks")).notes
    assert unused not in load_dataset(DataConfig(path=str(folder), order="blocks")).notes
    assert (data.name, data.in_channels, data.image_size) == ("photos", 1, (SIDE, SIDE))
    shards = [np.memmap(folder / f"train-{n:05d}.bin", np.uint8, "r").reshape(-1, 1, SIDE, SIDE) for n in range(5)]
    assert [len(shard) for shard in shards] == [10, 10, 10, 10, 8]
    assert np.array_equal(np.concatenate(shards), memory.train_images.numpy())


def test_any_indices_are_read_as_a_tensor_reads_them(photos: Path, folder: Path) -> None:
    memory, lazy = (load_dataset(DataConfig(path=str(path), **more)).train_images for path, more in (
        (photos, {"test_fraction": 0.2}), (folder, {})
    ))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for count in (0, 1, 7, 48, 200):
        chosen = torch.randint(-48, 48, (count,), generator=generator)
        assert torch.equal(lazy[chosen], memory[chosen])
    for part in (slice(None), slice(5, 25), slice(47, 400), slice(None, None, 3), slice(20, 3, -2), slice(9, 9)):
        values = torch.from_numpy(memory.numpy()[part].copy())
        assert torch.equal(lazy[part], values)
    with pytest.raises(IndexError, match="expected indices -48 to 47, got -49 to 3"):
        lazy[torch.tensor([3, -49])]
    for wrong in (torch.tensor([48]), torch.tensor([-49]), torch.tensor([0.0]), torch.tensor([[1]])):
        with pytest.raises(IndexError, match="expected indices"):
            lazy[wrong]


def test_the_first_images_are_a_range_that_reads_nothing(folder: Path) -> None:
    whole = load_dataset(DataConfig(path=str(folder)))
    some = load_dataset(DataConfig(path=str(folder), train_images=25, test_images=3))
    assert (len(some.train_images), len(some.test_images), len(some.train_labels)) == (25, 3, 25)
    assert torch.equal(some.train_images[torch.tensor([24, -1])], whole.train_images[torch.tensor([24, 24])])
    assert some.blocks is not None
    assert some.blocks.tolist() == [0, 10, 20, 25]
    assert some.digest() != whole.digest()
    shutil.rmtree(folder)
    again = whole.take(slice(7), slice(2))
    assert len(again.train_images) == 7
    with pytest.raises(DataError, match=r"train-00000.bin: expected a shard of 250 bytes, found no such file"):
        again.train_images[:]


def test_threads_share_the_images(folder: Path) -> None:
    images = load_dataset(DataConfig(path=str(folder))).train_images
    whole, wrong = images[:], []

    def read(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(50):
            chosen = torch.randint(0, 48, (20,), generator=generator)
            if not torch.equal(images[chosen], whole[chosen]):
                wrong.append(seed)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_training_on_shards_gives_the_weights_of_training_in_memory(photos: Path, folder: Path) -> None:
    layer = LayerConfig(out_channels=4, kernel_size=3, train=TrainConfig(batch_size=8, epochs=2))
    weights = []
    for path, more in ((photos, {"test_fraction": 0.2}), (folder, {})):
        data = load_dataset(DataConfig(path=str(path), **more))
        shutil.rmtree(photos, ignore_errors=path == folder)  # the source may go away once it is prepared
        stack = Stack(ModelConfig(layers=(layer,)), data.source)
        weights.append(Trainer(stack, data.train_images, data.train_labels).fit().layer(0).feedforward)
    assert torch.equal(*weights)


# -- manifests of others -----------------------------------------------------------------------------------------------

NAME = "train-00000.bin"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), r"prepared.json: expected format 1, got 2"),
        (lambda m: m.pop("format"), "expected format 1, got None"),
        (lambda m: m["train"]["shards"][0].update(file="../x.bin"), "train.shards.0.file: expected"),
        (lambda m: m["train"]["shards"][0].update(file="/etc/passwd"), "train.shards.0.file: expected"),
        (lambda m: m["train"]["shards"][0].update(file="test-00000.bin"), "expected shards named train-…"),
        (lambda m: m["train"]["shards"][0].update(count=0), "train.shards.0.count: expected greater than 0"),
        (lambda m: m["train"]["shards"][0].update(count=2**40), "train.shards.0.count: expected"),
        (lambda m: m["train"]["shards"][0].update(count=2**27), "train: expected at most 2147483648 bytes per shard"),
        (lambda m: m["train"]["shards"][0].update(count=11), "expected digest"),
        (lambda m: m["train"].update(shards=[]), "train.shards: expected"),
        (lambda m: m.update(shape=[1, 5]), "shape: expected"),
        (lambda m: m.update(shape=[1, 2**16, 2**16]), "expected at most 2147483648 bytes per image"),
        (lambda m: m.update(digest="0" * 16), "expected digest"),
        (lambda m: m.update(more=1), "more: unknown key"),
        (lambda m: m.update(classes=["a", "b", "d"]), "expected digest"),
    ],
)
def test_a_manifest_that_is_not_ours_is_refused(folder: Path, change, message: str) -> None:
    values = json.loads((folder / MANIFEST).read_text())
    change(values)
    (folder / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(DataError, match=message) as error:
        load_dataset(DataConfig(path=str(folder)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"format": NaN}'])
def test_a_manifest_that_is_no_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DataError, match=r"prepared.json: expected"):
        load_dataset(DataConfig(path=str(folder)))


def test_files_that_are_links_are_not_followed(folder: Path, tmp_path: Path) -> None:
    for file in (NAME, "train-labels.bin", MANIFEST):
        target = tmp_path / f"other-{file}"
        (folder / file).rename(target)
        (folder / file).symlink_to(target)
        with pytest.raises(DataError, match="link"):
            load_dataset(DataConfig(path=str(folder))).train_images[:]
        (folder / file).unlink()
        target.rename(folder / file)


def test_labels_in_another_order_are_refused(folder: Path) -> None:
    path = folder / "train-labels.bin"
    labels = np.fromfile(path, "<i8")
    labels[::-1].tofile(path)
    with pytest.raises(DataError, match=r"train-labels.bin: expected the 48 labels of the manifest, got others"):
        load_dataset(DataConfig(path=str(folder)))


def test_a_shard_of_another_length_is_named(folder: Path) -> None:
    with (folder / NAME).open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"train-00000.bin: expected a shard of 250 bytes, got 251"):
        load_dataset(DataConfig(path=str(folder))).train_images[:]


def test_other_images_or_labels_have_another_digest(photos: Path, folder: Path, tmp_path: Path) -> None:
    digests = {load_dataset(DataConfig(path=str(folder))).digest()}
    first = next(photos.glob("class0/*"))
    first.write_bytes(first.read_bytes()[:-1] + b"\x01")
    digests.add(load_dataset(DataConfig(path=str(prepared(config_of(photos), tmp_path / "changed")))).digest())
    first.rename(photos / "class1" / first.name)
    digests.add(load_dataset(DataConfig(path=str(prepared(config_of(photos), tmp_path / "moved")))).digest())
    assert len(digests) == 3


# -- preparation -------------------------------------------------------------------------------------------------------


def test_parts_that_are_there_are_not_made_again(photos: Path, folder: Path) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    content = (folder / "train-00002.bin").read_bytes()
    (folder / MANIFEST).unlink()
    (folder / "train-00001.bin").unlink()
    (folder / "train-00002.bin").write_bytes(bytes(SHARD))  # as long, with another sha256
    (folder / "parts" / "train-00003.json").write_text("{")
    prepared(config_of(photos), folder)
    after = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.bin")}
    made = {name for name in before if after[name] != before[name]}
    assert made == {f"train-{n:05d}.bin" for n in (1, 2, 3)} | {"train-labels.bin", "test-labels.bin"}
    assert (folder / "train-00002.bin").read_bytes() == content


def test_parts_with_changed_images_are_made_again(photos: Path, folder: Path) -> None:
    """An interrupted preparation must not mix images of before with others of the same names."""
    (folder / MANIFEST).unlink()
    before = {path.name: path.read_bytes() for path in folder.glob("t*-0*.bin")}
    changed = photos / "class0" / "000.pgm"
    changed.write_bytes(b"P5 %d %d 255 " % (SIDE, SIDE) + bytes(SIDE * SIDE))
    prepared(config_of(photos), folder)
    assert sum(path.read_bytes() != before[path.name] for path in folder.glob("t*-0*.bin")) == 1
    assert same(load_dataset(DataConfig(path=str(folder))), load_dataset(config_of(photos)))


def test_a_place_that_holds_other_images_is_refused(photos: Path, folder: Path) -> None:
    assert finished(config_of(photos), Location(folder)) is not None
    with pytest.raises(ConfigError, match=r"data.size: expected None, by which .*prepared was prepared, got 4"):
        finished(config_of(photos, size=4), Location(folder))
    with pytest.raises(ConfigError, match=r"data.size: expected None, as .*prepared was prepared, got 4"):
        load_dataset(DataConfig(path=str(folder), size=4))
    assert len(load_dataset(config_of(folder)).test_images) == 12  # the split it was prepared with, named again


def test_a_relative_place_of_test_images_is_that_of_the_preparation(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photos, "more")
    prepared(DataConfig(path="photos", test_path="more"), tmp_path / "prepared")
    assert len(load_dataset(DataConfig(path="prepared", test_path="more")).test_images) == 60
    with pytest.raises(ConfigError, match=r"data.test_path: expected '/.*/more', as prepared was prepared"):
        load_dataset(DataConfig(path="prepared", test_path="photos"))


def test_damaged_images_are_left_out_and_named_whatever_the_workers(photos: Path, tmp_path: Path) -> None:
    for index in (3, 17, 40):
        next(photos.glob(f"*/{index:03d}.pgm")).write_bytes(b"P5 5 5 255 short")
    config = config_of(photos, damaged="skip")
    folder = prepared(config, tmp_path / "prepared")
    data, memory = load_dataset(DataConfig(path=str(folder))), load_dataset(config)
    assert data.skipped == memory.skipped == 3
    assert same(data, memory)
    manifest = read_manifest(Location(folder))
    assert sorted(each.key[-7:-4] for each in manifest.skipped) == ["003", "017", "040"]
    assert all("cannot be decoded" in each.reason for each in manifest.skipped)
    messages = set()
    for turn in range(3):
        with pytest.raises(DataError) as error:
            prepared(config_of(photos), tmp_path / f"again{turn}")
        messages.add(str(error.value))
    assert len(messages) == 1
    with pytest.raises(DataError, match=r"photos: expected at most data.max_skipped=2 damaged images, got more"):
        prepared(config_of(photos, damaged="skip", max_skipped=2), tmp_path / "few")
    with pytest.raises(DataError, match="cannot be decoded"):  # what was left out then is not allowed now
        finished(config_of(photos), Location(folder))


def test_images_of_two_sizes_are_refused_before_anything_is_committed(photos: Path, tmp_path: Path) -> None:
    (photos / "class0" / "999.pgm").write_bytes(b"P5 2 2 255 abcd")
    with pytest.raises(DataError, match=r"expected images of one size, got 5 × 5 in .* and 2 × 2 in .*999.pgm"):
        prepared(config_of(photos), tmp_path / "prepared")
    assert not (tmp_path / "prepared" / MANIFEST).exists()


def test_large_own_images_are_prepared_on_the_way(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = load_dataset(config_of(photos))
    monkeypatch.setattr(simmatch.data.preparation, "IN_MEMORY_BYTES", 1000)
    config = config_of(photos, cache_dir=str(tmp_path / "cache"))
    notes: list[str] = []
    data = load_dataset(config, warn=notes.append)
    assert isinstance(data.train_images, PreparedImages)
    assert same(data, memory)
    assert len(notes) == 1
    assert "photos: 60 images are prepared once, in" in notes[0]
    again = load_dataset(config, warn=notes.append)
    assert again.digest() == data.digest()
    assert len(notes) == 1
    (photos / "class0" / "new.pgm").write_bytes(b"P5 5 5 255 " + bytes(25))
    assert len(load_dataset(config, warn=notes.append).train_images) == 49  # other images, another place
    assert isinstance(load_dataset(config_of(photos, train_images=20, test_images=10)).train_images, torch.Tensor)
    (photos / "class0" / "new.pgm").write_bytes(b"P5 5 5 255 " + bytes(range(25)))  # the name is the same
    changed = load_dataset(config, warn=notes.append)
    monkeypatch.setattr(simmatch.data.preparation, "IN_MEMORY_BYTES", 2**30)
    assert same(changed, load_dataset(config_of(photos)))


def test_of_two_that_prepare_the_same_in_the_cache_one_does(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(simmatch.data.preparation, "IN_MEMORY_BYTES", 1000)
    config, notes, digests = config_of(photos, cache_dir=str(tmp_path / "cache")), [], []

    def load() -> None:
        digests.append(load_dataset(config, warn=notes.append).digest())

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(notes) == 1
    assert len(digests) == 3
    assert len(set(digests)) == 1


# -- the cache of a node -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as running:
        yield running


@pytest.fixture
def bucket(store: ObjectStore, folder: Path, tmp_path: Path) -> str:
    """The prepared images in an object store."""
    place = f"s3://{BUCKET}/{tmp_path.name}/prepared"
    system, path, _ = simmatch.remote.file_system(place)
    system.put(str(folder), path, recursive=True)
    return place


@pytest.fixture
def remote(bucket: str, tmp_path: Path) -> DataConfig:
    return DataConfig(path=bucket, cache_dir=str(tmp_path / "cache"))


def copies(tmp_path: Path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "cache").rglob("*.bin"))


def test_shards_of_a_store_are_copied_once_as_they_are_needed(
    remote: DataConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = load_dataset(DataConfig(path=str(folder))), load_dataset(remote)
    assert there.digest() == here.digest()
    assert copies(tmp_path) == []
    assert torch.equal(there.train_images[torch.tensor([12, 3])], here.train_images[torch.tensor([12, 3])])
    assert copies(tmp_path) == ["train-00000.bin", "train-00001.bin"]
    assert same(here, there)
    assert len(copies(tmp_path)) == 7

    def none(*_: object) -> None:
        pytest.fail("a shard is copied again")

    monkeypatch.setattr(simmatch.data.cache, "_fetched", none)
    assert same(here, load_dataset(remote))


def test_a_preparation_can_be_written_to_a_store(
    photos: Path, store: ObjectStore, tmp_path: Path, folder: Path
) -> None:
    place = f"s3://{BUCKET}/{tmp_path.name}/written"
    config = config_of(photos)
    for _ in range(2):  # the second finds every part
        prepare(Plan(config, list_samples(config)), Location(place), in_threads, lambda done, total: None)
    remote = DataConfig(path=place, cache_dir=str(tmp_path / "cache"))
    assert load_dataset(remote).digest() == load_dataset(DataConfig(path=str(folder))).digest()


def test_least_recently_used_shards_make_room_and_open_ones_stay(
    folder: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, cache, told = read_manifest(Location(folder)), tmp_path / "cache", []
    shards = manifest.train.shards

    def opener() -> ShardCache:
        return ShardCache(cache, 3 * SHARD, digest=manifest.digest, warn=told.append)

    one, other = opener(), opener()  # as of two processes
    held = one.open(Location(bucket), shards[0], SHARD)
    for number, at in ((1, 100), (2, 50)):
        other.open(Location(bucket), shards[number], SHARD)
        os.utime(one.folder / shards[number].file, (at, at))
    other.open(Location(bucket), shards[3], SHARD)
    assert copies(tmp_path) == [shards[number].file for number in (0, 1, 3)]
    assert told == []
    content, expected = bytearray(SHARD), (folder / shards[0].file).read_bytes()
    held.read_into(memoryview(content), 0)
    assert content == expected
    kept = [one.open(Location(bucket), shards[number], SHARD) for number in (1, 3)]
    past = other.open(Location(bucket), shards[2], SHARD)  # all others are open
    assert copies(tmp_path) == [shards[number].file for number in (0, 1, 3)]
    past.read_into(memoryview(content), 0)
    assert content == (folder / shards[2].file).read_bytes()
    assert len(told) == 1
    assert "read past the cache: data.cache_bytes=750 is taken by what is in use" in told[0]
    other.open(Location(bucket), shards[2], SHARD)
    assert len(told) == 1
    del kept
    other.open(Location(bucket), shards[2], SHARD)
    assert shards[2].file in copies(tmp_path)


def test_copies_that_are_made_at_once_share_the_budget(
    folder: Path, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest, told = read_manifest(Location(folder)), []
    shards, kept, read = manifest.train.shards, [], Location.read
    one, other = (ShardCache(tmp_path / "cache", 3 * SHARD, digest=manifest.digest, warn=told.append) for _ in range(2))

    def slow(location: Location, file: str, most_bytes: int) -> bytes:
        if file == shards[0].file:  # while it is on its way, others fill the cache
            kept.extend(other.open(location, shards[number], SHARD) for number in (1, 2, 3))
        return read(location, file, most_bytes)

    monkeypatch.setattr(Location, "read", slow)
    content = bytearray(SHARD)
    one.open(Location(bucket), shards[0], SHARD).read_into(memoryview(content), 0)
    assert content == (folder / shards[0].file).read_bytes()
    assert copies(tmp_path) == [shards[number].file for number in (1, 2, 3)]
    assert len(told) == 1


def test_a_full_disk_is_read_past_and_said_once(
    remote: DataConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(simmatch.files.os, "fsync", full)
    told: list[str] = []
    data = load_dataset(remote, warn=told.append)
    assert same(data, load_dataset(DataConfig(path=str(folder))))
    assert copies(tmp_path) == []
    assert len(told) == 1
    assert "shards are read past the cache" in told[0]
    assert "No space left on device" in told[0]


def test_a_damaged_shard_is_fetched_once_more_and_then_named(
    remote: DataConfig, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, fetched = Location.read, []

    def damaged(location: Location, file: str, most_bytes: int) -> bytes:
        content = read(location, file, most_bytes)
        if file != NAME:
            return content
        fetched.append(file)
        return content if len(fetched) > faults else content[:-1] + bytes([content[-1] ^ 1])

    monkeypatch.setattr(Location, "read", damaged)
    faults = 1
    first = torch.tensor([0])
    expected = load_dataset(DataConfig(path=str(folder))).train_images[first]
    assert torch.equal(load_dataset(remote).train_images[first], expected)
    assert fetched == [NAME, NAME]
    shutil.rmtree(tmp_path / "cache")
    fetched.clear()
    faults = 2
    with pytest.raises(DataError, match=r"s3://.*/train-00000.bin: expected sha256 \w{64}, got another, twice"):
        load_dataset(remote).train_images[first]
    assert copies(tmp_path) == []


def test_a_store_that_is_away_for_a_while_is_asked_again(remote: DataConfig, store: ObjectStore, folder: Path) -> None:
    data = load_dataset(remote)
    store.stop()
    timer = threading.Timer(1.5, store.start)
    timer.start()
    try:
        assert torch.equal(data.train_images[:], load_dataset(DataConfig(path=str(folder))).train_images[:])
    finally:
        timer.join()


def test_a_copy_that_was_cut_off_is_made_again(remote: DataConfig, folder: Path, tmp_path: Path) -> None:
    data = load_dataset(remote)
    whole = load_dataset(DataConfig(path=str(folder)))
    place = tmp_path / "cache" / "shards" / read_manifest(Location(folder)).digest
    place.mkdir(parents=True)
    (place / NAME).write_bytes(b"short")
    (place / "train-00001.bin.partial").write_bytes(b"left by a process that was killed")
    assert same(data, whole)
    assert not list(place.glob("*.partial"))


def test_the_budget_must_have_room_for_the_order(remote: DataConfig) -> None:
    for order, budget, message in (
        (
            "permutation",
            700,
            r"data.cache_bytes: expected at least 1500, all of the data, or data.order: blocks, got 700",
        ),
        ("blocks", 100, r"data.cache_bytes: expected at least 4000 for these shards, got 100"),
    ):
        with pytest.raises(ConfigError, match=message):
            load_dataset(remote.model_copy(update={"order": order, "cache_bytes": budget}))


def test_a_lock_that_another_holds_is_waited_for_in_vain(tmp_path: Path) -> None:
    with (
        locked(tmp_path / "lock", 1.0),
        pytest.raises(TimeoutError, match="another process holds it"),
        locked(tmp_path / "lock", 0.05),
    ):
        pass
    with locked(tmp_path / "lock", 0.0):
        pass


# -- the order ---------------------------------------------------------------------------------------------------------


def test_blocks_are_a_permutation_that_reads_a_window_at_a_time() -> None:
    blocks = torch.tensor([0, 10, 20, 30, 45, 60, 61, 70, 80, 90, 100, 110, 120])
    order = epoch_order(120, seed=3, epoch=2, blocks=blocks)
    assert torch.equal(order.sort().values, torch.arange(120))
    shard = torch.bucketize(order, blocks[1:], right=True)
    first = {int(s) for s in shard[: len(order) // 2]}
    assert len(first) <= 8
    assert not torch.equal(order, epoch_order(120, seed=3, epoch=1, blocks=blocks))
    assert torch.equal(order[:30], epoch_order(120, seed=3, epoch=2, images=30, blocks=blocks))
    assert torch.equal(order, epoch_order(120, seed=3, epoch=2, blocks=blocks))


def test_a_batch_of_blocks_depends_on_its_number_alone() -> None:
    arguments = {"epochs": 2, "seed": 5, "blocks": torch.arange(0, 101, 10)}
    forward = [batch.tolist() for batch in Batches(100, 30, **arguments)]
    batches = Batches(100, 30, **arguments)
    assert [batches[update].tolist() for update in reversed(range(8))] == forward[::-1]


def test_one_set_of_images_is_visited_whatever_the_blocks(folder: Path) -> None:
    data = load_dataset(DataConfig(path=str(folder), order="blocks"))
    assert data.blocks is not None
    visits = torch.cat(list(Batches(len(data.train_images), 7, epochs=1, seed=0, blocks=data.blocks)))
    assert torch.equal(visits.sort().values, torch.arange(48))
    prepared = PreparedData(Location(folder), DataConfig(path=str(folder)), pytest.fail)
    assert prepared.images("train").blocks.tolist() == [0, 10, 20, 30, 40, 48]


class Recorded:
    """Images that keep the indices that were asked for."""

    def __init__(self, images: PreparedImages) -> None:
        self._images, self.shape, self.asked = images, images.shape, []

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, indices: torch.Tensor) -> torch.Tensor:
        self.asked.append(indices.tolist())
        return self._images[indices]


class Stopped(Exception):
    """As on ranks that the controller asks to stop."""


class Between(Observer):
    """Goes on after `first` updates, and stops after `last`."""

    def __init__(self, first: int, last: int, images: Recorded) -> None:
        self._first, self._last, self._images = first, last, images

    def restore(self, index, layer) -> None:
        layer.updates.fill_(self._first)

    def started(self, index, layer) -> None:
        self._images.asked.clear()  # of the shape and of the calibration

    def updated(self, update) -> None:
        if update.number == self._last:
            raise Stopped


@pytest.mark.parametrize("order", ["permutation", "blocks"])
def test_two_four_and_three_ranks_visit_the_images_of_one_undisturbed_run(folder: Path, order: str) -> None:
    data = load_dataset(DataConfig(path=str(folder), order=order))
    layer = LayerConfig(out_channels=4, kernel_size=3, train=TrainConfig(batch_size=5, epochs=2))

    def visited(ranks: int, first: int, last: int) -> list[list[int]]:
        images = [Recorded(data.train_images) for _ in range(ranks)]

        def train(exchange: Exchange) -> None:
            Trainer(
                Stack(ModelConfig(layers=(layer,)), data.source, seed=4),
                images[exchange.rank],
                mesh=Mesh.of_owners(exchange),
                observer=Between(first, last, images[exchange.rank]),
                blocks=data.blocks if order == "blocks" else None,
            ).fit()

        for outcome in run_owners(ranks, train):
            assert isinstance(outcome, Stopped)
        asked = [each.asked[: last - first] for each in images]  # one more may have been read ahead
        assert all(one == asked[0] for one in asked)
        return asked[0]

    parts = visited(2, 0, 4) + visited(4, 4, 13) + visited(3, 13, 20)  # an epoch has 10 updates
    assert parts == visited(1, 0, 20)
    for epoch in (parts[:10], parts[10:]):
        assert sorted(index for batch in epoch for index in batch) == list(range(48))
