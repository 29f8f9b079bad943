"""Files that are whole or absent whatever happens meanwhile, and still there after the power failed.

A file's content and its name reach the disk separately: the first by a sync of the file, the second by one of its
folder. `cluster.storage` does the same for object stores.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

Content = bytes | str | Callable[[Path], object]
"""What a file is to hold, text as UTF-8; or what writes it, called with the name that it has until it is whole."""

PARTIAL = ".partial"
"""Ends the name of a file that is not whole yet."""


def write_whole(path: Path, content: Content) -> None:
    """Write a file, and its folder where there is none; on the disk under its name when this returns.

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
        move_whole(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def move_whole(source: Path, target: Path) -> None:
    """Give a file its place, which may hold one already, on the same file system; its content is on the disk before."""
    with source.open("rb") as file:
        os.fsync(file.fileno())
    source.replace(target)
    sync_folder(target.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing; on the disk when this returns."""
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
    """Bring the names in a folder to the disk, where the file system can."""
    try:
        opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that may be written and not listed
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some have no such call
            raise
    finally:
        os.close(opened)
