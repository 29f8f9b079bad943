"""Encoded images at some depth of a stack, in blocks that the ranks share; `simmatch.inputs` makes batches of them.

Images are encoded independently of each other. So a trained layer is complete on every rank, and images, not channels,
are split over the ranks. Encoded images are exchanged only if a layer or a readout needs all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from hashlib import sha256
from typing import Any, TypeVar

import torch
from torch import Tensor

from simmatch.chunks import Chunks
from simmatch.data.feature_cache import FeatureCache, program
from simmatch.data.sources import to_unit
from simmatch.data.staging import Images, Tensors, in_memory, select, staged
from simmatch.devices import arithmetic
from simmatch.sharding.blocks import cut
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.state import gather_from_ranks

Result = TypeVar("Result")

Encode = Callable[[Tensor, slice], tuple[Tensor, Tensor]]


class FeatureStore:
    """Images at some depth of a stack: at depth 0 the images themselves, at depth l the output of layer l − 1.

    They are split into blocks of `batch` images, whatever the number of ranks; a rank encodes every G-th block. All
    ranks can read all images. Of the features a rank can read its own blocks, and others after `share`.

    Parameters
    ----------
    images: [N, C, H, W], uint8 or floating-point in [0, 1]; only their number and `images[indices]` are used.
    exchange: connects to the other ranks.
    batch: number of images of a block.
    dtype, device: of the images and features that the store returns.
    cache: where features are kept, and looked for before images are encoded. None: in memory.

    Attributes
    ----------
    depth: number of layers that have encoded the images.
    features: the output of the last of them; None at depth 0.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> images = torch.rand(10, 1, 8, 8)
    >>> store = FeatureStore(images, IDENTITY, batch=4, dtype=torch.float32, device=torch.device("cpu"))
    >>> store.advance(lambda x, part: (x.mean(dim=(2, 3)), torch.empty(0)), shape=(1,), on_progress=print)
    4
    8
    10
    >>> store.depth, [features.shape for _, features in store.first(6)]
    (1, [torch.Size([4, 1]), torch.Size([2, 1])])
    """

    def __init__(
        self,
        images: Images,
        exchange: Exchange,
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        cache: FeatureCache | None = None,
    ) -> None:
        self.images, self.count, self.exchange, self.batch, self.depth = images, len(images), exchange, batch, 0
        self.features: Chunks | None = None
        self._dtype, self._device, self._cache = dtype, device, cache
        on = (str(dtype), arithmetic(device), torch.get_num_threads())  # what the last bits depend on
        self._key = sha256(repr((cache and (program(), cache.data), on, batch, self.count)).encode())
        self._shape: torch.Size | None = None

    @property
    def own(self) -> range:
        """Numbers of the blocks that this rank encodes."""
        return range(self.exchange.rank, -(-self.count // self.batch), self.exchange.world_size)

    def block(self, number: int) -> slice:
        """The images of a block; none where there is no such block."""
        start = min(number * self.batch, self.count)
        return slice(start, min(start + self.batch, self.count))

    @property
    def parts(self) -> list[slice]:
        """The blocks of this rank, as many on every rank: the last one may be empty."""
        rounds = -(-self.count // (self.batch * self.exchange.world_size))
        return [self.block(self.exchange.rank + turn * self.exchange.world_size) for turn in range(rounds)]

    def done(self, turns: int) -> int:
        """Images that all ranks have done once each has done so many of its blocks."""
        return min(turns * self.batch * self.exchange.world_size, self.count)

    def stored(self, chosen: Tensor | slice) -> Tensor:
        """The images, [n, C, H, W], as stored, on the host, whatever the depth of the store."""
        found = select(self.images, chosen)
        self._shape = self._shape or found.shape[1:]
        if found.shape[1:] != self._shape:
            given, expected = list(found.shape[1:]), list(self._shape)
            raise ValueError(f"images: expected the shape of those that were read first, {expected}, got {given}")
        return found

    def unit(self, stored: Tensor) -> Tensor:
        """Images in [0, 1], or features, of the dtype of the features; arithmetic on the device of `stored`."""
        return to_unit(stored, self._dtype)

    def staged(self, batches: Iterator[Tensors]) -> Generator[Tensors]:
        """Tensors of the host on the device, one batch ahead where that hides something: see `simmatch.data`."""
        on_disk = self.features is not None and self.features.on_disk
        return staged(batches, self._device, ahead=on_disk or not in_memory(self.images, self._device))

    def encode(self, encode: Callable[[Tensor], Result]) -> Generator[tuple[slice, Result]]:
        """Something computed from every part of this rank, and the range of its images."""
        yield from ((part, encode(x)) for part, x in self._values(self.parts))

    def first(self, count: int) -> Generator[tuple[slice, Tensor]]:
        """Those of the first `count` images that are in blocks of this rank: their range, and their features."""
        return self._values(cut(count, self.batch)[self.exchange.rank :: self.exchange.world_size])

    def _values(self, parts: Sequence[slice]) -> Generator[tuple[slice, Tensor]]:
        """Images or features of some parts of this rank, on the device."""

        def read(part: slice) -> Tensor:
            if self.features is None:
                return self.stored(part)
            return self.features[torch.arange(part.start, part.stop)]

        with closing(self.staged((read(part),) for part in parts)) as values:
            for part, (value,) in zip(parts, values, strict=True):
                yield part, self.unit(value)

    # ------------------------------------------------------------------------------------------- encoding

    def advance(
        self,
        encode: Encode,
        shape: Sequence[int],
        on_progress: Callable[[int], None],
        *,
        by: Sequence[object] = (),
        extra: int = 0,
    ) -> None:
        """Replace the images by their features of one layer more; parameters as for `encoded`."""
        self.features, self._key = self.encoded(encode, shape, on_progress, by=by, extra=extra), self._key_of(by)
        self.depth += 1

    def encoded(
        self,
        encode: Encode,
        shape: Sequence[int],
        on_progress: Callable[[int], None],
        *,
        by: Sequence[object] = (),
        extra: int = 0,
    ) -> Chunks:
        """The result of `encode` for all images: this rank makes those of its blocks that the cache does not have.

        Parameters
        ----------
        encode: called with a block, [n, …], and its range of images; returns values [n, *shape] and numbers [extra].
        shape: of the values of one image.
        on_progress: called with the number of images done so far, by all ranks.
        by: all that the result depends on besides the present features: tensors, and what has a `repr`.
        extra: how many numbers `encode` returns for a block.
        """
        features = None if self._cache is None else self._cache.open(self._key_of(by).hexdigest()[:32])
        chunks = Chunks(self.count, shape, self._dtype, batch=self.batch, extra=extra, features=features)
        missing, done = [], 0
        for number in self.own:
            if chunks.find(number):
                done += 1
                on_progress(self.done(done))
            else:
                missing.append(number)
        with closing(self._values([self.block(number) for number in missing])) as blocks:
            for number, (part, x) in zip(missing, blocks, strict=True):
                chunks.put(number, *encode(x, part))
                done += 1
                on_progress(self.done(done))
        found = sum(part.stop - part.start for part in map(self.block, set(self.own) - set(missing)))
        # also, nobody looks for a block of another rank before that rank has made it
        chunks.found = int(gather_from_ranks(torch.full((1,), found, device=self._device), self.exchange).sum())
        return chunks

    def _key_of(self, by: Sequence[object]) -> Any:
        key = self._key.copy()
        for each in by if self._cache is not None else ():
            if isinstance(each, Tensor):
                key.update(each.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy().data)
            else:
                key.update(repr(each).encode())
        return key

    def share(self, chunks: Chunks, on_progress: Callable[[int], None]) -> None:
        """Make all chunks readable on every rank.

        What a rank does not find on its node it receives, a chunk at a time, from the first rank that has it. So each
        node has all chunks, and no batch needs an exchange.
        """
        readable = torch.zeros(len(chunks.numbers), dtype=torch.uint8, device=self._device)
        for number in chunks.numbers:
            readable[number] = chunks.find(number)
            on_progress(min(chunks.images(number).stop, self.count - 1))
        everywhere = gather_from_ranks(readable, self.exchange).cpu()
        for number in (everywhere.min(dim=0).values == 0).nonzero().flatten().tolist():
            source, own = int(everywhere[:, number].nonzero()[0]), bool(everywhere[self.exchange.rank, number])
            content = chunks.content(number) if own else torch.empty(chunks.content_bytes(number), dtype=torch.uint8)
            content = content.to(self._device)
            self.exchange.broadcast(content, source).wait()
            if not own and not chunks.find(number):  # another rank of this node may have written it
                chunks.put_content(number, content.cpu())
            on_progress(self.count - 1)
        on_progress(self.count)
