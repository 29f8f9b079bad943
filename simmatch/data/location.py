"""Where the files of a prepared data set lie: a folder of this machine, or one in an object store (`s3://…`).

Only regular files directly in the folder are read, and never more bytes than asked for. A store that does not answer is
asked again, see `simmatch.data.places`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from simmatch.data.formats import DataError
from simmatch.data.places import absolute, ask, store_of
from simmatch.files import open_inside, write_whole
from simmatch.remote import is_remote

T = TypeVar("T")


class Location:
    """A folder, by path or by URI. The constructor looks nothing up.

    Raises
    ------
    DataError
        From any method: the file cannot be read; the message names it.
    FileNotFoundError
        From `read`: there is no such file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "labels.bin").write_bytes(b"01234567")
    ...     Location(folder).read("labels.bin", most_bytes=100), Location(folder).read_range("labels.bin", 2, 4)
    (b'01234567', b'23')
    """

    def __init__(self, name: str | os.PathLike[str]) -> None:
        self._name = absolute(os.fspath(name))
        self.path = None if is_remote(self._name) else Path(self._name)
        """The folder on this machine; None for an object store."""

    def __str__(self) -> str:
        return self._name

    def read(self, file: str, most_bytes: int) -> bytes:
        """The content of a file of at most `most_bytes`."""
        if self.path is not None:
            try:
                with open_inside(self.path, file, most_bytes) as opened:
                    return opened.read(most_bytes + 1)
            except FileNotFoundError:
                raise
            except (OSError, ValueError) as error:
                raise DataError(f"{self}/{file}: {error}") from None
        if not self._ask(file, lambda store, path: bool(store.exists(path))):
            raise FileNotFoundError(f"{self}/{file}")
        size = self._ask(file, lambda store, path: int(store.size(path)))
        if size > most_bytes:
            raise DataError(f"{self}/{file}: expected at most {most_bytes} bytes, got {size}")
        return self._ask(file, lambda store, path: bytes(store.cat_file(path)))

    def read_range(self, file: str, start: int, stop: int) -> bytes:
        """Bytes start … stop − 1 of a file; fewer where it is shorter."""
        if self.path is not None:
            with open_inside(self.path, file) as opened:
                return os.pread(opened.fileno(), stop - start, start)
        return self._ask(file, lambda store, path: bytes(store.cat_file(path, start=start, end=stop)))

    def write(self, file: str, content: bytes | str) -> None:
        """Write a file, whole or not at all. An OSError of this machine's disk is raised as it is."""
        data = content.encode() if isinstance(content, str) else content
        if self.path is not None:
            write_whole(self.path / file, data)
        else:
            self._ask(file, lambda store, path: store.pipe_file(path, data))

    def remove(self, file: str) -> None:
        """Remove a file; does nothing if there is none."""
        if self.path is not None:
            (self.path / file).unlink(missing_ok=True)
        elif self._ask(file, lambda store, path: bool(store.exists(path))):
            self._ask(file, lambda store, path: store.rm_file(path))

    def _ask(self, file: str, call: Callable[[Any, str], T]) -> T:
        store, folder = store_of(self._name)
        return ask(f"{self}/{file}", lambda: call(store, f"{folder}/{file}"), remote=True)
