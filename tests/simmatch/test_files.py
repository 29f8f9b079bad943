"""Files that are whole or absent: what a power failure would have left is followed through the calls of the system."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest

from simmatch.files import PARTIAL, make_folder, sync_folder, write_whole

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, str]]:
    """What is synced and what gets its name, in order, by path below the test's folder."""
    observed: list[tuple[str, str]] = []
    fsync, replace = os.fsync, os.replace

    def synced(opened: int) -> None:
        observed.append(("sync", os.path.relpath(os.readlink(f"/proc/self/fd/{opened}"), tmp_path)))
        fsync(opened)

    def replaced(self: Path, target: Path) -> Path:
        observed.append(("name", os.path.relpath(target, tmp_path)))
        replace(self, target)
        return Path(target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    return observed


@pytest.mark.parametrize("content", [b"new", "new", lambda path: path.write_bytes(b"new")])
def test_content_is_on_the_disk_before_its_name_and_both_before_the_end(
    content: Any, tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    (tmp_path / "file").write_bytes(b"old")
    write_whole(tmp_path / "file", content)
    assert calls == [("sync", f"file{PARTIAL}"), ("name", "file"), ("sync", ".")]
    assert (tmp_path / "file").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that makes no folders")
def test_a_folder_that_no_parent_helps_is_an_error() -> None:
    """/proc exists and makes no folders: its answer is that of a missing parent."""
    with pytest.raises(FileNotFoundError, match="/proc/simmatch"):
        make_folder(Path("/proc/simmatch/runs"))


def test_new_folders_are_on_the_disk_as_well(tmp_path: Path, calls: list[tuple[str, str]]) -> None:
    write_whole(tmp_path / "a" / "b" / "file", b"")
    assert calls == [
        ("sync", "."),
        ("sync", "a"),
        ("sync", f"a/b/file{PARTIAL}"),
        ("name", "a/b/file"),
        ("sync", "a/b"),
    ]
    make_folder(tmp_path / "a" / "b")
    assert len(calls) == 5  # it is there already


def test_a_place_that_is_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):
        make_folder(tmp_path / "file")
    with pytest.raises(NotADirectoryError, match="below"):
        make_folder(tmp_path / "file" / "below")


@pytest.mark.parametrize("fails", ["content", "sync"])
def test_what_cannot_be_written_leaves_what_was_there(
    fails: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if fails == "sync":
        monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "file", full if fails == "content" else b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


@pytest.mark.parametrize(("number", "raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_that_syncs_no_folders(
    number: int, raised: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    if raised:
        with pytest.raises(OSError, match="error"):
            sync_folder(tmp_path)
    else:
        sync_folder(tmp_path)


def test_there_is_one_way_to_write_a_file() -> None:
    """All others are named here: what is no file of ours, and what grows line by line."""
    ways = re.compile(
        r"\.write_text\(|\.write_bytes\(|json\.dump\(|yaml\.dump\([^)]*file|os\.(replace|rename)\(|\.savefig\("
        r"|\.open\(\"[wax]|\bopen\([^)]*\"[wax]|torch\.save\(|np\.save\w*\(|\.to_(csv|json)\([^)]*path"
        r"|^save_file\(|shutil\.(copy|copy2|copyfile|move)\("
    )
    allowed = {
        ("simmatch/files.py", 'partial.open("xb")'),
        ("simmatch/files.py", 'path.open("xb")'),  # created once, on a system without links
        ("cluster/storage.py", "shutil.copyfile(source, target)"),  # to the temporary file of `write_whole`
        # a cache: not synced, as a checksum tells what is whole
        ("simmatch/data/feature_cache.py", 'partial.open("xb")'),
        # line by line
        ("jobs/reporting.py", 'self.path.open("a", encoding="utf-8")'),
        ("jobs/entry_point.py", 'open(os.devnull, "w")'),
        ("jobs/streaming/set_aside.py", 'self._path.open("ab")'),
        ("jobs/streaming/example.py", 'Path(options.file).open("a"'),
        ("jobs/benchmarks/stream/served.py", 'self._log.open("ab")'),
        ("jobs/benchmarks/stream/served.py", 'self._file.open("ab")'),
        # a file of the sender's, which has been read
        ("jobs/streaming/sources/folder.py", "shutil.move("),
        # generated images, deleted at the end
        ("jobs/benchmarks/ingest.py", ".write_bytes(content)"),
        ("jobs/benchmarks/ingest.py", "tarfile.open(tar"),
        ("jobs/benchmarks/efficiency.py", 'Path("/proc/self/clear_refs").write_text("5")'),
    }
    writes = [
        (path.relative_to(ROOT).as_posix(), line.strip())
        for folder in ("simmatch", "cluster", "jobs")
        for path in sorted((ROOT / folder).rglob("*.py"))
        for line in path.read_text().splitlines()
        if ways.search(line) and not line.lstrip().startswith((">>>", "..."))  # examples
    ]
    assert writes
    others = [(path, line) for path, line in writes if not any(path == p and part in line for p, part in allowed)]
    assert others == []
