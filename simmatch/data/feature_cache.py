"""Encoded images on the disk of a node, for all processes that use them: now, after a restart, and in a later run.

    CACHE/features/<key>/000007.bin   the content of a chunk, and the sha256 of that content

A key stands for everything that the content depends on, so a file of that name needs no more than its checksum. A chunk
is renamed into place when it is whole. It is not synced: what a power failure damages is noticed.
"""

from __future__ import annotations

import fcntl
import os
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path

from simmatch.data.cache import OpenFile
from simmatch.data.room import FEATURES, IN_USE, Room
from simmatch.files import PARTIAL, make_folder

CHECKSUM_BYTES = 32

AHEAD = 16
"""Chunks for which room is made at once: to find out what is to be removed takes a look at all files."""


@cache
def program() -> str:
    """Digest of the source of `simmatch`, part of every key: another version may encode otherwise.

    >>> len(program())
    64
    """
    package, digest = Path(__file__).resolve().parents[1], sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


class FeatureCache:
    """The features in the cache of a node. A cache that cannot be used, or is full, costs memory, and a warning, once.

    Parameters
    ----------
    folder: of the cache.
    budget: bytes that the whole cache may take.
    data: digest of the images and labels, and which of the images are encoded.
    warn: told what is damaged, and why features are not written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     features = FeatureCache(Path(folder), 2**20, data="0123456789abcdef", warn=print).open("a-key")
    ...     features.write(7, [memoryview(b"maps")]), features.find(7, 4), features.find(8, 4)
    (True, True, False)
    """

    def __init__(self, folder: Path, budget: int, *, data: str, warn: Callable[[str], None]) -> None:
        self.data, self._room, self._tell, self._warned = data, Room(folder, budget), warn, False

    def open(self, key: str) -> Features | None:
        """The features with a key, kept from now on for as long as the result is referred to; None: without a disk."""
        folder = self._room.folder / FEATURES / key
        try:
            make_folder(folder)
            descriptor = os.open(folder / IN_USE, os.O_RDONLY | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            self.past(f"{folder}: {error.strerror or error}")
            return None
        features = Features(self, folder, descriptor)
        with suppress(OSError):
            os.utime(descriptor)  # the time of the last use
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
        except OSError as error:
            self.past(f"{folder}/{IN_USE}: {error.strerror or error}")
            return None
        return features

    def make_room(self, size: int, write: Callable[[], object]) -> bool:
        """Write `size` bytes if there is room for them, which may have to be made."""
        fits = self._room.make(size, write, ahead=AHEAD * size)
        if not fits:
            self.past(self._room.shortage)
        return fits

    def past(self, why: str) -> None:
        """Say, once, why encoded images stay in memory."""
        if not self._warned:
            self._warned = True
            self.say(f"encoded images are kept in memory, not in the cache: {why}")

    def say(self, what: str) -> None:
        """Tell of this node."""
        self._tell(f"{socket.gethostname()}: {what}")


class Features:
    """The chunks of one key, by their number. Threads may share it.

    >>> Features.__name__
    'Features'
    """

    def __init__(self, cache: FeatureCache, folder: Path, descriptor: int) -> None:
        self._cache, self.folder = cache, folder
        self._held = OpenFile(descriptor, str(folder / IN_USE))  # closes it
        self._full = self._told = False

    def path(self, number: int) -> Path:
        """The file of a chunk."""
        return self.folder / f"{number:06d}.bin"

    def open(self, number: int, size: int) -> OpenFile | None:
        """The file of a chunk whose content has `size` bytes; None if there is none of this size."""
        try:
            descriptor = os.open(self.path(number), os.O_RDONLY | os.O_NOFOLLOW)
        except OSError:
            return None
        opened = OpenFile(descriptor, str(self.path(number)))
        return opened if os.fstat(descriptor).st_size == size + CHECKSUM_BYTES else None

    def find(self, number: int, size: int) -> bool:
        """Whether a chunk is there, and undamaged: all of it is read."""
        content = bytearray(size + CHECKSUM_BYTES)
        opened = self.open(number, size)
        try:
            if opened is not None:
                opened.read_into(memoryview(content), 0)
        except ValueError:  # what a read raises
            opened = None
        if opened is None and not self.path(number).exists():
            return False
        whole = opened is not None and sha256(memoryview(content)[:size]).digest() == content[size:]
        if not whole and not self._told:
            self._told = True
            self._cache.say(f"{self.path(number)} is damaged: it is made again, as are others beside it")
        return whole

    def write(self, number: int, content: Sequence[memoryview]) -> bool:
        """Write a chunk; False if it does not fit, or the disk does not take it."""
        if self._full:
            return False
        checksum, size = sha256(), CHECKSUM_BYTES
        for part in content:
            checksum.update(part)
            size += part.nbytes
        target = self.path(number)
        partial = target.with_name(f"{target.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")

        def write() -> None:
            with partial.open("xb") as file:
                for part in content:
                    file.write(part)
                file.write(checksum.digest())
            partial.replace(target)

        try:
            self._full = not self._cache.make_room(size, write)
        except OSError as error:
            self._full = True
            self._cache.past(f"{target}: {error.strerror or error}")
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)
        return not self._full
