"""Encoded images, in chunks that any rank can make: on the disk of a node, or in memory where there is no cache."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import prod

import numpy as np
import torch
from torch import Tensor

from simmatch.data.cache import MOST_OPEN, MemoryFile, Readable
from simmatch.data.feature_cache import Features
from simmatch.data.formats import DataError
from simmatch.data.prepared import read_rows


class ChunkLost(OSError):
    """A chunk that was in the cache can no longer be read there. Whoever looks for it again encodes these images again.

    >>> raise ChunkLost("encoded images: /cache/features/a-key/000007.bin: Input/output error")
    Traceback (most recent call last):
    simmatch.chunks.ChunkLost: encoded images: /cache/features/a-key/000007.bin: Input/output error
    """


class Chunks:
    """Values [N, *shape] of N images in chunks of `batch`, of which this process knows some: `chunks[indices]`.

    What a chunk holds depends on its number only. Beside the values of its images it holds `extra` numbers of its own.
    Tensors are on the host. Threads may read at the same time.

    Parameters
    ----------
    count: N.
    shape, dtype: of the values of one image.
    batch: images of a chunk; the last one may have fewer.
    extra: how many numbers a chunk holds besides.
    features: where chunks are kept. None: in memory.

    Raises
    ------
    ChunkLost
        By all that reads: a file in the cache was removed or damaged after it was found.

    Attributes
    ----------
    found: number of images, of all ranks, that were there already.

    >>> chunks = Chunks(5, (2,), torch.float32, batch=3)
    >>> chunks.put(0, torch.zeros(3, 2), torch.empty(0)); chunks.put(1, torch.ones(2, 2), torch.empty(0))
    >>> chunks[torch.tensor([4, 0])]
    tensor([[1., 1.],
            [0., 0.]])
    """

    def __init__(
        self,
        count: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        *,
        batch: int,
        extra: int = 0,
        features: Features | None = None,
    ) -> None:
        self.count, self.shape, self.dtype, self.batch, self.extra = count, tuple(shape), dtype, batch, extra
        self.found = 0
        self.row_bytes: int = dtype.itemsize * prod(self.shape)
        self._starts = np.array([*range(0, count, batch), count], dtype=np.int64)
        self._features = features
        self._known: set[int] = set()  # on the disk, and whole
        self._memory: dict[int, MemoryFile] = {}
        self._open: OrderedDict[int, Readable] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self.count

    @property
    def on_disk(self) -> bool:
        """Whether chunks are kept in a cache, as far as it takes them."""
        return self._features is not None

    @property
    def numbers(self) -> range:
        """Of all chunks."""
        return range(len(self._starts) - 1)

    def images(self, number: int) -> slice:
        """The images of a chunk."""
        return slice(int(self._starts[number]), int(self._starts[number + 1]))

    def content_bytes(self, number: int) -> int:
        """Of a chunk."""
        part = self.images(number)
        content_bytes: int = self.row_bytes * (part.stop - part.start) + self.dtype.itemsize * self.extra
        return content_bytes

    def find(self, number: int) -> bool:
        """Whether a chunk can be read here. One that another process has written is compared with its checksum."""
        known = number in self._known or number in self._memory
        if not known and self._features is not None and self._features.find(number, self.content_bytes(number)):
            self._known.add(number)
        return known or number in self._known

    def put(self, number: int, values: Tensor, extra: Tensor) -> None:
        """Keep the values [n, *shape] of the images of a chunk, and its own numbers [extra]."""
        self.put_content(number, torch.cat([_bytes(values), _bytes(extra)]) if self.extra else _bytes(values))

    def put_content(self, number: int, content: Tensor) -> None:
        """Keep the content of a chunk, uint8 [content_bytes]."""
        assert len(content) == self.content_bytes(number)
        held = content.numpy().data
        if self._features is not None and self._features.write(number, [held]):
            self._known.add(number)
        else:
            self._memory[number] = MemoryFile(held)

    def content(self, number: int) -> Tensor:
        """The content of a chunk, uint8 [content_bytes]."""
        content = torch.empty(self.content_bytes(number), dtype=torch.uint8)
        with _losses():
            self._readable(number).read_into(content.numpy().data, 0)
        return content

    def extras(self, number: int) -> Tensor:
        """The numbers [extra] of a chunk."""
        values = torch.empty(self.extra, dtype=self.dtype)
        held = _bytes(values).numpy().data
        with _losses():
            self._readable(number).read_into(held, self.content_bytes(number) - len(held))
        return values

    def __getitem__(self, indices: Tensor) -> Tensor:
        """The values of images with these indices, int64 [n]: [n, *shape]."""
        values = torch.empty(len(indices), *self.shape, dtype=self.dtype)
        if self.row_bytes == 0:
            return values
        with _losses():
            read_rows(self._readable, self._starts, indices.cpu().numpy(), values.numpy())
        return values

    def whole(self, device: torch.device) -> Tensor:
        """The values of all images, [N, *shape]."""
        values = torch.empty(self.count, *self.shape, dtype=self.dtype, device=device)
        for part in map(self.images, self.numbers):
            values[part] = self[torch.arange(part.start, part.stop)].to(device)
        return values

    def _readable(self, number: int) -> Readable:
        with self._lock:
            opened = self._open.pop(number, None) or self._memory.get(number)
            if opened is None and self._features is not None:
                while len(self._open) >= MOST_OPEN:
                    self._open.popitem(last=False)
                opened = self._features.open(number, self.content_bytes(number))
            if opened is None:
                part = self.images(number)
                which = f"encoded images {part.start} to {part.stop - 1}"
                raise ChunkLost(f"{which}: expected a chunk in the cache, found none")
            if number not in self._memory:
                self._open[number] = opened
            return opened


@contextmanager
def _losses() -> Iterator[None]:
    try:
        yield
    except DataError as error:  # what a read raises
        raise ChunkLost(f"encoded images: {error}") from None


def _bytes(values: Tensor) -> Tensor:
    """The bytes of a tensor on the host, uint8 [n]."""
    return values.contiguous().cpu().view(-1).view(torch.uint8)
