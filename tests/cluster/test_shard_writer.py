"""Shards are written beside training; a fault of the disk costs checkpoints, not the run."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.checkpoints.manifest import Cursor, LayerState, Shard, folder_of
from cluster.checkpoints.shard_writer import ShardWriter, Snapshot, write_shard
from cluster.messages import Outbox, ShardFailed, ShardWritten
from simmatch.remote import StorageError
from simmatch.sharding.rows import Rows
from tests.exchanges import of_type

LAYERS = [LayerState(usual=2.0)]


def cursor(step: int) -> Cursor:
    return Cursor(step=step, layer=0, updates=step)


def snapshot() -> Snapshot:
    return Snapshot({"w": torch.arange(6.0).reshape(3, 2)}, {"w": Rows.all(3)}, LAYERS)


class Disk:
    """Writes shards once `free` is set, or raises `error`."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error, self.begun, self.free = error, threading.Event(), threading.Event()

    def __call__(
        self, folder: Path, rank: int, world_size: int, tensors: dict[str, Tensor], rows: dict[str, Rows]
    ) -> Shard:
        self.begun.set()
        assert self.free.wait(20)
        if self.error is not None:
            raise self.error
        return write_shard(folder, rank, world_size, tensors, rows)


@pytest.fixture
def disk() -> Iterator[Disk]:
    made = Disk()
    yield made
    made.free.set()


def writer(run_dir: Path, disk: Disk, patience_s: float = 20.0) -> tuple[ShardWriter, Outbox]:
    outbox = Outbox()
    return ShardWriter(run_dir, 0, 1, outbox, patience_s=patience_s, write=disk), outbox


def test_training_does_not_wait_for_the_disk(tmp_path: Path, disk: Disk) -> None:
    writing, outbox = writer(tmp_path, disk)
    writing.submit(cursor(4), snapshot)
    assert disk.begun.wait(20)
    assert outbox.messages == []  # back from the call, and nothing is written
    disk.free.set()
    writing.close()
    (written,) = of_type(outbox.messages, ShardWritten)
    assert (written.cursor, written.layers) == (cursor(4), LAYERS)
    assert (folder_of(tmp_path, 4) / written.shard.file).is_file()


def test_a_checkpoint_waits_for_the_one_before(tmp_path: Path, disk: Disk) -> None:
    writing, outbox = writer(tmp_path, disk)
    writing.submit(cursor(4), snapshot)
    threading.Timer(0.3, disk.free.set).start()
    writing.submit(cursor(8), snapshot)
    writing.close()
    assert [written.cursor.step for written in of_type(outbox.messages, ShardWritten)] == [4, 8]
    assert writing.seconds > 0.2  # and the time counts as spent on checkpoints


def test_a_disk_that_hangs_costs_checkpoints_only(tmp_path: Path, disk: Disk) -> None:
    writing, outbox = writer(tmp_path, disk, patience_s=0.1)
    writing.submit(cursor(4), snapshot)
    taken: list[int] = []

    def take() -> Snapshot:
        taken.append(1)
        return snapshot()

    started = time.monotonic()
    writing.submit(cursor(8), take)
    writing.close()
    assert time.monotonic() - started < 10
    assert taken == []  # nothing was copied for a checkpoint that is left out
    assert outbox.messages == [
        ShardFailed(8, "the one before it is not written after 0.1 s"),
        ShardFailed(4, "it is not written after 0.1 s"),
    ]


def test_a_full_disk_is_reported_and_the_next_checkpoint_is_tried(tmp_path: Path, disk: Disk) -> None:
    writing, outbox = writer(tmp_path, disk)
    disk.free.set()
    disk.error = OSError(28, "No space left on device")
    writing.submit(cursor(4), snapshot)
    writing.close()
    disk.error = None
    writing.submit(cursor(8), snapshot)
    writing.close()
    first, second = outbox.messages
    assert first == ShardFailed(4, "[Errno 28] No space left on device")
    assert isinstance(second, ShardWritten)
    assert second.cursor.step == 8


def test_a_fault_of_the_program_is_raised_in_training(tmp_path: Path, disk: Disk) -> None:
    writing, outbox = writer(tmp_path, disk)
    disk.free.set()
    disk.error = KeyError("w")
    writing.submit(cursor(4), snapshot)
    with pytest.raises(KeyError):
        writing.submit(cursor(8), snapshot)
    assert outbox.messages == []


def test_what_the_operating_system_refuses_is_a_disks_fault(tmp_path: Path) -> None:
    """A real refusal, of files above 4 KiB: whatever the libraries make of it is caught."""
    large = Snapshot({"w": torch.zeros(3, 4096)}, {"w": Rows.all(3)}, LAYERS)
    outbox = Outbox()
    writing = ShardWriter(tmp_path, 0, 1, outbox, patience_s=20.0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        writing.submit(cursor(4), lambda: large)
        writing.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    (failed,) = outbox.messages
    assert isinstance(failed, ShardFailed)
    assert "File too large" in failed.reason
    assert list(folder_of(tmp_path, 4).glob("*.safetensors")) == []


def test_a_store_that_is_away_is_asked_again_and_training_does_not_wait(tmp_path: Path) -> None:
    """The checkpoint that found it away is written when it is back; one that is due meanwhile is left out at once, one
    that is needed waits."""
    back, asked = threading.Event(), threading.Event()

    def write(*arguments: Any) -> Shard:
        if not back.is_set():
            asked.set()
            raise StorageError("s3://x: away")
        return write_shard(*arguments)

    outbox = Outbox()
    writing = ShardWriter(tmp_path, 0, 1, outbox, patience_s=30.0, write=write)
    writing.submit(cursor(4), snapshot)
    assert asked.wait(20)
    deadline = time.monotonic() + 20
    while not writing._failing and time.monotonic() < deadline:
        time.sleep(0.01)
    writing.submit(cursor(8), snapshot)
    assert writing.seconds < 5
    assert outbox.messages == [ShardFailed(8, "the one before it is not written: its store does not answer")]
    threading.Timer(0.3, back.set).start()
    writing.submit(cursor(10), snapshot, needed=True)
    writing.close()
    assert [written.cursor.step for written in of_type(outbox.messages[1:], ShardWritten)] == [4, 10]


def test_a_constant_is_written_once_and_again_if_it_is_gone(tmp_path: Path) -> None:
    outbox = Outbox()
    writer = ShardWriter(tmp_path, 0, 1, outbox, patience_s=20.0)
    with_constant = replace(snapshot(), constants={"layer 0": ({"w": torch.arange(4.0)}, {"w": Rows.all(4)})})
    times = []
    for step in (4, 8, 12):
        writer.submit(cursor(step), lambda: with_constant)
        writer.close()
        ((constant,),) = (message.constants for message in outbox.messages[-1:])
        path = constant.path(folder_of(tmp_path, step))
        times.append(path.stat().st_mtime_ns)
        if step == 8:
            path.unlink()
    assert times[0] == times[1] < times[2]
    assert [path.name for path in (tmp_path / "checkpoints" / "constants").iterdir()] == [path.name]
