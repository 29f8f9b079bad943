"""A run directory that is not one place: folders of the same name that are not shared, both ways."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import cluster.reach
from cluster.config import RunConfig
from cluster.reach import answer, heard, leave
from cluster.storage import AnyPath
from cluster.training import Assignment
from cluster.worker import Worker

NOTHING_FOUND = "does not find there what this job has written"
NOT_SEEN = "writes there what this job does not find"


def test_ranks_that_share_it_answer_and_nothing_is_left(tmp_path: Path) -> None:
    nonce = leave(tmp_path, "token")
    answers = [answer(tmp_path, "token", rank) for rank in range(3)]
    assert heard(tmp_path, "token", nonce, answers) == ["", "", ""]
    assert list(tmp_path.iterdir()) == []


def test_what_a_person_keeps_there_stays(tmp_path: Path) -> None:
    (tmp_path / "reach-study").mkdir()
    nonce = leave(tmp_path, "token")
    assert heard(tmp_path, "token", nonce, [answer(tmp_path, "token", 0)]) == [""]
    assert [path.name for path in tmp_path.iterdir()] == ["reach-study"]


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_of_the_same_name_elsewhere(tmp_path: Path, there: bool) -> None:
    """It exists on the rank's node, perhaps with what an earlier group has left there, or it does not."""
    here, other = tmp_path / "here", tmp_path / "other"
    here.mkdir()
    if there:
        leave(other, "before")
    nonce = leave(here, "token")
    answers = [answer(here, "token", 0), answer(other, "token", 1)]
    assert heard(here, "token", nonce, answers) == ["", NOTHING_FOUND]
    assert other.exists() == there


def test_a_node_that_reads_ours_and_writes_elsewhere(tmp_path: Path) -> None:
    """As a container with a layer of its own over a shared folder does: a copy of what was there, and its own files."""
    here, other = tmp_path / "here", tmp_path / "other"
    nonce = leave(here, "token")
    shutil.copytree(here, other)
    assert answer(other, "token", 1) == ""
    assert heard(here, "token", nonce, [answer(here, "token", 0), ""]) == ["", NOT_SEEN]


def test_an_answer_of_another_group_is_none(tmp_path: Path) -> None:
    leave(tmp_path, "token")
    assert answer(tmp_path, "token", 0) == ""
    nonce = leave(tmp_path, "token")
    assert heard(tmp_path, "token", nonce, [""]) == [NOT_SEEN]


def test_a_node_that_may_not_write_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: AnyPath, _: object) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    nonce = leave(tmp_path, "token")
    monkeypatch.setattr(cluster.reach, "write_whole", refuse)
    why = answer(tmp_path, "token", 0)
    assert "Read-only file system" in why
    assert heard(tmp_path, "token", nonce, [why]) == [why]


def test_what_a_rank_tells_of_itself(digits_config: Callable[..., RunConfig], tmp_path: Path) -> None:
    nonce = leave(tmp_path, "token")
    places = [
        Worker(Assignment(digits_config(2), run_dir, rank, token="token")).describe("127.0.0.1")
        for rank, run_dir in enumerate((tmp_path, tmp_path / "not-here"))
    ]
    answers = [place.reach for place in places]
    assert answers == ["", NOTHING_FOUND]
    assert heard(tmp_path, "token", nonce, answers) == answers
