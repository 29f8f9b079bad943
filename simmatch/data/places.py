"""Folders and files, of this machine or behind a URI: listed, and read in pieces.

A remote place that does not answer is asked again for `PATIENCE_S`, as for checkpoints. Any fault that remains is a
`DataError` with a one-line message.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, TypeVar

from simmatch.data.formats import DataError
from simmatch.documents import shortened
from simmatch.remote import StorageError, file_system, is_remote, retry

PATIENCE_S = 60.0
"""For about this long a remote place that fails is asked again."""

READ_AHEAD_BYTES = 8 << 20
"""Of a remote file, read at a time."""

T = TypeVar("T")

_PATTERN = re.compile(r"[*?\[{]")
_BRACES = re.compile(r"\{([^{}]*)\}")


def ask(what: str, call: Callable[[], T], *, remote: bool) -> T:
    """The result of a call to a file system; what it raises becomes a `DataError` that begins with `what`.

    >>> ask("/nowhere", lambda: os.listdir("/nowhere"), remote=False)
    Traceback (most recent call last):
    simmatch.data.formats.DataError: /nowhere: cannot be read: No such file or directory
    """

    def attempt() -> T:
        try:
            return call()
        except (DataError, MemoryError, FileNotFoundError, PermissionError):  # the answer would be the same
            raise
        except Exception as error:
            if not remote:
                raise
            raise StorageError(_unread(what, str(error) or type(error).__name__)) from error

    try:
        return retry(attempt, PATIENCE_S) if remote else attempt()
    except StorageError as error:
        raise DataError(str(error)) from None
    except OSError as error:
        reason = "No such file or directory" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise DataError(_unread(what, reason)) from None


def _unread(what: str, reason: str) -> str:
    return f"{shortened(what)}: cannot be read: {shortened(reason)}"


def store_of(uri: str) -> tuple[Any, str]:
    """fsspec's file system of a URI, and the path in it.

    Raises
    ------
    DataError
        As `simmatch.remote.file_system` for a URI that cannot be used.

    >>> store_of("gopher://photos")
    Traceback (most recent call last):
    simmatch.data.formats.DataError: expected a folder or a URI such as s3://bucket/prefix, got 'gopher://photos'
    """
    try:
        system, path, _ = file_system(uri)
    except ValueError as error:
        raise DataError(f"expected {error}") from None
    return system, path


def absolute(place: str) -> str:
    """A place as every process of this machine can use it, whatever its working directory.

    >>> absolute("s3://bucket/photos/")
    's3://bucket/photos'
    """
    place = place.rstrip("/") or place
    return place if is_remote(place) else os.path.abspath(os.path.expanduser(place.partition("://")[2] or place))


def contents(folder: str) -> tuple[list[str], list[str]]:
    """Names of the folders and of the files in a folder, each sorted; hidden ones are left out.

    >>> contents(os.path.dirname(__file__))[1][:2]
    ['__init__.py', 'builtin.py']
    """
    if is_remote(folder):
        system, path = store_of(folder)
        entries = ask(folder, lambda: system.ls(path, detail=True), remote=True)
        found = [(entry["name"].rstrip("/").rpartition("/")[2], entry["type"] == "directory") for entry in entries]
        found = [(name, inner) for name, inner in found if name and name != path.rpartition("/")[2]]
    else:
        with ask(folder, lambda: os.scandir(folder), remote=False) as scan:
            found = [(entry.name, entry.is_dir()) for entry in scan]
    visible = sorted(entry for entry in found if not entry[0].startswith("."))
    return [name for name, inner in visible if inner], [name for name, inner in visible if not inner]


def walk(folder: str) -> Iterator[str]:
    """Paths of all files below a folder, relative to it, in no order; hidden files and folders are left out.

    No file is looked at: a folder costs one call, a page of an object store's listing one request.

    Raises
    ------
    DataError
        A folder cannot be read, or contains a link to itself or to a folder around it.

    >>> "places.py" in walk(os.path.dirname(__file__))
    True
    """
    if not is_remote(folder):
        yield from _walk(folder, "", ())
        return
    system, root = store_of(folder)
    folders, files = contents(folder)
    yield from files
    for name in folders:  # one at a time: fsspec holds what it has found in a form that takes much memory
        below = f"{root.rstrip('/')}/{name}"
        for path in ask(f"{folder}/{name}", lambda below=below: system.find(below), remote=True):  # type: ignore[misc]
            relative = f"{name}{path.removeprefix(below)}"
            if not path.endswith("/") and "/." not in relative:
                yield relative


def _walk(root: str, below: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    folder = os.path.join(root, below)
    status = ask(folder, lambda: os.stat(folder), remote=False)
    if (identity := (status.st_dev, status.st_ino)) in above:
        raise DataError(f"{shortened(folder.rstrip('/'))}: expected a folder, got a link to a folder around it")
    folders = []
    with ask(folder, lambda: os.scandir(folder), remote=False) as scan:
        for entry in scan:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(entry.name)
            else:
                yield f"{below}{entry.name}"
    for name in folders:
        yield from _walk(root, f"{below}{name}/", (*above, identity))


def is_folder(place: str) -> bool:
    """Whether there is such a folder.

    >>> is_folder("/"), is_folder("/nowhere")
    (True, False)
    """
    if not is_remote(place):
        return os.path.isdir(place)
    system, path = store_of(place)
    return bool(ask(place, lambda: system.isdir(path), remote=True))


def is_pattern(place: str) -> bool:
    """Whether a place stands for several files: it holds `*`, `?`, `[…]` or `{…}`, and no folder has that name.

    >>> is_pattern("shards/train-{000..009}.tar")
    True
    """
    return bool(_PATTERN.search(place)) and not (not is_remote(place) and os.path.exists(place))


def matching(place: str, suffix: str) -> list[str]:
    """The files that a place stands for, sorted: itself, those of its pattern, or those of a folder with a suffix.

    A pattern may hold `*`, `?`, `[…]`, `{a,b}` and `{000..009}`.

    Raises
    ------
    DataError
        There are none, one of those that braces name is missing, or two have the same name.

    >>> matching("/nowhere/shard-{0..1}.tar", ".tar")
    Traceback (most recent call last):
    simmatch.data.formats.DataError: /nowhere/shard-0.tar: expected a file, found none
    """
    files = _matching(place, suffix)
    names: set[str] = set()
    for file in files:
        if (name := os.path.basename(file)) in names:
            raise DataError(f"{shortened(file)}: expected files of different names, got another one of this name")
        names.add(name)
    return files


def _matching(place: str, suffix: str) -> list[str]:
    if is_pattern(place):
        files = []
        for part in _expanded(place):
            found = sorted(_globbed(part)) if _PATTERN.search(part) else [part] * _is_file(part)
            if not found:
                raise DataError(f"{shortened(part)}: expected a file, found none")
            files += found
        return files
    if is_folder(place):
        files = [f"{place}/{name}" for name in contents(place)[1] if name.lower().endswith(suffix)]
        if not files:
            raise DataError(f"{shortened(place)}: expected files *{suffix}, found none")
        return files
    if not _is_file(place):
        raise DataError(f"{shortened(place)}: no such file or folder")
    return [place]


def _is_file(place: str) -> bool:
    if not is_remote(place):
        return os.path.isfile(place)
    system, path = store_of(place)
    return bool(ask(place, lambda: system.isfile(path), remote=True))


def _globbed(pattern: str) -> list[str]:
    if not is_remote(pattern):
        return glob.glob(pattern)
    system, path = store_of(pattern)
    return [system.unstrip_protocol(name) for name in ask(pattern, lambda: system.glob(path), remote=True)]


def _expanded(pattern: str) -> list[str]:
    """A pattern without braces for each of their alternatives."""
    if (braces := _BRACES.search(pattern)) is None:
        return [pattern]
    text = braces[1]
    if ends := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        width = len(ends[1])
        choices = [f"{number:0{width}d}" for number in range(int(ends[1]), int(ends[2]) + 1)]
    else:
        choices = text.split(",")
    head, tail = pattern[: braces.start()], pattern[braces.end() :]
    return [expanded for choice in choices for expanded in _expanded(f"{head}{choice}{tail}")]


class Files:
    """Reads files, of this machine or remote; the last one stays open.

    >>> with Files() as files:
    ...     files.read(__file__, 3, 6)
    b'Folder'
    """

    def __init__(self) -> None:
        self._path = ""
        self._file: BinaryIO | None = None

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the open file."""
        file, self._file, self._path = self._file, None, ""
        if file is not None:
            file.close()

    def open(self, path: str) -> BinaryIO:
        """A file, open for reading, which the next call may close.

        Raises
        ------
        OSError
            As the file system raises it; see `using`.
        """
        if self._file is None or self._path != path:
            self.close()
            if is_remote(path):
                system, inner = store_of(path)
                self._file = system.open(inner, "rb", block_size=READ_AHEAD_BYTES, cache_type="readahead")
            else:
                self._file = open(path, "rb")  # noqa: SIM115
            self._path = path
        assert self._file is not None
        return self._file

    def using(self, path: str, call: Callable[[BinaryIO], T]) -> T:
        """The result of a call with an open file; it is opened again and the call repeated where a store fails.

        Raises
        ------
        DataError
            The file cannot be read.
        """

        def attempt() -> T:
            try:
                return call(self.open(path))
            except Exception:
                self.close()
                raise

        return ask(path, attempt, remote=is_remote(path))

    def read(self, path: str, offset: int = 0, size: int = -1) -> bytes:
        """`size` bytes of a file from `offset` on, or all to its end.

        Raises
        ------
        DataError
            The file cannot be read, or ends before.
        """

        def part(file: BinaryIO) -> bytes:
            file.seek(offset)
            return file.read(size)

        data = self.using(path, part)
        if 0 <= size != len(data):
            raise DataError(f"{shortened(path)}: expected {size} bytes from {offset} on, got {len(data)}")
        return data


def message(error: Exception) -> str:
    """An exception of a library as a part of a one-line message.

    >>> message(ValueError("not a\\nfile"))
    'not a file'
    """
    return shortened(str(error)) or type(error).__name__
