"""The space of a node's cache folder, shared by all that is kept in it and by all processes that use it.

    CACHE/room.lock                              held while room is made
    CACHE/shards/<digest>/train-00007.bin        a copy of a shard; open with a shared lock (`flock`) while it is used
    CACHE/shards/<digest>/train-00007.bin.lock   held by the process that copies it
    CACHE/features/<key>/000007.bin              a chunk of encoded images
    CACHE/features/<key>/in-use                  open with a shared lock by every process that uses some of its chunks

What is used is never removed. Of the rest, what was used longest ago is removed first.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
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
        self.folder, self.budget = folder, budget

    def make(self, size: int, write: Callable[[], object] = int) -> bool:
        """Remove what was used longest ago and is not in use, until `size` more bytes fit; returns whether they do.

        write: writes these bytes, before another process may take the room.

        Raises
        ------
        OSError
            The folder cannot be used.
        """
        make_folder(self.folder)
        with locked(self.folder / "room.lock", LOCK_S):
            files, used = self._files()
            for _, size_bytes, path in sorted(files):
                if used + size <= self.budget:
                    break
                if _remove(path):
                    used -= size_bytes
            fits = used + size <= self.budget
            if fits:
                write()
            return fits

    def _files(self) -> tuple[list[tuple[float, int, Path]], int]:
        """The time of its last use, size and path of every file, and the sum of the sizes."""
        files = []
        for kind in (SHARDS, FEATURES):
            for path in (self.folder / kind).glob("*/*.bin*"):
                if path.suffix != ".lock":
                    try:
                        status = path.stat()
                        when = (path.with_name(IN_USE).stat() if kind == FEATURES else status).st_mtime
                    except FileNotFoundError:
                        continue
                    files.append((when, status.st_size, path))
        return files, sum(size for _, size, _ in files)


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
