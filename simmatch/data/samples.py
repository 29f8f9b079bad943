"""A list of images that have not been read yet: names, places and labels, about a hundred bytes an image."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, Protocol, overload

import numpy as np

from simmatch.labels import UNLABELLED

Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Sample:
    """One image that has not been read yet.

    >>> Sample("cats/1.jpg", (), 0).key
    'cats/1.jpg'
    """

    key: str
    """Its name, which no other of the list has: the relative path of a file, `shard.tar/key` or `file.parquet/row`."""

    location: tuple[int, ...]
    """Where its file holds it, for the reader of its format."""

    label: int
    """Its class, or `UNLABELLED`."""


class Reader(Protocol):
    """Reads images of one place; reading them in the order of their list is fastest.

    >>> class Constant:
    ...     def __call__(self, sample: Sample) -> bytes:
    ...         return b""
    >>> reader: Reader = Constant()
    """

    def __call__(self, sample: Sample) -> bytes:
        """The bytes of an image file.

        Raises
        ------
        DataError
            They cannot be read; the message names the file.
        """


class Origin(Protocol):
    """The files of a list, as a value that can be pickled.

    >>> from simmatch.data.folders import Folder
    >>> origin: Origin = Folder("/data/photos")
    """

    def open(self) -> AbstractContextManager[Reader]:
        """A reader, to be closed after use."""

    def name(self, sample: Sample) -> str:
        """A sample's place, for messages."""

    def files_of(self, keys: Names) -> Iterable[str]:
        """The paths of the files that hold images with these keys."""


class Names(Sequence[str]):
    """Texts in one block of memory.

    >>> list(Names.of([b"a", b"bc"]))
    ['a', 'bc']
    """

    def __init__(self, block: bytes, ends: Integers) -> None:
        self._block, self._ends = block, ends

    @classmethod
    def of(cls, names: Sequence[bytes]) -> Names:
        """From texts in UTF-8; bytes that are not are kept."""
        return cls(b"".join(names), np.cumsum([len(name) for name in names], dtype=np.int64))

    def __len__(self) -> int:
        return len(self._ends)

    def bytes(self, index: int) -> bytes:
        """A text in UTF-8."""
        return self._block[self._ends[index - 1] if index else 0 : self._ends[index]]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Names: ...
    def __getitem__(self, index: int | slice) -> str | Names:
        if isinstance(index, slice):
            return Names.of([self.bytes(each) for each in range(len(self))[index]])
        return self.bytes(range(len(self))[index]).decode("utf-8", "surrogateescape")

    def take(self, indices: Integers) -> Names:
        """Some of the texts."""
        return Names.of([self.bytes(int(index)) for index in indices])

    def hashes(self, seed: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        """64 bits of a hash of each text and a seed."""
        key = str(seed).encode()
        digests = (blake2b(self.bytes(index), digest_size=8, key=key).digest() for index in range(len(self)))
        return np.frombuffer(b"".join(digests), dtype="<u8")


@dataclass(frozen=True, eq=False)
class Samples(Sequence[Sample]):
    """Images of one place that have not been read yet, in the order in which they are read fastest.

    A part of a list (`samples[a:b]`, `samples.take(indices)`) can be pickled and holds nothing of the rest.

    >>> from simmatch.data.folders import Folder
    >>> samples = Samples(Folder("/data"), Names.of([b"a/1.png", b"b/2.png"]), np.zeros((2, 0), int), np.array([0, 1]))
    >>> samples[1], samples.origin.name(samples[1])
    (Sample(key='b/2.png', location=(), label=1), '/data/b/2.png')
    >>> len(samples[:1]), samples.labels.tolist()
    (1, [0, 1])
    """

    origin: Origin
    keys: Names
    locations: Integers
    """[N, n]: `Sample.location` of each."""
    labels: Integers
    """[N]."""

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Samples: ...
    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        return Sample(self.keys[index], tuple(self.locations[index].tolist()), int(self.labels[index]))

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def take(self, indices: Integers) -> Samples:
        """Some of the images, in any order."""
        return replace(
            self, keys=self.keys.take(indices), locations=self.locations[indices], labels=self.labels[indices]
        )

    def unlabelled(self) -> Samples:
        """The same images without their labels."""
        return replace(self, labels=np.full(len(self), UNLABELLED))

    def mixed(self, seed: int) -> Integers:
        """A random order that depends on the keys and a seed only: indices, by the hashes of the keys."""
        return np.argsort(self.keys.hashes(seed), kind="stable")

    def split(self, fraction: float, seed: int) -> tuple[Samples, Samples]:
        """The list in two; the second part has this fraction, rounded, of each class and of the unlabelled images.

        It holds those whose keys have the smallest hashes: the same ones wherever and in whatever order the images
        were found. At least one image of a class stays in the first part.
        """
        order = self.mixed(seed)
        second = np.zeros(len(self), dtype=bool)
        for label in np.unique(self.labels):
            members = order[self.labels[order] == label]
            second[members[: min(round(fraction * len(members)), len(members) - 1)]] = True
        return self.take(np.flatnonzero(~second)), self.take(np.flatnonzero(second))
