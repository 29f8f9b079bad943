"""Samples of a recording, read when they are needed: from a file, or from memory.

A recording is [T, C]: T samples of C channels. Arrays of `.npy` files, and of `.npz` files that are not compressed, are
read in place, a range of samples at a time; all others are held in memory.
"""

from __future__ import annotations

import os
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import IO, Any

import numpy as np

from simmatch.data.cache import MemoryFile, OpenFile, Readable
from simmatch.data.formats import DataError
from simmatch.data.places import ask, message
from simmatch.documents import shortened

MOST_OPEN = 256
"""Files that are kept open."""

Array = np.ndarray[Any, np.dtype[Any]]


class OpenRecordings:
    """Files of this machine, opened when they are needed; of many the least recently used are closed. Threads share it.

    >>> files = OpenRecordings()
    >>> part = bytearray(7)
    >>> files.open(__file__).read_into(memoryview(part), 3)
    >>> bytes(part)
    b'Samples'
    """

    def __init__(self, most: int = MOST_OPEN) -> None:
        self._most, self._files, self._lock = most, OrderedDict[str, OpenFile](), threading.Lock()

    def open(self, path: str) -> OpenFile:
        """A file, open for reading.

        Raises
        ------
        DataError
            It cannot be opened.
        """
        with self._lock:
            if (file := self._files.get(path)) is None:
                descriptor = ask(path, lambda: os.open(path, os.O_RDONLY | os.O_CLOEXEC), remote=False)
                file = self._files[path] = OpenFile(descriptor, shortened(path))
                while len(self._files) > self._most:
                    self._files.popitem(last=False)
            self._files.move_to_end(path)
            return file


@dataclass(frozen=True)
class Series:
    """The samples [T, C] of one recording, as stored.

    Attributes
    ----------
    shape: (T, C).
    dtype: of a value, as stored.
    path, offset: the file that holds them row by row, and where they begin in it.
    files: opens it; None: `values` holds them.

    >>> Series.of(np.arange(6.0).reshape(3, 2)).read(1, 3)
    array([[2., 3.],
           [4., 5.]])
    """

    shape: tuple[int, int]
    dtype: np.dtype[Any]
    path: str = ""
    offset: int = 0
    files: OpenRecordings | None = None
    values: memoryview | None = None

    @classmethod
    def of(cls, values: Array) -> Series:
        """Samples [T] or [T, C] in memory."""
        table = np.ascontiguousarray(values.reshape(len(values), -1))
        return cls((table.shape[0], table.shape[1]), table.dtype, values=table.data.cast("B"))

    @property
    def nbytes(self) -> int:
        """Bytes held in memory."""
        return 0 if self.values is None else self.values.nbytes

    def read(self, start: int, stop: int) -> Array:
        """Samples start … stop − 1: [n, C].

        Raises
        ------
        DataError
            The file cannot be read, or is shorter than it was.
        """
        rows = np.empty((stop - start, self.shape[1]), self.dtype)
        if rows.size:
            source: Readable
            if self.values is not None:
                source = MemoryFile(self.values)
            else:
                assert self.files is not None
                source = self.files.open(self.path)
            source.read_into(rows.data.cast("B"), self.offset + start * rows.strides[0])
        return rows


def series_of_npy(path: str, name: str, files: OpenRecordings, offset: int = 0) -> Series:
    """The array of a `.npy` file of this machine, or of a member that is stored in a file from `offset` on.

    Raises
    ------
    DataError
        It is not an array of real numbers, [T] or [T, C].

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".npy") as file:
    ...     np.save(file, np.arange(6, dtype=np.int16)), file.flush()
    ...     series_of_npy(file.name, "a.npy", OpenRecordings()).read(4, 6).tolist()
    (None, None)
    [[4], [5]]
    """

    def header() -> tuple[tuple[int, ...], bool, np.dtype[Any], int]:
        with open(path, "rb") as file:
            file.seek(offset)
            return *_header(file), file.tell()

    shape, fortran, dtype, start = ask(path, lambda: _parsed(name, header), remote=False)
    table = _table(name, shape, dtype)
    if fortran and min(table) > 1:
        with open(path, "rb") as file:
            file.seek(offset)
            return Series.of(np.lib.format.read_array(file, allow_pickle=False))
    return Series(table, dtype, path, start, files)


def series_of_npz(path: str, name: str, files: OpenRecordings) -> Iterator[tuple[str, Series]]:
    """(name of the array, its series) of a `.npz` file of this machine, in the order of the names.

    Raises
    ------
    DataError
        It is no such file, or an array is not one of real numbers, [T] or [T, C].

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".npz") as file:
    ...     np.savez(file, b=np.zeros((4, 2)), a=np.ones(3)), file.flush()
    ...     [(name, series.shape) for name, series in series_of_npz(file.name, "r.npz", OpenRecordings())]
    (None, None)
    [('a', (3, 1)), ('b', (4, 2))]
    """

    def members() -> list[zipfile.ZipInfo]:
        with zipfile.ZipFile(path) as archive:
            return sorted(archive.infolist(), key=lambda member: member.filename)

    for member in ask(path, lambda: _parsed(name, members), remote=False):
        key = member.filename.removesuffix(".npy")
        if member.compress_type == zipfile.ZIP_STORED:
            offset = ask(path, partial(_parsed, f"{name}/{key}", partial(_stored_at, path, member)), remote=False)
            yield key, series_of_npy(path, f"{name}/{key}", files, offset)
            continue
        values = ask(path, partial(_parsed, f"{name}/{key}", partial(_member, path, member)), remote=False)
        _table(f"{name}/{key}", values.shape, values.dtype)
        yield key, Series.of(values)


def _member(path: str, member: zipfile.ZipInfo) -> Array:
    """The array of a compressed member."""
    with zipfile.ZipFile(path) as archive, archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _stored_at(path: str, member: zipfile.ZipInfo) -> int:
    """Where the content of an uncompressed member begins: behind its local header of 30 bytes, a name and an extra."""
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
    return member.header_offset + 30 + int(lengths.sum())


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(file)
    return shape, fortran, dtype


def _parsed(name: str, call: Any) -> Any:
    """The result of a call that parses a file; any fault of its content is a `DataError`."""
    try:
        return call()
    except OSError:
        raise
    except Exception as error:  # numpy takes a header for Python's syntax, zipfile knows many faults
        raise DataError(f"{shortened(name)}: expected an array of numpy: {message(error)}") from None


def _table(name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[int, int]:
    """(T, C) of an array [T] or [T, C] of real numbers."""
    if dtype.kind not in "fiu" or len(shape) not in (1, 2) or 0 in shape:
        raise DataError(f"{shortened(name)}: expected real numbers [T] or [T, C], got {dtype} {list(shape)}")
    return shape[0], shape[1] if len(shape) == 2 else 1
