"""Tar files in the WebDataset layout: `key.jpg`, with the label in `key.cls` or in `key.json`, side by side."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from simmatch.data.config import DataConfig
from simmatch.data.decoding import SUFFIXES
from simmatch.data.formats import DataError
from simmatch.data.places import Files, matching, message
from simmatch.data.samples import Names, Sample, Samples
from simmatch.documents import shortened
from simmatch.labels import UNLABELLED

LARGEST_LABEL_BYTES = 1 << 20
"""Of a `key.json`."""


@dataclass(frozen=True)
class Tars:
    """Tar files.

    >>> Tars(("/data/a.tar", "/data/b.tar")).name(Sample("b.tar/0001", (1, 512, 90), 0))
    '/data/b.tar: 0001'
    """

    files: tuple[str, ...]

    def name(self, sample: Sample) -> str:
        """The file and key of an image."""
        file = self.files[sample.location[0]]
        return f"{file}: {sample.key.removeprefix(os.path.basename(file) + '/')}"

    def files_of(self, keys: Names) -> tuple[str, ...]:
        """All of the files."""
        return self.files

    @contextmanager
    def open(self) -> Iterator[Callable[[Sample], bytes]]:
        """A reader of the images."""
        with Files() as files:

            def read(sample: Sample) -> bytes:
                file, offset, size = sample.location
                return files.read(self.files[file], offset, size)

            yield read


def list_tars(path: str, config: DataConfig) -> tuple[Samples, tuple[str, ...], int]:
    """The images of tar files as they are stored, no class names, and the number of members that are not images.

    The members' headers are read, one after another; of a remote file that is all of it.

    Raises
    ------
    DataError
        There is no such file, one is not a tar file or is damaged, a label is not an integer, or there is no image.

    >>> import io, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with tarfile.open(f"{folder}/a.tar", "w") as tar:
    ...         for name, data in (("1.png", b"pixels"), ("1.cls", b"7")):
    ...             member = tarfile.TarInfo(name)
    ...             member.size = len(data)
    ...             tar.addfile(member, io.BytesIO(data))
    ...     samples, classes, ignored = list_tars(folder, DataConfig(path=folder))
    >>> list(samples), classes, ignored
    ([Sample(key='a.tar/1', location=(0, 512, 6), label=7)], (), 0)
    """
    files = matching(path, ".tar")
    found = _Found()
    with Files() as opened:
        for number, file in enumerate(files):
            before = found.counts()
            opened.using(file, lambda stream, file=file, number=number, before=before: _index(  # type: ignore[misc]
                stream, file, number, config, found.back_to(before)
            ))  # fmt: skip
    if not found.keys:
        raise DataError(
            f"{shortened(path)}: expected images ({', '.join(SUFFIXES)}), got {found.ignored} other members"
        )
    locations = np.array(found.locations, dtype=np.int64)
    samples = Samples(Tars(tuple(files)), Names.of(found.keys), locations, np.array(found.labels))
    return samples, (), found.ignored


@dataclass
class _Found:
    keys: list[bytes] = field(default_factory=list)
    locations: list[tuple[int, int, int]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    ignored: int = 0

    def counts(self) -> tuple[int, int]:
        return len(self.keys), self.ignored

    def back_to(self, counts: tuple[int, int]) -> _Found:
        """Without what a failed attempt at a file has added."""
        number, self.ignored = counts
        del self.keys[number:], self.locations[number:], self.labels[number:]
        return self


def _index(stream: BinaryIO, file: str, number: int, config: DataConfig, found: _Found) -> None:
    """Add the images of one file."""
    stream.seek(0)
    prefix = os.path.basename(file).encode() + b"/"
    try:
        with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            group = _Group("")
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # all that it has found, about 1 kB each
                key, suffix = _parts(member.name)
                if not member.isfile() or not key:
                    continue
                if key != group.key:
                    group.add_to(found, prefix, number)
                    group = _Group(key)
                group.take(member, suffix, stream, config)
            group.add_to(found, prefix, number)
            stream.seek(tar.offset)
            end = stream.read(tarfile.BLOCKSIZE)
        if end.strip(b"\0"):  # tarfile takes a damaged header for the end
            raise DataError("damaged header of a member")
    except (tarfile.TarError, DataError, EOFError, ValueError) as error:
        raise DataError(f"{shortened(file)}: expected a tar file in the WebDataset layout: {message(error)}") from None


def _parts(name: str) -> tuple[str, str]:
    """Key and suffix of a member: its name up to, and from, the first dot in its last part; hidden ones have no key."""
    folder, slash, last = name.rpartition("/")
    stem, dot, suffix = last.partition(".")
    return (f"{folder}{slash}{stem}" if stem else "", f"{dot}{suffix}".lower())


@dataclass
class _Group:
    """The members of one key."""

    key: str
    location: tuple[int, int] | None = None
    label: int | None = None
    others: int = 0

    def take(self, member: tarfile.TarInfo, suffix: str, stream: BinaryIO, config: DataConfig) -> None:
        if suffix in SUFFIXES:
            if self.location is not None:
                raise DataError(f"expected one image of each key, got two of {shortened(self.key)}")
            self.location = (member.offset_data, member.size)
        elif suffix in (".cls", ".json"):
            if config.labels is False or member.size > LARGEST_LABEL_BYTES:
                return
            stream.seek(member.offset_data)
            self._read_label(stream.read(member.size), suffix, config.label_column)
        else:
            self.others += 1

    def _read_label(self, content: bytes, suffix: str, column: str) -> None:
        where = shortened(self.key + suffix)
        text = content.decode("utf-8", "replace").strip()
        value: object = text
        if suffix == ".json":
            try:
                values = json.loads(text)
            except (ValueError, RecursionError):
                raise DataError(f"{where}: expected JSON") from None
            if not isinstance(values, dict) or (value := values.get(column)) is None:
                return
        try:
            label = int(text) if isinstance(value, str) and suffix == ".cls" else value
        except ValueError:
            label = value
        if not isinstance(label, int) or isinstance(label, bool) or not UNLABELLED <= label < 1 << 31:
            shown = shortened(str(value), 40)
            raise DataError(
                f"{where}: expected the number of a class, 0, 1, …, as label, got '{shown}'; write numbers, or set "
                "data.labels: false"
            )
        self.label = label

    def add_to(self, found: _Found, prefix: bytes, number: int) -> None:
        found.ignored += self.others
        if self.location is not None:
            found.keys.append(prefix + os.fsencode(self.key))
            found.locations.append((number, *self.location))
            found.labels.append(UNLABELLED if self.label is None else self.label)
        elif self.label is not None and not self.others:
            raise DataError(
                f"expected each label next to its image, got the label of {shortened(self.key)} without an image; "
                "`tar --sort=name` puts them side by side"
            )
