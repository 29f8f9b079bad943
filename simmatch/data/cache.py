"""Open files of a prepared data set: in a local folder, or in a cache that all processes of a node share.

A shard is compared with its sha256 when it is copied; `simmatch.data.room` says where to, and what makes room for it.
What does not fit into the cache, by its budget or because the disk is full, is read from the object store, byte range
by byte range. Shards are read, not mapped: the memory of a process does not grow with the number of images, and an
error of a disk is an exception, not a signal that ends the process.
"""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import threading
from collections import OrderedDict
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Protocol

from simmatch.data.formats import DataError
from simmatch.data.location import Location
from simmatch.data.room import LOCK_S, SHARDS, Room
from simmatch.data.shards import Shard
from simmatch.files import locked, make_folder, open_inside, write_whole

MOST_OPEN = 256
"""Shards that a process keeps open."""

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.ENAMETOOLONG)


class Readable(Protocol):
    """A shard that can be read from.

    >>> Readable.__name__
    'Readable'
    """

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the bytes from `offset` on."""


class OpenFile:
    """A shard that is open on this machine; closed when nothing refers to it any more. Threads may share it.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile() as file:
    ...     _ = file.write(b"shard"), file.flush()
    ...     part = bytearray(2)
    ...     OpenFile(os.open(file.name, os.O_RDONLY), file.name).read_into(memoryview(part), 3)
    ...     bytes(part)
    b'rd'
    """

    def __init__(self, descriptor: int, name: str) -> None:
        self._descriptor, self._name = descriptor, name

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the bytes from `offset` on."""
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self._descriptor, [target[done:]], offset + done)
            except OSError as error:
                raise DataError(f"{self._name}: {error.strerror or error}") from None
            if count == 0:
                raise DataError(f"{self._name}: expected {offset + len(target)} bytes or more, got {offset + done}")
            done += count

    def __del__(self) -> None:
        os.close(self._descriptor)


class RemoteFile:
    """A shard in an object store, read by ranges.

    >>> part = bytearray(2)
    >>> RemoteFile(Location("/nowhere"), "train-00000.bin").read_into(memoryview(part), 0)
    Traceback (most recent call last):
    FileNotFoundError: ...
    """

    def __init__(self, location: Location, file: str) -> None:
        self._location, self._file = location, file

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the bytes from `offset` on."""
        content = self._location.read_range(self._file, offset, offset + len(target))
        if len(content) != len(target):
            raise DataError(f"{self._location}/{self._file}: expected {len(target)} bytes, got {len(content)}")
        target[:] = content


class MemoryFile:
    """Bytes in memory, read as a file is.

    >>> part = bytearray(2)
    >>> MemoryFile(memoryview(b"shard")).read_into(memoryview(part), 3)
    >>> bytes(part)
    b'rd'
    """

    def __init__(self, content: memoryview) -> None:
        self._content = content

    def read_into(self, target: memoryview, offset: int) -> None:
        """Fill `target` with the bytes from `offset` on."""
        target[:] = self._content[offset : offset + len(target)]


class OpenShards:
    """The shards of a prepared data set, opened when they are needed. Threads may share it.

    Parameters
    ----------
    location: the folder of the prepared data set.
    image_bytes: of one image.
    keep: most shards that stay open.
    cache: copies the shards of an object store to this machine; None for a local folder.

    >>> shards = OpenShards(Location("/nowhere"), image_bytes=64)
    >>> shards.open(Shard(file="train-00000.bin", count=3, sha256=64 * "0"))
    Traceback (most recent call last):
    simmatch.data.formats.DataError: /nowhere/train-00000.bin: expected a shard of 192 bytes, found no such file
    """

    def __init__(
        self, location: Location, *, image_bytes: int, keep: int = MOST_OPEN, cache: ShardCache | None = None
    ) -> None:
        self.location, self.image_bytes, self._keep, self._cache = location, image_bytes, keep, cache
        self._open: OrderedDict[str, Readable] = OrderedDict()
        self._lock = threading.Lock()

    def open(self, shard: Shard) -> Readable:
        """The shard, open.

        Raises
        ------
        DataError
            It is missing, has another size, or, where it is copied into the cache, another sha256.
        """
        with self._lock:
            opened = self._open.pop(shard.file, None)
            while len(self._open) >= self._keep:
                self._open.popitem(last=False)
            if opened is None:
                size = shard.count * self.image_bytes
                if self._cache is not None:
                    opened = self._cache.open(self.location, shard, size)
                elif self.location.path is not None:
                    opened = _open_local(self.location.path, shard.file, size)
                else:
                    opened = RemoteFile(self.location, shard.file)
            if isinstance(opened, OpenFile):  # the cache may have room later
                self._open[shard.file] = opened
            return opened


def _open_local(folder: Path, file: str, size: int) -> OpenFile:
    name = f"{folder}/{file}"
    try:
        with open_inside(folder, file) as opened:
            if (found := os.fstat(opened.fileno()).st_size) != size:
                raise DataError(f"{name}: expected a shard of {size} bytes, got {found}")
            return OpenFile(os.dup(opened.fileno()), name)
    except FileNotFoundError:
        raise DataError(f"{name}: expected a shard of {size} bytes, found no such file") from None
    except DataError:
        raise
    except (OSError, ValueError) as error:
        raise DataError(f"{name}: {error}") from None


class ShardCache:
    """A folder of this machine with copies of shards, for all processes that use it.

    Parameters
    ----------
    folder: of the cache.
    budget: bytes that the whole cache may take.
    digest: of the data set.
    warn: told, once, that shards are read past the cache, and why.

    >>> ShardCache(Path("/nowhere"), 2**30, digest="0123456789abcdef", warn=print).folder
    PosixPath('/nowhere/shards/0123456789abcdef')
    """

    def __init__(self, folder: Path, budget: int, *, digest: str, warn: Callable[[str], None]) -> None:
        self.folder, self._room = folder / SHARDS / digest, Room(folder, budget)
        self._warn, self._warned = warn, False

    def open(self, location: Location, shard: Shard, size: int) -> Readable:
        """The copy of a shard of `size` bytes, made if there is none; the shard of the store if none can be made."""
        path = self.folder / shard.file
        try:
            opened = self._held(path, size)
            if opened is None:
                make_folder(self.folder)
                with locked(path.with_name(f"{shard.file}.lock"), LOCK_S):
                    opened = self._held(path, size) or self._copy(location, shard, size)
        except TimeoutError:
            return self._past(location, shard, f"another process has held {path}.lock for {LOCK_S:g} s")
        except OSError as error:
            if error.errno not in _NO_ROOM:
                raise DataError(f"data.cache_dir: {path}: {error.strerror or error}") from None
            return self._past(location, shard, f"{path}: {error.strerror}")
        return opened or self._past(location, shard, self._room.shortage)

    def _past(self, location: Location, shard: Shard, why: str) -> RemoteFile:
        if not self._warned:
            self._warned = True
            self._warn(f"{location} on {socket.gethostname()}: shards are read past the cache: {why}")
        return RemoteFile(location, shard.file)

    def _held(self, path: Path, size: int) -> OpenFile | None:
        """A whole copy, locked so that it stays; None where there is none."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        opened = OpenFile(descriptor, str(path))  # closes it
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # it is being removed
            return None
        status = os.fstat(descriptor)
        if status.st_nlink == 0 or status.st_size != size:
            return None
        with suppress(PermissionError):  # a copy of another user
            os.utime(descriptor)  # the time of its last use
        return opened

    def _copy(self, location: Location, shard: Shard, size: int) -> OpenFile | None:
        """Copy a shard into the cache; None if there is no room within the budget."""
        path = self.folder / shard.file
        if not self._room.make(size):
            return None
        content = _fetched(location, shard, size)
        opened: list[OpenFile | None] = []  # held before others may make room

        def write() -> None:
            write_whole(path, content)
            opened.append(self._held(path, size))

        return opened[0] if self._room.make(size, write) else None


def _fetched(location: Location, shard: Shard, size: int) -> bytes:
    """The content of a shard; asked for once more where its sha256 is another, as after a fault of the network."""
    for _ in range(2):
        try:
            content = location.read(shard.file, size)
        except FileNotFoundError:
            raise DataError(f"{location}/{shard.file}: expected a shard of {size} bytes, found no such file") from None
        if sha256(content).hexdigest() == shard.sha256:
            return content
    raise DataError(f"{location}/{shard.file}: expected sha256 {shard.sha256}, got another, twice")
