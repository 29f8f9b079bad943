"""A run directory that is not shared: folders of the same name on two nodes, seen from either side."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import cluster.shared_folder
from cluster.config import RunConfig
from cluster.shared_folder import check_copies, copy_nonce, write_nonce
from cluster.storage import AnyPath
from cluster.training import Assignment
from cluster.worker import Worker

NOT_READ = "does not see the file that this job wrote there"
NOT_WRITTEN = "wrote a file there that this job does not see"


def test_ranks_that_share_it_copy_the_nonce_and_no_file_is_left(tmp_path: Path) -> None:
    nonce = write_nonce(tmp_path, "token")
    errors = [copy_nonce(tmp_path, "token", rank) for rank in range(3)]
    assert check_copies(tmp_path, "token", nonce, errors) == ["", "", ""]
    assert list(tmp_path.iterdir()) == []


def test_files_of_others_are_not_deleted(tmp_path: Path) -> None:
    (tmp_path / "reach-study").mkdir()
    nonce = write_nonce(tmp_path, "token")
    assert check_copies(tmp_path, "token", nonce, [copy_nonce(tmp_path, "token", 0)]) == [""]
    assert [path.name for path in tmp_path.iterdir()] == ["reach-study"]


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_of_the_same_name_elsewhere(tmp_path: Path, there: bool) -> None:
    """It exists on the rank's node, perhaps with what an earlier group has left there, or it does not."""
    here, other = tmp_path / "here", tmp_path / "other"
    here.mkdir()
    if there:
        write_nonce(other, "before")
    nonce = write_nonce(here, "token")
    errors = [copy_nonce(here, "token", 0), copy_nonce(other, "token", 1)]
    assert check_copies(here, "token", nonce, errors) == ["", NOT_READ]
    assert other.exists() == there


def test_a_node_that_reads_ours_and_writes_elsewhere(tmp_path: Path) -> None:
    """As a container with a layer of its own over a shared folder does: a copy of what was there, and its own files."""
    here, other = tmp_path / "here", tmp_path / "other"
    nonce = write_nonce(here, "token")
    shutil.copytree(here, other)
    assert copy_nonce(other, "token", 1) == ""
    assert check_copies(here, "token", nonce, [copy_nonce(here, "token", 0), ""]) == ["", NOT_WRITTEN]


def test_a_copy_by_another_group_does_not_count(tmp_path: Path) -> None:
    write_nonce(tmp_path, "token")
    assert copy_nonce(tmp_path, "token", 0) == ""
    nonce = write_nonce(tmp_path, "token")
    assert check_copies(tmp_path, "token", nonce, [""]) == [NOT_WRITTEN]


def test_a_node_without_permission_to_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: AnyPath, _: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    nonce = write_nonce(tmp_path, "token")
    monkeypatch.setattr(cluster.shared_folder, "write_whole", refuse)
    why = copy_nonce(tmp_path, "token", 0)
    assert "Read-only file system" in why
    assert check_copies(tmp_path, "token", nonce, [why]) == [why]


def test_a_worker_reports_whether_it_can_use_it(digits_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    nonce = write_nonce(tmp_path, "token")
    ranks = [
        Worker(Assignment(digits_config(2), run_dir, rank, token="token")).describe(None, "127.0.0.1")
        for rank, run_dir in enumerate((tmp_path, tmp_path / "not-here"))
    ]
    errors = [info.run_dir_error for info in ranks]
    assert errors == ["", NOT_READ]
    assert check_copies(tmp_path, "token", nonce, errors) == errors
