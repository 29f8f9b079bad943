"""A spool in an object store: only new lines are uploaded, and every line comes back, whatever was interrupted."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from cluster.storage import AnyPath, find, locate, remove, write_whole
from cluster.tracking import spool_parts
from cluster.tracking.spool import SPOOL_NAME
from cluster.tracking.spool_parts import SpoolParts
from tests.object_store import BUCKET, object_store

LINE = b'{"kind": "metrics", "step": %06d}\n'


class Uploads:
    """Writes as storage does; counts the bytes, and fails or cuts a file short where a test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.bytes = self.files = 0
        self.fail = self.cut = False
        monkeypatch.setattr(spool_parts, "write_whole", self.write)

    def write(self, path: AnyPath, content: bytes) -> None:
        if self.fail or self.cut:
            if self.cut and path.name != SPOOL_NAME:  # in place of an older one, it has to be whole or absent
                write_whole(path, content[: len(content) // 2])
            raise OSError("the store is away")
        self.bytes += len(content)
        self.files += 1
        write_whole(path, content)


def lines(first: int, count: int) -> bytes:
    return b"".join(LINE % number for number in range(first, first + count))


def test_bytes_and_files_of_many_commits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100 commits of 10 lines. The whole spool at each would be 50.5 times its size."""
    uploads, spool = Uploads(monkeypatch), tmp_path / SPOOL_NAME
    parts = SpoolParts(tmp_path / "run")
    for commit in range(100):
        with spool.open("ab") as file:
            file.write(lines(10 * commit, 10) + b'{"half')
        parts.append(spool)
        spool.write_bytes(spool.read_bytes()[: -len(b'{"half')])
    size = spool.stat().st_size
    assert uploads.files == 100
    assert size < uploads.bytes <= 4.5 * size
    assert len(find(tmp_path / "run" / "events", "*")) <= 7
    assert SpoolParts(tmp_path / "run").read() == spool.read_bytes()
    parts.append(spool)
    assert uploads.files == 100  # nothing new, nothing uploaded


def test_a_spool_in_an_object_store(tmp_path: Path) -> None:
    """Parts, a new machine that goes on, and the whole file in the end."""
    spool = tmp_path / SPOOL_NAME
    with object_store():
        place = locate(f"s3://{BUCKET}/{tmp_path.name}")
        here, there = SpoolParts(place), SpoolParts(place)
        for count in (1, 3, 4):
            spool.write_bytes(lines(0, count))
            assert here.append(spool) == count * len(lines(0, 1))
        assert there.read() == lines(0, 4)
        spool.write_bytes(lines(0, 9))
        there.append(spool)
        assert SpoolParts(place).read() == lines(0, 9)
        there.close(spool)
        assert [path.name for path in find(place, "*")] == [SPOOL_NAME]
        assert SpoolParts(place).read() == lines(0, 9)


def test_the_whole_file_of_an_earlier_version_is_the_beginning(tmp_path: Path) -> None:
    run_dir, spool = tmp_path / "run", tmp_path / SPOOL_NAME
    write_whole(run_dir / SPOOL_NAME, lines(0, 3) + b'{"half')
    parts = SpoolParts(run_dir)
    assert parts.read() == lines(0, 3)
    spool.write_bytes(lines(0, 5))
    parts.append(spool)
    assert SpoolParts(run_dir).read() == lines(0, 5)
    assert (run_dir / SPOOL_NAME).read_bytes() == lines(0, 3) + b'{"half'  # not uploaded again


def test_foreign_files_and_gaps_add_nothing(tmp_path: Path) -> None:
    size = len(lines(0, 2))
    for start, content in ((0, lines(0, 2)), (3 * size, lines(6, 2))):
        write_whole(tmp_path / "events" / f"{start:012d}-{start + size:012d}.jsonl", content)
    write_whole(tmp_path / "events" / "notes.jsonl", b"not ours\n")
    assert SpoolParts(tmp_path).read() == lines(0, 2)


def test_what_followed_a_gap_is_not_mixed_with_what_fills_it(tmp_path: Path) -> None:
    """A store has lost a part. The next attempt records those lines again, and others."""
    run_dir, spool = tmp_path / "run", tmp_path / SPOOL_NAME
    parts = SpoolParts(run_dir)
    for count in (16, 24, 28):
        spool.write_bytes(lines(0, count))
        parts.append(spool)
    _, lost, _ = find(run_dir / "events", "*")
    remove(lost)
    parts = SpoolParts(run_dir)
    assert parts.read() == lines(0, 16)
    spool.write_bytes(
        lines(0, 16) + b"".join(b"a longer line %d, of the next attempt\n" % number for number in range(9))
    )
    parts.append(spool)
    assert SpoolParts(run_dir).read() == spool.read_bytes()


@pytest.mark.parametrize("seed", range(20))
def test_what_a_frozen_attempt_uploads_late_changes_nothing(tmp_path: Path, seed: int) -> None:
    """Each attempt begins with what it finds, and records its own. Uploads of those before it may come at any time."""
    draw, run_dir = random.Random(seed), tmp_path / "run"
    attempts: list[tuple[SpoolParts, Path]] = []
    content = b""
    for number in (3, 7, 8, 20):
        parts, spool = SpoolParts(run_dir), tmp_path / f"{number}.jsonl"
        parts.attempt = number
        spool.write_bytes(parts.read())
        content = spool.read_bytes()
        attempts.append((parts, spool))
        for _ in range(8):
            with spool.open("ab") as file:
                file.write(b'{"attempt": %d, "step": %d}\n' % (number, draw.randrange(10**6)) * draw.choice([1, 2, 9]))
            parts.append(spool)
            content = spool.read_bytes()
            old, its = draw.choice(attempts)
            if draw.random() < 0.3:  # it records as well, as nobody has told it yet
                with its.open("ab") as file:
                    file.write(b'{"late": %d}\n' % draw.randrange(10**9))
                if old is not parts:
                    old.append(its)
            content = spool.read_bytes() if old is not parts else content
            assert SpoolParts(run_dir).read() == content
        if draw.random() < 0.5:
            content = spool.read_bytes()
            parts.close(spool)
            assert SpoolParts(run_dir).read() == content
            if len(attempts) > 1:
                old, its = attempts[-2]
                with its.open("ab") as file:
                    file.write(b'{"late": 1}\n' * 100)
                old.append(its)
            assert SpoolParts(run_dir).read() == content


@pytest.mark.parametrize("seed", range(20))
def test_every_line_that_was_uploaded_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Uploads fail or are cut short, old parts stay, machines change, and runs end and go on, in any order."""
    draw, uploads = random.Random(seed), Uploads(monkeypatch)
    run_dir, spool = tmp_path / "run", tmp_path / SPOOL_NAME
    parts, written, stored = SpoolParts(run_dir), 0, 0
    spool.touch()
    for _ in range(40):
        count = draw.choice([1, 1, 2, 5, 30])
        with spool.open("ab") as file:
            file.write(lines(written, count))
        written += count
        uploads.fail, uploads.cut = draw.random() < 0.2, draw.random() < 0.2
        with monkeypatch.context() as patch:
            if draw.random() < 0.3:
                patch.setattr(spool_parts, "remove", lambda path: None)  # as if killed before
            try:
                parts.close(spool) if draw.random() < 0.1 else parts.append(spool)
                stored = written
            except OSError:
                pass
        found = SpoolParts(run_dir).read()
        assert spool.read_bytes().startswith(found)
        assert len(found) >= len(lines(0, stored))
        if draw.random() < 0.2:  # another machine goes on from what is there
            parts = SpoolParts(run_dir)
            spool.write_bytes(parts.read())
            written = stored = spool.read_bytes().count(b"\n")
