"""Encoding without coupling: images are split over the ranks, not channels, and pooled features are kept.

A finished layer is gathered whole on every rank, so encoding needs no exchange; what is exchanged is the result,
where somebody needs all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from simmatch.data.sources import to_unit
from simmatch.sharding.exchange import Exchange


def own_part(count: int, exchange: Exchange) -> slice:
    """This rank's share of `count` consecutive images; the last ranks may have fewer, or none."""
    width = -(-count // exchange.world_size)
    start = min(exchange.rank * width, count)
    return slice(start, min(start + width, count))


def gather_images(own: Tensor, count: int, exchange: Exchange) -> Tensor:
    """Shares of `count` images, split by `own_part`, put together on every rank: [count, …]."""
    width = -(-count // exchange.world_size)
    gathered = own.new_zeros(exchange.world_size, width, *own.shape[1:])
    gathered[exchange.rank, : own.shape[0]] = own
    exchange.all_gather(gathered).wait()
    return gathered.flatten(0, 1)[:count]


class FeatureStore:
    """Features of a set of images at some depth of the stack, each rank keeping its share.

    Parameters
    ----------
    images: [N, C, H, W] as stored in the data set, all of them on every rank.
    batch: images per rank and step of encoding.
    kept: depths whose features a readout will see side by side, with how it reads them; depth 0 is the first layer's
        output.
    """

    def __init__(
        self,
        images: Tensor,
        exchange: Exchange,
        *,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        kept: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
    ) -> None:
        self.count, self.exchange = len(images), exchange
        chunk = batch * exchange.world_size
        self.chunks = [slice(start, min(start + chunk, self.count)) for start in range(0, self.count, chunk)]
        self._images, self._dtype, self._device = images, dtype, device
        self._own: list[Tensor] | None = None
        self._reading, self._depth = kept or {}, 0
        self._kept: list[list[Tensor]] = []

    def images(self, chosen: Tensor | slice) -> Tensor:
        """The images themselves, [n, C, H, W] in [0, 1]."""
        return to_unit(self._images[chosen], self._dtype).to(self._device)

    def own(self, index: int) -> Tensor:
        """This rank's share of chunk `index`."""
        return self.images(self._part(self.chunks[index])) if self._own is None else self._own[index]

    def _part(self, chunk: slice) -> slice:
        """The images of a chunk that are this rank's."""
        part = own_part(chunk.stop - chunk.start, self.exchange)
        return slice(chunk.start + part.start, chunk.start + part.stop)

    def advance(self, encode: Callable[[Tensor, slice], Tensor], seen: Callable[[int], None]) -> None:
        """Replace the features by their encoding.

        `encode(x, images)` also hears which images of the set x are; `seen(n)` of every n images done by all ranks.
        """
        following = []
        for index, chunk in enumerate(self.chunks):
            following.append(encode(self.own(index), self._part(chunk)))
            seen(chunk.stop - chunk.start)
        if self._depth in self._reading:
            self._kept.append([self._reading[self._depth](part) for part in following])
        self._depth += 1
        self._own = following

    def gathered(self, encode: Callable[[Tensor], Tensor] | None = None) -> Iterator[Tensor]:
        """Chunks in order, whole on every rank; each rank's share goes through `encode` first."""
        parts = (self.own(index) for index in range(len(self.chunks)))
        return self.gather_parts(parts if encode is None else map(encode, parts))

    def gather_parts(self, own: Iterable[Tensor]) -> Iterator[Tensor]:
        """Like `gathered`, for tensors [share, …] computed beside the features, one a chunk."""
        for part, chunk in zip(own, self.chunks, strict=True):
            yield gather_images(part, chunk.stop - chunk.start, self.exchange)

    def features(self) -> Iterator[Tensor]:
        """What readouts see, chunk by chunk: [n, F], the kept depths side by side."""
        depths = zip(*self._kept, strict=True)
        return self.gather_parts(torch.cat(parts, dim=1) for parts in depths)

    def first(self, count: int) -> Tensor:
        """The first `count` images' features, on every rank."""
        parts, seen = [], 0
        for part in self.gathered():
            parts.append(part)
            seen += len(part)
            if seen >= count:
                break
        return torch.cat(parts)[:count]
