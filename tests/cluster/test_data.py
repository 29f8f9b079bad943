"""Every rank loads the files of its own node: one that finds other data is named before anything is exchanged."""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.config import RunConfig
from cluster.messages import RankStatus
from cluster.training import Assignment, load_dataset
from cluster.worker import Worker
from simmatch.data.sources import Dataset


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
    assert status.num_exchanges == 0


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
