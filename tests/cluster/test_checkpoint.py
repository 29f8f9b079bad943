"""Checkpoints: any shard count reads any checkpoint, damage is named, and a resumed run repeats every bit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from cluster.checkpoints.collector import CheckpointCollector
from cluster.checkpoints.committer import Committer, commit, prune, remove_unnamed
from cluster.checkpoints.manifest import (
    CONSTANTS,
    FORMAT,
    MANIFEST,
    CheckpointError,
    Cursor,
    DamagedError,
    LayerState,
    Manifest,
    folder_of,
    read_manifest,
)
from cluster.checkpoints.reader import Reader, load_into, newest_good
from cluster.checkpoints.shard_writer import write_constant, write_shard
from cluster.config import RunConfig
from cluster.messages import LayerMetrics, Message, Outbox, ShardWritten
from cluster.monitors import GrowthMonitor, TrainingFault
from cluster.storage import AnyPath, find, locate, remove, write_whole
from cluster.training import Assignment, Stopped, Training
from simmatch.config import parse
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import Rows, split_rows
from tests.exchanges import of_type, results
from tests.object_store import BUCKET, object_store

CHANNELS = 10

# -- files -------------------------------------------------------------------------------------------------------------


def whole_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "w": torch.randn(CHANNELS, 1, 3, 3, generator=generator),
        "m": torch.randn(CHANNELS, CHANNELS, generator=generator, dtype=torch.float64),
        "empty": torch.zeros(CHANNELS, 0),
        "counts": torch.arange(CHANNELS),
    }


REPLICATED = {"mean": torch.linspace(0, 1, 7), "updates": torch.tensor(12)}


def write(folder: Path, world_size: int, step: int = 12) -> Manifest:
    """A checkpoint as `world_size` ranks and the controller write it."""
    shards = []
    for rank, rows in enumerate(split_rows(CHANNELS, world_size)):
        own = {name: tensor[rows.start : rows.stop] for name, tensor in whole_tensors().items()}
        replicated = REPLICATED if rank == 0 else {}
        shards.append(write_shard(folder, rank, world_size, own | replicated, dict.fromkeys(own, rows)))
    manifest = Manifest(
        cursor=Cursor(step=step, layer=0, updates=step),
        config={"name": "test"},
        layers=[LayerState(usual=2.5)],
        shards=shards,
    )
    commit(folder, manifest)
    return manifest


@pytest.mark.parametrize("writers", [1, 2, 3])
@pytest.mark.parametrize("readers", [1, 2, 3, 10])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path, writers: int, readers: int) -> None:
    written = write(tmp_path / "step", writers)
    manifest = read_manifest(tmp_path / "step")
    assert manifest == written
    reader = Reader(tmp_path / "step", manifest)
    for name, expected in whole_tensors().items():
        parts = [reader.rows(name, rows) for rows in split_rows(CHANNELS, readers)]
        assert torch.equal(torch.cat(parts), expected)
        assert parts[0].dtype == expected.dtype
        reader.check_channels(name, CHANNELS)
    for name, expected in REPLICATED.items():
        assert torch.equal(reader.whole(name), expected)


@pytest.fixture(scope="module")
def three_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three") / "step"
    write(folder, 3)
    return folder


@given(data=st.data())
def test_any_row_range_is_that_range_of_the_whole(three_shards: Path, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, CHANNELS - 1))
    stop = data.draw(st.integers(start + 1, CHANNELS))
    reader = Reader(three_shards, read_manifest(three_shards))
    rows = Rows(start, stop, CHANNELS, stop - start)
    for name, expected in whole_tensors().items():
        assert torch.equal(reader.rows(name, rows), expected[start:stop])


def test_a_folder_without_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    write(folder_of(tmp_path, 4), 2, step=4)
    write(folder_of(tmp_path, 8), 2, step=8)
    (folder_of(tmp_path, 8) / MANIFEST).unlink()  # the state between the last shard and the commit
    assert newest_good(tmp_path, pytest.fail) == folder_of(tmp_path, 4)
    with pytest.raises(CheckpointError) as caught:
        read_manifest(folder_of(tmp_path, 8))
    assert str(folder_of(tmp_path, 8) / MANIFEST) in str(caught.value)


def test_no_checkpoints_is_none(tmp_path: Path) -> None:
    assert newest_good(tmp_path, pytest.fail) is None
    prune(tmp_path, 1, 8)


def test_the_newest_is_by_number_of_step(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        write(folder_of(tmp_path, step), 1, step=step)
    assert newest_good(tmp_path, pytest.fail) == folder_of(tmp_path, 100)


def test_a_damaged_checkpoint_is_passed_over_with_a_word_on_the_file(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        write(folder_of(tmp_path, step), 2, step=step)
    flip_a_bit(folder_of(tmp_path, 12))
    truncate_manifest(folder_of(tmp_path, 8))
    warnings: list[str] = []
    assert newest_good(tmp_path, warnings.append) == folder_of(tmp_path, 4)
    assert len(warnings) == 2
    assert "step-00000012 is damaged" in warnings[0]
    assert "rank-1-of-2.safetensors" in warnings[0]
    assert "step-00000008 is damaged" in warnings[1]
    assert MANIFEST in warnings[1]
    empty_shard(folder_of(tmp_path, 4))
    assert newest_good(tmp_path, warnings.append) is None


def test_what_a_damaged_attempt_left_does_not_push_out_good_checkpoints(tmp_path: Path) -> None:
    """The run fell back from 12 and 16 to 8, and has come to 10."""
    for step in (4, 8, 10, 12, 16):
        write(folder_of(tmp_path, step), 2, step=step)
    prune(tmp_path, 2, 10)
    kept = [path.name for path in sorted((tmp_path / "checkpoints").iterdir())]
    assert kept == [f"step-{step:08d}" for step in (8, 10, 12, 16)]
    prune(tmp_path, 2, 16)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000012", "step-00000016"]


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None) -> None:
        path.write_bytes(b"half of a shard")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("simmatch.tensor_files.save_file", full)
    with pytest.raises(OSError, match=r"No space left on device: .*rank-0-of-1.safetensors"):
        write(tmp_path / "step", 1)
    assert list((tmp_path / "step").iterdir()) == []


def test_nothing_partial_is_left(tmp_path: Path) -> None:
    write(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {
        "rank-0-of-2.safetensors",
        "rank-1-of-2.safetensors",
        MANIFEST,
    }


def test_prune_keeps_the_newest_and_what_is_being_written(tmp_path: Path) -> None:
    for step in (4, 8, 12, 16):
        write(folder_of(tmp_path, step), 2, step=step)
    for step in (8, 16):
        (folder_of(tmp_path, step) / MANIFEST).unlink()  # 8 was abandoned, 16 is still being written
    prune(tmp_path, 2, 16)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == [
        "step-00000004",
        "step-00000008",
        "step-00000012",
        "step-00000016",
    ]
    prune(tmp_path, 1, 16)
    assert [path.name for path in sorted((tmp_path / "checkpoints").iterdir())] == ["step-00000012", "step-00000016"]
    assert newest_good(tmp_path, pytest.fail) == folder_of(tmp_path, 12)


def write_with(run_dir: AnyPath, step: int, *values: float, layer: int = 0) -> list[AnyPath]:
    """A checkpoint of one rank with constants; returns their paths."""
    folder = folder_of(run_dir, step)
    shard = write_shard(folder, 0, 1, {"w": torch.full((3,), float(step))}, {"w": Rows.all(3)})
    constants = [write_constant(folder, {f"c{value}": torch.full((5,), value)}, {}) for value in values]
    cursor = Cursor(step=step, layer=layer, updates=step)
    commit(folder, Manifest(cursor=cursor, config={}, layers=[], shards=[shard], constants=constants))
    return [constant.path(folder) for constant in constants]


@pytest.fixture(params=["folder", "object store"])
def run_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[AnyPath]:
    if request.param == "folder":
        yield tmp_path
        return
    with object_store():
        yield locate(f"s3://{BUCKET}/{tmp_path.name}")


def constants_in(run_dir: AnyPath) -> set[str]:
    return {path.name for path in find(run_dir / "checkpoints" / CONSTANTS, "*")}


def test_a_constant_goes_with_the_last_checkpoint_that_names_it(run_place: AnyPath) -> None:
    """Once a new group starts; also those of an attempt that had gone further are kept."""
    (first,) = write_with(run_place, 4, 1.0)
    assert write_with(run_place, 8, 1.0, 2.0)[0] == first
    _, third = write_with(run_place, 12, 2.0, 3.0)
    (second,) = write_with(run_place, 16, 2.0)
    coming = write_constant(folder_of(run_place, 20), {"c": torch.ones(2)}, {}).path(folder_of(run_place, 20))
    prune(run_place, 1, 8)  # 12 and 16 are of an attempt that had gone further
    assert constants_in(run_place) == {path.name for path in (first, second, third, coming)}
    remove_unnamed(run_place)
    assert constants_in(run_place) == {path.name for path in (first, second, third)}
    prune(run_place, 2, 16)  # 12 names 2.0 and 3.0 still
    remove_unnamed(run_place)
    assert constants_in(run_place) == {path.name for path in (second, third)}
    prune(run_place, 1, 16)
    remove_unnamed(run_place)
    assert constants_in(run_place) == {second.name}
    reader = Reader(folder_of(run_place, 16), read_manifest(folder_of(run_place, 16)))
    reader.verify()
    assert torch.equal(reader.whole("c2.0"), torch.full((5,), 2.0))


def test_no_constant_goes_while_a_manifest_cannot_be_read(tmp_path: Path) -> None:
    """It may be readable again, such as after an error of the disk, and name any of them."""
    (first,) = write_with(tmp_path, 4, 1.0)
    write_with(tmp_path, 8, 2.0)
    manifest = folder_of(tmp_path, 4) / MANIFEST
    assert isinstance(manifest, Path)
    content = manifest.read_bytes()
    for unreadable in (b"", content[:-20], content.replace(b'"format": 4', b'"format": 5')):
        assert unreadable != content
        manifest.write_bytes(unreadable)
        with pytest.raises(CheckpointError):
            remove_unnamed(tmp_path)
        assert len(constants_in(tmp_path)) == 2
    manifest.write_bytes(content)
    remove_unnamed(tmp_path)
    assert first.name in constants_in(tmp_path)


def test_what_a_killed_process_left_goes_before_the_next_group_starts(tmp_path: Path) -> None:
    """After the commits of the group before it, whose constants nothing names until then."""
    left = [f"{64 * '0'}.safetensors", f"{64 * '1'}.safetensors.partial", "a person's own"]
    for name in left:
        write_whole(tmp_path / "checkpoints" / CONSTANTS / name, b"half of one")
    folder = folder_of(tmp_path, 4)
    shard = write_shard(folder, 0, 1, {"w": torch.zeros(3)}, {"w": Rows.all(3)})
    constant = write_constant(folder, {"c": torch.ones(5)}, {})
    committer = Committer(tmp_path, keep=1)
    cursor = Cursor(step=4, layer=0, updates=4)
    committer.submit(Manifest(cursor=cursor, config={}, layers=[], shards=[shard], constants=[constant]))
    committer.start_group()
    committer.submit(Manifest(cursor=cursor, config={}, layers=[], shards=[shard], constants=[constant]))
    assert [outcome.reason for outcome in committer.settled(20)] == [None, None]
    assert constants_in(tmp_path) == {constant.file, "a person's own"}


@pytest.mark.parametrize("content", [None, b"", b"other bytes of whatever length"])
def test_a_constant_that_is_damaged_or_gone_is_named(tmp_path: Path, content: bytes | None) -> None:
    (path,) = write_with(tmp_path, 4, 1.0)
    assert isinstance(path, Path)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    warnings: list[str] = []
    assert newest_good(tmp_path, warnings.append) is None
    assert str(path) in warnings[0]


# -- damage ------------------------------------------------------------------------------------------------------------


def flip_a_bit(folder: Path) -> str:
    path = folder / "rank-1-of-2.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return path.name


def truncate_shard(folder: Path) -> str:
    path = folder / "rank-0-of-2.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    return path.name


def empty_shard(folder: Path) -> str:
    path = folder / "rank-0-of-2.safetensors"
    path.write_bytes(b"")
    return path.name


def remove_shard(folder: Path) -> str:
    (folder / "rank-1-of-2.safetensors").unlink()
    return "rank-1-of-2.safetensors"


def swap_shards(folder: Path) -> str:
    one, two = folder / "rank-0-of-2.safetensors", folder / "rank-1-of-2.safetensors"
    content = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(content)
    return one.name


def truncate_manifest(folder: Path) -> str:
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes()[:-20])
    return MANIFEST


def manifest_of_bytes(folder: Path) -> str:
    (folder / MANIFEST).write_bytes(b"\xff\xfe\x00")
    return MANIFEST


def manifest_of_a_list(folder: Path) -> str:
    (folder / MANIFEST).write_text("[1, 2]")
    return MANIFEST


def edit_manifest(folder: Path, *, sign: bool = True, **changes: Any) -> str:
    """Other values; with a digest that fits, so that what is behind the digest is tried."""
    content = json.loads((folder / MANIFEST).read_text()) | changes
    if sign:
        del content["sha256"]
        text = json.dumps(content, sort_keys=True, separators=(",", ":"))
        content["sha256"] = sha256(text.encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(content))
    return MANIFEST


def other_step(folder: Path) -> str:
    """Valid in itself, and not what was written."""
    return edit_manifest(folder, sign=False, cursor={"step": 13, "layer": 0, "updates": 12})


def no_digest(folder: Path) -> str:
    content = json.loads((folder / MANIFEST).read_text())
    del content["sha256"]
    (folder / MANIFEST).write_text(json.dumps(content))
    return MANIFEST


def other_format(folder: Path) -> str:
    return edit_manifest(folder, format=FORMAT + 1)


def unknown_key(folder: Path) -> str:
    return edit_manifest(folder, surprise=1)


def cursor_of_text(folder: Path) -> str:
    return edit_manifest(folder, cursor={"step": "12", "layer": 0, "updates": 12})


def shard_elsewhere(folder: Path) -> str:
    shards = json.loads((folder / MANIFEST).read_text())["shards"]
    shutil.copy(folder / shards[0]["file"], folder.parent / "outside.safetensors")
    shards[0]["file"] = "../outside.safetensors"
    return edit_manifest(folder, shards=shards)


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        truncate_shard,
        empty_shard,
        remove_shard,
        swap_shards,
        truncate_manifest,
        manifest_of_bytes,
        manifest_of_a_list,
        other_format,
        unknown_key,
        cursor_of_text,
        shard_elsewhere,
        other_step,
        no_digest,
    ],
)
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, damage: Callable[[Path], str]) -> None:
    folder = tmp_path / "step"
    write(folder, 2)
    Reader(folder, read_manifest(folder)).verify()  # sound before
    name = damage(folder)
    with pytest.raises(CheckpointError) as caught:
        Reader(folder, read_manifest(folder)).verify()
    message = str(caught.value)
    assert name in message
    assert str(folder) in message
    assert "\n" not in message


def test_manifests_of_earlier_formats_are_read_without_retired_keys(tmp_path: Path) -> None:
    manifest = write(tmp_path, 2)
    edit_manifest(tmp_path, format=3)
    assert read_manifest(tmp_path) == manifest
    edit_manifest(
        tmp_path, format=2, seed=3, world_size=2, mlflow_run_id=None, mlflow_layer_run_ids={"0": "run"},
        last_step_sent={"0": 10}, layers=[{"bound": 2.5, "ridge": 1e-6, "usual": 2.5}],
    )  # fmt: skip
    assert read_manifest(tmp_path) == manifest
    edit_manifest(tmp_path, sign=False, seed=4)
    with pytest.raises(CheckpointError, match="sha256 is another"):
        read_manifest(tmp_path)


def test_a_shard_that_the_manifest_forgets_is_missed(tmp_path: Path) -> None:
    """A manifest of one shard of two is whole in itself; the rows are not."""
    manifest = write(tmp_path, 2)
    reader = Reader(tmp_path, manifest.model_copy(update={"shards": manifest.shards[:1]}))
    with pytest.raises(CheckpointError, match=r"expected rows 0 to 10 of w, found 5 of them$") as caught:
        reader.rows("w", Rows.all(CHANNELS))
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(CheckpointError, match="expected 10 channels in w, got 5"):
        reader.check_channels("w", CHANNELS)


def test_other_channels_are_refused(tmp_path: Path) -> None:
    reader = Reader(tmp_path, write(tmp_path, 2))
    for channels in (9, 12):
        with pytest.raises(CheckpointError, match=f"expected {channels} channels in w, got 10"):
            reader.check_channels("w", channels)
    with pytest.raises(CheckpointError, match=r"expected rows 6 to 12 of w, found 4 of them"):
        reader.rows("w", split_rows(12, 2)[1])


def test_unknown_tensors_are_refused_by_name(tmp_path: Path) -> None:
    reader = Reader(tmp_path, write(tmp_path, 2))
    with pytest.raises(CheckpointError, match="nothing"):
        reader.whole("nothing")
    with pytest.raises(CheckpointError, match="nothing"):
        reader.rows("nothing", Rows.all(CHANNELS))


@pytest.mark.parametrize("stored", [torch.zeros(3, 4), torch.zeros(4, 3, dtype=torch.float64)])
def test_a_tensor_of_another_shape_or_dtype_is_refused(tmp_path: Path, stored: Tensor) -> None:
    target = torch.ones(4, 3)
    with pytest.raises(CheckpointError, match=r"w: expected shape \[4, 3\] of torch.float32, got \[") as caught:
        load_into(target, stored, "w", tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert torch.equal(target, torch.ones(4, 3))


def test_shards_hold_no_code(tmp_path: Path) -> None:
    """safetensors: eight bytes of length, a JSON header, bytes. A pickle would begin with 0x80."""
    write(tmp_path, 1)
    content = (tmp_path / "rank-0-of-1.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    assert json.loads(content[8 : 8 + length]).keys() >= {"w", "m", "counts", "mean"}


# -- resuming ----------------------------------------------------------------------------------------------------------

ConfigMaker = Callable[..., RunConfig]


def train(exchange: Exchange, config: RunConfig, run_dir: Path, resume: Path | None = None) -> list[dict[str, Any]]:
    outbox = Outbox()
    assignment = Assignment(config, run_dir, exchange.rank, resume=resume)
    Training(assignment, Mesh.of_owners(exchange), outbox, torch.device("cpu")).run()
    return outbox.messages


def run(ranks: Any, config: RunConfig, run_dir: Path, resume: Path | None = None) -> list[list[Message]]:
    run_dir.mkdir(parents=True)
    return results(ranks(train, config.mesh.world_size, config, run_dir, resume))


def commit_all(config: RunConfig, run_dir: Path, messages: list[list[Message]]) -> list[Cursor]:
    """Manifests as the controller writes them, from what all ranks have reported."""
    cursors = []

    def submit(manifest: Manifest) -> None:
        commit(folder_of(run_dir, manifest.cursor.step), manifest)
        cursors.append(manifest.cursor)

    committer: Any = SimpleNamespace(submit=submit)
    collector = CheckpointCollector(committer, pytest.fail, None)
    for rank, own in enumerate(messages):
        for written in of_type(own, ShardWritten):
            collector.shard_written(rank, written, config, 1.0)
    assert not collector._shards  # each of them whole
    return cursors


def exported(run_dir: Path) -> dict[str, Tensor]:
    return load_file(run_dir / "model" / "model.safetensors")


def metrics_of(messages: list[Message]) -> dict[tuple[int, int], tuple[float, ...]]:
    names = ("objective", "residual", "num_iters", "active_fraction", "dead_channels", "revived_channels")
    return {
        (metrics.layer, metrics.update): tuple(getattr(metrics, name) for name in names)
        for metrics in of_type(messages, LayerMetrics)
    }


class Reference:
    """An uninterrupted run and its committed checkpoints."""

    def __init__(self, ranks: Any, config: RunConfig, run_dir: Path) -> None:
        self.config, self.run_dir = config, run_dir
        messages = run(ranks, config, run_dir)
        self.cursors = commit_all(config, run_dir, messages)
        self.metrics = metrics_of(messages[0])


@pytest.fixture(scope="module")
def alone(ranks: Any, digits_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(ranks, digits_config(1, dtype="float64"), tmp_path_factory.mktemp("alone") / "run")


@pytest.fixture(scope="module")
def pair(ranks: Any, digits_config: ConfigMaker, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    return Reference(ranks, digits_config(2), tmp_path_factory.mktemp("pair") / "run")


def test_checkpoints_come_every_so_often_and_after_each_layer(alone: Reference) -> None:
    """Layer 0 makes 10 updates (200 images, 20 each), layer 1 makes 12 (twice 120); every 4th of the 22 is kept."""
    assert [(cursor.step, cursor.layer, cursor.updates) for cursor in alone.cursors] == [
        (4, 0, 4),
        (8, 0, 8),
        (10, 0, 10),
        (12, 1, 2),
        (16, 1, 6),
        (20, 1, 10),
        (22, 1, 12),
    ]


@pytest.mark.parametrize("step", [4, 10, 12, 20, 22])
def test_resuming_repeats_every_bit_on_one_rank(ranks: Any, alone: Reference, tmp_path: Path, step: int) -> None:
    """From the middle of a layer, its end, the first and the second epoch of the next, and the end of training."""
    messages = run(ranks, alone.config, tmp_path / "run", folder_of(alone.run_dir, step))
    expected = exported(alone.run_dir)
    for name, tensor in exported(tmp_path / "run").items():
        assert torch.equal(tensor, expected[name]), name
    assert metrics_of(messages[0]).items() <= alone.metrics.items()
    written = []
    for message in of_type(messages[0], ShardWritten):
        layers = [message.layers.get(index, LayerState()) for index in range(message.cursor.layer + 1)]
        assert message.layers.keys() == {message.cursor.layer}  # those before have learnt, those after have no state
        written.append((message.cursor, layers, [message.shard, *message.constants]))
    later = [cursor for cursor in alone.cursors if cursor.step > step]  # it did not begin again
    manifests = [read_manifest(folder_of(alone.run_dir, cursor.step)) for cursor in later]
    assert written == [(manifest.cursor, manifest.layers, manifest.files) for manifest in manifests]


def test_what_does_not_change_is_written_once(pair: Reference) -> None:
    """The whitening of layer 1 and, from layer 1 on, layer 0: in one file each, named by every manifest."""
    manifests = [read_manifest(folder_of(pair.run_dir, cursor.step)) for cursor in pair.cursors]
    named = [{name for file in manifest.constants for name in file.shapes} for manifest in manifests]
    for cursor, manifest, names in zip(pair.cursors, manifests, named, strict=True):
        in_shards = {name for shard in manifest.shards for name in shard.shapes}
        assert {name.partition("whitening")[0] for name in in_shards} >= {f"layers.{cursor.layer}.lateral"}
        assert not in_shards & names
        assert {name.split(".")[1] for name in in_shards} == {str(cursor.layer)}
        whitening = {"layers.1.whitening", "layers.1.whitening_mean"}
        assert names >= whitening | {"layers.0.lateral", "layers.0.updates"} if cursor.layer == 1 else names == set()
    kept = {path.name: path for path in (pair.run_dir / "checkpoints" / CONSTANTS).iterdir()}
    assert kept.keys() == {
        f"{constant.sha256}.safetensors" for manifest in manifests for constant in manifest.constants
    }
    assert len(kept) == 2
    for name, path in kept.items():
        assert name == f"{sha256(path.read_bytes()).hexdigest()}.safetensors"
    whole = load_file(next(path for path in kept.values() if "layers.0.lateral" in load_file(path)))
    assert torch.equal(whole["layers.0.lateral"], exported(pair.run_dir)["layers.0.lateral"])


@pytest.mark.parametrize("step", [8, 16])
def test_resuming_repeats_every_bit_on_two_ranks(ranks: Any, pair: Reference, tmp_path: Path, step: int) -> None:
    messages = run(ranks, pair.config, tmp_path / "run", folder_of(pair.run_dir, step))
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == (
        pair.run_dir / "model/model.safetensors"
    ).read_bytes()
    assert metrics_of(messages[0]).items() <= pair.metrics.items()


def test_a_supervised_layer_below_another_is_settled_once(
    ranks: Any, digits_config: ConfigMaker, tmp_path: Path
) -> None:
    """Its label weights in the checkpoint of the layer above are settled, and not again, to rounding."""
    values = digits_config(1).model_dump(mode="json")
    values["model"]["layers"][0] |= {"supervised": True, "label_gain": 0.5}
    config = parse(RunConfig, values)
    whole = Reference(ranks, config, tmp_path / "whole")
    for step in (10, 16):  # before and after it was settled
        run(ranks, config, tmp_path / f"from-{step}", folder_of(whole.run_dir, step))
        assert (tmp_path / f"from-{step}/model/model.safetensors").read_bytes() == (
            whole.run_dir / "model/model.safetensors"
        ).read_bytes()


def test_growth_is_measured_from_one_reference_over_all_attempts(ranks: Any, alone: Reference) -> None:
    """That of update 10 of the layer, in the checkpoints after it; each attempt alone grows by less than it may."""
    usual = [read_manifest(folder_of(alone.run_dir, step)).layers[-1].usual for step in (20, 22)]
    assert usual[0] == usual[1]
    assert usual[0] is not None
    for update, growth in ((20, 1e3), (30, 9e5)):
        attempt = GrowthMonitor(1, usual[0])
        attempt.check(update, growth * usual[0])
        assert attempt.usual == usual[0]
    with pytest.raises(TrainingFault, match="explode") as caught:
        GrowthMonitor(1, usual[0]).check(40, 1.1e6 * usual[0])
    assert caught.value.diverged


class AskedAt(Outbox):
    """A rank that is asked to stop when it records the metrics of a step of a layer."""

    def __init__(self, layer: int, step: int) -> None:
        super().__init__()
        self.at = (layer, step)

    def send(self, message: Message) -> None:
        super().send(message)
        if isinstance(message, LayerMetrics) and (message.layer, message.update) == self.at:
            self.stopping = True


def train_until(exchange: Exchange, config: RunConfig, run_dir: Path, layer: int, step: int) -> list[Message]:
    """Rank 1 alone is asked."""
    outbox = AskedAt(layer, step) if exchange.rank == 1 else Outbox()
    with pytest.raises(Stopped):
        Training(
            Assignment(config, run_dir, exchange.rank), Mesh.of_owners(exchange), outbox, torch.device("cpu")
        ).run()
    return outbox.messages


@pytest.mark.parametrize(("layer", "updates", "step"), [(0, 5, 5), (0, 10, 10), (1, 10, 20)])
def test_ranks_that_are_asked_to_stop_agree_on_the_step(
    ranks: Any, pair: Reference, tmp_path: Path, layer: int, updates: int, step: int
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    messages = results(ranks(train_until, 2, pair.config, run_dir, layer, updates))
    cursors = commit_all(pair.config, run_dir, messages)
    assert cursors[-1] == Cursor(step=step, layer=layer, updates=updates, images=20 * step)
    assert not (run_dir / "model").exists()
    run(ranks, pair.config, tmp_path / "again", folder_of(run_dir, step))
    assert (tmp_path / "again/model/model.safetensors").read_bytes() == (
        pair.run_dir / "model/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(("world_size", "step"), [(2, 16), (3, 4)])
def test_resuming_on_other_shards_gives_the_same_model(
    ranks: Any, digits_config: ConfigMaker, alone: Reference, tmp_path: Path, world_size: int, step: int
) -> None:
    """Written on one rank, continued on two or three: the tolerance of parity in float64 (see test_parity)."""
    config = digits_config(world_size, dtype="float64")
    run(ranks, config, tmp_path / "run", folder_of(alone.run_dir, step))
    for name, expected in exported(alone.run_dir).items():
        scale = float(expected.abs().amax()) if expected.numel() else 0.0
        torch.testing.assert_close(exported(tmp_path / "run")[name], expected, rtol=0, atol=1e-9 * scale, msg=name)


def test_resuming_in_another_dtype_is_refused(
    ranks: Any, digits_config: ConfigMaker, alone: Reference, tmp_path: Path
) -> None:
    (outcome,) = ranks(train, 1, digits_config(1), tmp_path, folder_of(alone.run_dir, 4))
    assert isinstance(outcome, CheckpointError)
    assert "float32" in str(outcome)
    assert "float64" in str(outcome)
    assert str(folder_of(alone.run_dir, 4)) in str(outcome)


def test_a_damaged_checkpoint_stops_every_rank(
    ranks: Any, digits_config: ConfigMaker, pair: Reference, tmp_path: Path
) -> None:
    """The rank that needs the shard refuses it by name; the other one, which does not, waits for it in vain."""
    folder = tmp_path / "step"
    shutil.copytree(folder_of(pair.run_dir, 8), folder)
    name = flip_a_bit(folder)
    damaged = next(shard.rank for shard in read_manifest(folder).shards if shard.file == name)
    outcomes = ranks(train, 2, digits_config(2), tmp_path, folder, exchange_timeout_s=5.0)
    assert isinstance(outcomes[damaged], DamagedError), outcomes
    assert name in str(outcomes[damaged])
    assert not any(isinstance(outcome, str) or outcome is None for outcome in outcomes), outcomes


def test_prune_keeps_one_from_before_a_layer_was_complete(run_place: AnyPath) -> None:
    """A constant that all newer checkpoints name is damaged: the run goes on from the layer before."""
    for step, layer in ((4, 0), (8, 0), (12, 1), (16, 1), (20, 1), (24, 2), (28, 2)):
        learnt = write_with(run_place, step, *range(layer), layer=layer)
        prune(run_place, 2, step)
        left = [int(path.name.removeprefix("step-")) for path in find(run_place / "checkpoints", "step-*")]
        assert left == {4: [4], 8: [4, 8], 12: [8, 12], 16: [8, 12, 16], 20: [8, 16, 20], 24: [20, 24]}.get(
            step, [20, 24, 28]
        )
    remove(learnt[-1])
    assert newest_good(run_place, [].append) == folder_of(run_place, 20)
