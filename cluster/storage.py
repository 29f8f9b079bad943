"""Files by URI: folders of this machine and object stores (`s3://bucket/prefix`, `gs://…`) behind the same few calls.

universal_pathlib and fsspec know the protocols, see `simmatch.remote`. This module adds what a run needs: files that
are whole or absent, one class of errors, and a time-out for every wait.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from cluster.timeouts import run_with_timeout
from simmatch import files
from simmatch.config import ConfigError, Frozen, parse
from simmatch.documents import DocumentError, load_json
from simmatch.files import Content
from simmatch.remote import StorageError, file_system

if TYPE_CHECKING:
    from upath import UPath

AnyPath: TypeAlias = "Path | UPath"
"""A folder or file, of this machine or remote."""

LIMIT_S = 600.0
"""Longest wait for the transfer of a whole file."""

T = TypeVar("T")
Document = TypeVar("Document", bound=Frozen)


def locate(place: str | os.PathLike[str]) -> AnyPath:
    """The path of a URI or a local name; local ones become absolute. Nothing is looked up.

    >>> locate("s3://bucket/runs/digits").name
    'digits'

    Raises
    ------
    ValueError
        An unknown protocol, one whose package is not installed, or a URI that holds credentials.
    """
    text = os.fspath(place)
    protocol, separator, rest = text.partition("://")
    if not separator:
        return Path(text).absolute()
    if protocol in ("file", "local"):
        return Path(rest).absolute()
    _, _, options = file_system(text)
    from upath import UPath  # only URIs need it: a machine for benchmarks or for tests of a GPU need not have it

    path: AnyPath = UPath(text, **options)
    return path


def is_local(path: AnyPath) -> bool:
    """Whether a path lies in a file system of this machine."""
    return isinstance(path, Path)


def write_whole(path: AnyPath, content: Content) -> None:
    """`simmatch.files.write_whole` at any place.

    Raises
    ------
    OSError
        The disk, or the object store, did not take it.
    """
    if isinstance(path, Path):
        files.write_whole(path, content)
        return
    with tempfile.TemporaryDirectory(prefix="simmatch-") as folder:
        local = Path(folder) / path.name
        files.write_whole(local, content)
        _remote(path, lambda: path.fs.put_file(str(local), path.path))


def create_whole(path: AnyPath, content: bytes) -> None:
    """`simmatch.files.create_whole` at any place: of several that create a file, on any machines, one succeeds.

    An object store is asked by the header `If-None-Match: *` (or what its protocol has for it); whether it heeds that,
    `check_exclusive` finds out. Where it does not, only a file that is there already is refused.

    Raises
    ------
    FileExistsError
        There is such a file, and it holds something else.
    OSError
        The disk, or the object store, did not take it. Repeat the call with the same content.
    """
    if isinstance(path, Path):
        files.create_whole(path, content)
        return
    if not exists(path):
        try:
            _remote(path, lambda: _create(path, content))
            return
        except StorageError:  # the store refuses, or it created the file and its answer was lost
            if not exists(path):
                raise
    if read(path) != content:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))


def _create(path: UPath, content: bytes) -> None:
    try:
        path.fs.pipe_file(path.path, content, mode="create")
    except OSError as error:
        if error.errno != errno.ENOSYS:
            raise
        path.fs.pipe_file(path.path, content)  # the store does not know the header


def check_exclusive(folder: AnyPath) -> str | None:
    """Try `create_whole` in a folder, which leaves nothing behind. Returns why it protects nothing there, or None.

    Raises
    ------
    OSError
        The disk, or the object store, did not take a file.
    """
    path = folder / f"exclusive-{secrets.token_hex(4)}"
    first, second = b"first", b"second"
    create_whole(path, first)
    try:
        if isinstance(path, Path):
            files.create_whole(path, second)
        else:
            _remote(path, lambda: _create(path, second))
    except (FileExistsError, StorageError):
        pass
    try:
        return None if read(path) == first else f"{folder}: its store replaces a file that was to be created"
    finally:
        remove(path)


def copy_whole(source: AnyPath, target: AnyPath) -> None:
    """Copy a file, which nobody changes afterwards, to another place; within an object store the copy is made there,
    and within a disk that has links it takes no room.

    Raises
    ------
    FileNotFoundError, OSError
    """
    if isinstance(source, Path):
        write_whole(target, partial(_link_or_copy, source))
    elif isinstance(target, Path):
        write_whole(target, lambda local: _remote(source, lambda: source.fs.get_file(source.path, str(local))))
    else:
        _remote(target, lambda: source.fs.copy(source.path, target.path))


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another disk, or one without links
        shutil.copyfile(source, target)


def read(path: AnyPath) -> bytes:
    """The content of a file.

    Raises
    ------
    FileNotFoundError, OSError
    """
    if isinstance(path, Path):
        return path.read_bytes()
    # in one answer: an opened file is read in parts, which fails where it is replaced meanwhile
    content: bytes = _remote(path, lambda: path.fs.cat_file(path.path))
    return content


def read_as(kind: type[Document], path: AnyPath) -> Document | None:
    """A document; None if there is none, or it is not of this kind.

    Raises
    ------
    OSError
        The disk, or the object store, does not answer.
    """
    try:
        return parse(kind, load_json(read(path)))
    except (FileNotFoundError, DocumentError, ConfigError):
        return None


def fetch(path: AnyPath, copies: Callable[[], Path]) -> Path:
    """The file on this machine: itself where it is local, else a copy in the folder that `copies` returns."""
    if isinstance(path, Path):
        return path
    local = copies() / path.name
    copy_whole(path, local)
    return local


def exists(path: AnyPath) -> bool:
    """Whether there is such a file, or such a folder that is not empty."""
    return path.exists() if isinstance(path, Path) else bool(_remote(path, path.exists))


def size_bytes(path: AnyPath) -> int | None:
    """Length of a file; None if it does not exist."""
    try:
        return path.stat().st_size if isinstance(path, Path) else int(_remote(path, lambda: path.fs.size(path.path)))
    except FileNotFoundError:
        return None


def find(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """Paths below a folder that match, sorted by name; none if there is no such folder."""
    if isinstance(folder, Path):
        return sorted(folder.glob(pattern))
    return sorted(_remote(folder, lambda: list(folder.glob(pattern))), key=str)


def remove(path: AnyPath) -> None:
    """Remove a file, or a folder with its content; does nothing if it is gone already."""
    if isinstance(path, Path):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    elif exists(path):
        _remote(path, lambda: path.fs.rm(path.path, recursive=True))


def _remote(path: UPath, call: Callable[[], T]) -> T:
    """The result of a call to a remote file system; its many kinds of errors become one, and it ends in time."""
    try:
        return run_with_timeout(LIMIT_S, str(path), call)
    except TimeoutError as error:
        raise StorageError(str(error)) from None
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: {error}") from None
    except Exception as error:
        raise StorageError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from error
