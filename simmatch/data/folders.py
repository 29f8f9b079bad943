"""Folders of image files: the class of an image is the folder of the first level in which it is."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from simmatch.config import ConfigError
from simmatch.data.config import DataConfig
from simmatch.data.decoding import SUFFIXES
from simmatch.data.formats import DataError
from simmatch.data.places import Files, contents, is_folder, walk
from simmatch.data.samples import Names, Sample, Samples
from simmatch.documents import shortened
from simmatch.labels import UNLABELLED


@dataclass(frozen=True)
class Folder:
    """A folder of image files.

    >>> Folder("/data/photos").name(Sample("cats/1.jpg", (), 0))
    '/data/photos/cats/1.jpg'
    """

    path: str

    def name(self, sample: Sample) -> str:
        """The path of an image."""
        return f"{self.path}/{sample.key}"

    def files_of(self, keys: Names) -> Iterator[str]:
        """The path of each image."""
        return (f"{self.path}/{key}" for key in keys)

    @contextmanager
    def open(self) -> Iterator[Callable[[Sample], bytes]]:
        """A reader of the images."""
        with Files() as files:
            yield lambda sample: files.read(self.name(sample))


def list_folder(path: str, config: DataConfig) -> tuple[Samples, tuple[str, ...], int]:
    """The images of a folder in the order of their paths, the classes, and the number of files that are not images.

    Raises
    ------
    DataError
        There is no such folder, or no image in it.
    ConfigError
        It holds images both beside and in folders, and `data.labels` does not say what that means.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for name in ("cats/1.png", "dogs/2.png", "dogs/notes.txt"):
    ...         os.makedirs(os.path.dirname(f"{folder}/{name}"), exist_ok=True)
    ...         open(f"{folder}/{name}", "w").close()
    ...     samples, classes, ignored = list_folder(folder, DataConfig(path=folder))
    >>> list(samples.keys), samples.labels.tolist(), classes, ignored
    (['cats/1.png', 'dogs/2.png'], [0, 1], ('cats', 'dogs'), 1)
    """
    if not is_folder(path):
        raise DataError(f"{shortened(path)}: {_why_no_folder(path)}")
    keys, ignored = [], 0
    for name in walk(path):
        if name.lower().endswith(SUFFIXES):
            keys.append(os.fsencode(name))
        else:
            ignored += 1
    if not keys:
        found = f"other files ({ignored:,})" if ignored else "an empty folder"
        raise DataError(f"{shortened(path)}: expected images ({', '.join(SUFFIXES)}), got {found}")
    keys.sort()
    folders = [key.partition(b"/")[0] if b"/" in key else b"" for key in keys]
    if config.labels is False or not any(folders):
        labels, names = np.full(len(keys), UNLABELLED), []
    else:
        if config.labels is None and not all(folders):
            raise ConfigError(
                f"data.labels: {shortened(path)} holds images both beside and in folders; expected true (folders are "
                "classes, images beside them have no label) or false (no image has a label), got nothing"
            )
        names = sorted({name for name in folders if name})
        number = {name: index for index, name in enumerate(names)} | {b"": UNLABELLED}
        labels = np.array([number[name] for name in folders])
    classes = tuple(os.fsdecode(name) for name in names)
    return Samples(Folder(path), Names.of(keys), np.zeros((len(keys), 0), np.int64), labels), classes, ignored


def _why_no_folder(path: str) -> str:
    if os.path.isfile(path):
        return "expected a folder of images, or files .tar or .parquet, got another file"
    above = path.rpartition("/")[0] or "/"
    if not is_folder(above):
        return "no such folder"
    others = ", ".join(contents(above)[0][:5])
    return f"no such folder; beside it: {shortened(others)}" if others else "no such folder"
