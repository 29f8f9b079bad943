"""Atomic, durable writing of files: after a crash or power failure a file is complete or absent.

The content of a file reaches the disk by a sync of the file, and its name by a sync of its folder. `cluster.storage`
does the same for object stores.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

Content = bytes | str | Callable[[Path], object]
"""The content of a file, text as UTF-8; or a function that writes it to the temporary path given to it."""

PARTIAL = ".partial"
"""Suffix of a file that is not complete yet."""

LOCK_POLL_S = 0.02
"""Between two looks at a lock."""


def write_whole(path: Path, content: Content) -> None:
    """Write a complete file, creating its folder if necessary; the file is on the disk when this returns.

    Raises
    ------
    OSError
        The file could not be written. An existing file of that name is unchanged.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(Path(folder, "runs", "config.yaml"), "seed: 1")
    ...     Path(folder, "runs", "config.yaml").read_text()
    'seed: 1'
    """
    _put(path, path.with_name(path.name + PARTIAL), content, lambda partial: partial.replace(path))


def create_whole(path: Path, content: bytes) -> None:
    """Create a complete file, which exists for nobody before it is whole; of several that try, one succeeds.

    Give the content something of your own, such as a random number: a file that holds the same content counts as
    created here, so that a call whose answer was lost, as over NFS, can be repeated. On a file system without links the
    file is created exclusively and then written, so a crash can leave a part of it.

    Raises
    ------
    FileExistsError
        There is such a file, and it holds something else.
    OSError
        The file could not be written.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     create_whole(Path(folder, "owner"), b"first")
    ...     create_whole(Path(folder, "owner"), b"second")
    Traceback (most recent call last):
    FileExistsError: [Errno 17] File exists: '/.../owner'
    """
    partial = path.with_name(f"{path.name}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        _put(path, partial, content, lambda partial: _link(partial, path, content))
    except FileExistsError as error:
        if path.is_symlink() or not path.is_file() or path.read_bytes() != content:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from error


def _link(partial: Path, path: Path, content: bytes) -> None:
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):  # of systems without links
            raise
        with path.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def _put(path: Path, partial: Path, content: Content, name_it: Callable[[Path], object]) -> None:
    """Write a file under a temporary name, then give it its own; both are on the disk when this returns."""
    make_folder(path.parent)
    partial.unlink(missing_ok=True)  # a symbolic link there would redirect the write
    try:
        if callable(content):
            content(partial)
        else:
            with partial.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        name_it(partial)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create a folder and its missing parents; they are on the disk when this returns.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     make_folder(Path(folder, "a", "b"))
    ...     Path(folder, "a", "b").is_dir()
    True
    """
    try:
        folder.mkdir()
    except FileNotFoundError:
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Write the names in a folder to the disk, on file systems that support it.

    >>> sync_folder(Path.cwd())
    """
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder with permission to write but not to list
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # not supported by some file systems
            raise
    finally:
        os.close(opened)


@contextmanager
def locked(path: Path, limit_s: float) -> Iterator[int]:
    """Hold a lock file, which is made if there is none, and stays. The lock of a process that ends is free.

    Yields
    ------
    The descriptor of the file.

    Raises
    ------
    TimeoutError
        Another process, or another thread, has held it for `limit_s` seconds.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder, locked(Path(folder, "lock"), 1.0):
    ...     with locked(Path(folder, "lock"), 0.0):
    ...         pass
    Traceback (most recent call last):
    TimeoutError: /.../lock: expected a free lock, another process holds it
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # less what the umask takes
    try:
        deadline = time.monotonic() + limit_s
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise TimeoutError(f"{path}: expected a free lock, another process holds it") from None
                time.sleep(LOCK_POLL_S)
        yield descriptor
    finally:
        os.close(descriptor)


def path_parts(path: str) -> list[str]:
    """The parts of a relative path inside a folder.

    Raises
    ------
    ValueError
        The path leads out of the folder.

    >>> path_parts("figures/layer0.png")
    ['figures', 'layer0.png']
    >>> path_parts("../secrets")
    Traceback (most recent call last):
    ValueError: expected a path in the run directory, got '../secrets'
    """
    parts = path.split("/")
    if any(part in ("", ".", "..") or "\0" in part for part in parts):
        raise ValueError(f"expected a path in the run directory, got {path[:200]!r}")
    return parts


def open_inside(folder: Path, path: str, most_bytes: int | None = None) -> BinaryIO:
    """Open a file for reading, in a folder to which others may write, without following symbolic links.

    Raises
    ------
    ValueError
        The path leads out of the folder or through a symbolic link, is not a regular file, or is larger than
        `most_bytes`.
    OSError
        The file does not exist or cannot be read.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_whole(Path(folder, "config.yaml"), "seed: 1")
    ...     with open_inside(Path(folder), "config.yaml", most_bytes=100) as file:
    ...         file.read()
    b'seed: 1'
    """
    *above, name = path_parts(path)
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for part, flags in [*((part, os.O_DIRECTORY) for part in above), (name, os.O_NONBLOCK)]:
            inner = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | flags, dir_fd=opened)
            os.close(opened)
            opened = inner
        status = os.fstat(opened)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(f"expected a file, got something else at {path!r}")
        if most_bytes is not None and status.st_size > most_bytes:
            raise ValueError(f"expected at most {most_bytes} bytes, got {status.st_size} in {path!r}")
    except BaseException as error:
        os.close(opened)
        if isinstance(error, OSError) and _through_a_link(folder, path):
            raise ValueError(
                f"expected a file of the run directory, got {path!r}, which leads through a link"
            ) from None
        raise
    return os.fdopen(opened, "rb")


def _through_a_link(folder: Path, path: str) -> bool:
    parts = path.split("/")
    return any((folder / "/".join(parts[: depth + 1])).is_symlink() for depth in range(len(parts)))
