"""Every rank loads the files of its own node: one that finds other data is named before anything is exchanged."""

from __future__ import annotations

import dataclasses
import socket
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import simmatch
from cluster.config import RunConfig
from cluster.messages import NodeWarning, RankStatus
from cluster.training import Assignment, load_dataset
from cluster.worker import Worker
from simmatch.data.config import DataConfig
from simmatch.data.formats import DataError
from simmatch.data.listing import list_samples
from simmatch.data.location import Location
from simmatch.data.preparation import in_threads, prepare
from simmatch.data.preparing import Plan
from simmatch.data.sources import Dataset
from simmatch.remote import StorageError, retry


def ended(config: RunConfig, run_dir: Path, data: str | None) -> RankStatus:
    """Rank 0 of a run of one layer and one update, once it has ended."""
    worker = Worker(Assignment(config, run_dir, 0, data=data))
    worker.begin(1)
    while not (status := worker.poll(0)).done:
        time.sleep(0.01)
    return status


@pytest.mark.parametrize("lacking", [0, 1])
def test_a_rank_with_other_data_is_named(
    digits_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: int
) -> None:
    """The driver has all images; on this node one is damaged and left out, so shapes would differ as well."""
    config = digits_config(1)
    whole = load_dataset(config.data)

    def found(_: object, **options: object) -> Dataset:
        return dataclasses.replace(whole.take(slice(lacking, None), slice(None)), skipped=lacking)

    monkeypatch.setattr("cluster.training.load_dataset", found)
    status = ended(config, tmp_path, whole.digest())
    if lacking == 0:
        assert status.failure is None
        return
    assert status.failure is not None
    assert not status.failure.retryable
    assert status.failure.message == (
        f"rank 0: DataError: digits on {socket.gethostname()}: expected the data of this run, {whole.digest()}, got "
        f"{found(None).digest()}: 239 + 121 images, 1 damaged left out"
    )
    assert status.exchanges == {}


@pytest.mark.filterwarnings("always")
def test_what_a_rank_other_than_the_first_says_is_sent(
    digits_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What its data warns of, what our code warns of, and what is waited for; not what concerns other libraries."""
    monkeypatch.setattr("simmatch.remote.FIRST_PAUSE_S", 0.0)
    answers = iter([StorageError("s3://bucket/a: cannot be read: refused"), StorageError("refused again"), None])

    def ask() -> None:
        if (error := next(answers)) is not None:
            raise error

    def load(_: object, *, warn: Callable[[str], None]) -> Dataset:
        warn("cache on this node: shards are read past the cache: No space left on device")
        warnings.warn_explicit("updates take longer", UserWarning, simmatch.__file__, 1)
        warnings.warn_explicit("deprecated", UserWarning, torch.__file__, 1)
        retry(ask, 60.0)
        raise DataError("enough")

    others: list[str] = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: others.append(str(message)))
    monkeypatch.setattr("cluster.training.load_dataset", load)
    worker = Worker(Assignment(digits_config(2), tmp_path, 1))
    worker.begin(1)
    while not (status := worker.poll(0)).done:
        time.sleep(0.01)
    node = socket.gethostname()
    assert [each.text for each in status.messages if isinstance(each, NodeWarning)] == [
        "cache on this node: shards are read past the cache: No space left on device",
        f"{node}: updates take longer",
        f"{node}: s3://bucket/a: cannot be read: refused; asked again for 60 s",
    ]
    assert others == ["deprecated"]


def test_other_labels_are_other_data(
    digits_config: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = digits_config(1)
    whole = load_dataset(config.data)
    other = dataclasses.replace(whole, test_labels=torch.zeros_like(whole.test_labels))
    monkeypatch.setattr("cluster.training.load_dataset", lambda _, **options: other)
    failure = ended(config, tmp_path, whole.digest()).failure
    assert failure is not None
    assert "expected the data of this run" in failure.message


def test_another_preparation_is_other_data(digits_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    """Two nodes whose folders of the same name hold shards of other images."""
    digests = []
    for node in range(2):
        for index in range(12):
            path = tmp_path / "photos" / f"class{index % 2}" / f"{index}.pgm"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"P5 8 8 255 " + bytes([index + node] * 64))
        data = DataConfig(path=str(tmp_path / "photos"), test_fraction=0.5)
        to = Location(tmp_path / f"node{node}")
        prepare(Plan(data, list_samples(data)), to, in_threads, lambda done, total: None)
        digests.append(load_dataset(DataConfig(path=str(to))).digest())
    config = digits_config(1)
    here = config.model_copy(update={"data": DataConfig(path=str(tmp_path / "node1"))})
    failure = ended(here, tmp_path / "run", digests[0]).failure
    assert failure is not None
    assert failure.message == (
        f"rank 0: DataError: photos on {socket.gethostname()}: expected the data of this run, {digests[0]}, got "
        f"{digests[1]}: 6 + 6 images, 0 damaged left out"
    )
