"""The space of a node's cache folder, shared by all that is kept in it and by all processes that use it.

    CACHE/room.lock                              held while room is made; in it, the bytes that the files take
    CACHE/shards/<digest>/train-00007.bin        a copy of a shard; open with a shared lock (`flock`) while it is used
    CACHE/shards/<digest>/train-00007.bin.lock   held by the process that copies it
    CACHE/features/<key>/000007.bin              a chunk of encoded images
    CACHE/features/<key>/in-use                  open with a shared lock by every process that uses some of its chunks

What is used is never removed. Of the rest, what was used longest ago is removed first. A process looks at all files
once, and where something has to be removed; else it takes their sum from the lock file, so that a file costs the same
however many there are.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from simmatch.files import PARTIAL, locked, make_folder

LOCK_S = 600.0
"""Longest wait for another process that makes room, or copies the same file."""

SHARDS, FEATURES = "shards", "features"

IN_USE = "in-use"
"""File in a folder of features, locked and touched by those who use them."""


class Room:
    """Room in a cache folder.

    Parameters
    ----------
    folder: of the cache.
    budget: bytes that all files of the cache may take.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     room = Room(Path(folder), budget=100)
    ...     room.make(60), room.make(101)
    (True, False)
    """

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget, self._looked = folder, budget, False

    @property
    def shortage(self) -> str:
        """Why `make` has made no room."""
        return f"data.cache_bytes={self.budget} is taken by what is in use"

    def make(self, size: int, write: Callable[[], object] | None = None, *, ahead: int = 0) -> bool:
        """Remove what was used longest ago and is not in use, until `size` more bytes fit; returns whether they do.

        write: writes these bytes, before another process may take the room.
        ahead: bytes to free besides, a twentieth of the budget at most, where something has to be removed.

        Raises
        ------
        OSError
            The folder cannot be used.
        """
        make_folder(self.folder)
        with locked(self.folder / "room.lock", LOCK_S) as lock:
            used = _noted(lock) if self._looked else None
            if used is None or used + size > self.budget:
                used = self._removed(size, min(ahead, self.budget // 20))
                self._looked = True
            fits = used + size <= self.budget
            try:
                if fits and write is not None:
                    write()
                    used += size
            finally:
                _note(lock, used)
            return fits

    def _removed(self, size: int, ahead: int) -> int:
        """The bytes that all files take, after removing what has to go."""
        files = list(self._files())
        used = sum(size_bytes for _, size_bytes, _ in files)
        if used + size > self.budget:
            for _, size_bytes, path in sorted(files):
                if used + size + ahead <= self.budget:
                    break
                if _remove(path):
                    used -= size_bytes
        return used

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """The time of its last use, size and path of every file."""
        for kind in (SHARDS, FEATURES):
            for folder in (self.folder / kind).glob("*"):
                with suppress(FileNotFoundError, NotADirectoryError):
                    in_use = (folder / IN_USE).stat().st_mtime if kind == FEATURES else None
                    with os.scandir(folder) as entries:
                        for entry in entries:
                            if ".bin" in entry.name and not entry.name.endswith(".lock"):
                                with suppress(FileNotFoundError):
                                    status = entry.stat(follow_symlinks=False)
                                    yield in_use or status.st_mtime, status.st_size, folder / entry.name


def _noted(lock: int) -> int | None:
    """The bytes that all files took when `_note` was called last; None where that is unknown."""
    try:
        return int(os.pread(lock, 20, 0))
    except ValueError:
        return None


def _note(lock: int, used: int) -> None:
    with suppress(OSError):  # a full disk: the next process looks again
        os.ftruncate(lock, 0)
        os.pwrite(lock, b"%d" % used, 0)


def _remove(path: Path) -> bool:
    """Remove a file, unless a process uses it or is making it."""
    if path.parent.parent.name == FEATURES:
        held = path.with_name(IN_USE)
    else:
        whole = path.with_name(path.name.removesuffix(PARTIAL))
        held = path if path == whole else whole.with_name(f"{whole.name}.lock")
    try:
        descriptor = os.open(held, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink(missing_ok=True)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
