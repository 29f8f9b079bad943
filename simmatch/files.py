"""Files that are whole or absent whatever happens meanwhile, and still there after a power failure.

Every file that this project writes whole goes through `write_whole`. A file's content and its name reach the disk
separately: the first by a sync of the file, the second by a sync of its folder. `cluster.storage` does the same for
object stores.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

Content = bytes | str | Callable[[Path], object]
"""What a file is to hold, text as UTF-8; or a function that writes it, called with its temporary path."""

PARTIAL = ".partial"
"""Suffix of a file that is not whole yet."""


def write_whole(path: Path, content: Content) -> None:
    """Write a file, and its folder where there is none; it is on the disk, under its name, when this returns.

    Raises
    ------
    OSError
        The disk did not take it. What was there before still is.
    """
    make_folder(path.parent)
    partial = path.with_name(path.name + PARTIAL)
    partial.unlink(missing_ok=True)  # a link there would have another file written
    try:
        if callable(content):
            content(partial)
        else:
            with partial.open("xb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        sync_folder(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing; they are on the disk when this returns."""
    try:
        folder.mkdir()
    except FileNotFoundError:
        make_folder(folder.parent)
        make_folder(folder)
    except FileExistsError:
        if not folder.is_dir():
            raise
    else:
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, on file systems that support it."""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that may be written and not listed
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems have no such call
            raise
    finally:
        os.close(opened)
