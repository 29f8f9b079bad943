"""Encoded images at some depth of a stack, and the batches of patches from which a layer learns.

Images are encoded independently of each other. So a trained layer is complete on every rank, and images, not channels,
are split over the ranks. Encoded images are exchanged only if a layer or a readout needs all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from simmatch.data.order import Batches
from simmatch.data.sources import to_unit
from simmatch.data.staging import Images, Tensors, in_memory, select, staged
from simmatch.geometry import Patches
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.blocks import by_blocks
from simmatch.sharding.columns import Part
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.state import gather_padded

Result = TypeVar("Result")


def own_part(count: int, exchange: Exchange) -> slice:
    """This rank's share of `count` consecutive images; the last ranks may have fewer, or none.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> own_part(10, IDENTITY)
    slice(0, 10, None)
    """
    width = -(-count // exchange.world_size)
    start = min(exchange.rank * width, count)
    return slice(start, min(start + width, count))


def gather_images(own: Tensor, count: int, exchange: Exchange) -> Tensor:
    """Gather the shares of `count` images, as split by `own_part`, on every rank: [count, …].

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> gather_images(torch.rand(10, 8, 2, 2), 10, IDENTITY).shape
    torch.Size([10, 8, 2, 2])
    """
    width = -(-count // exchange.world_size)
    return gather_padded(own, width, exchange).flatten(0, 1)[:count]


class FeatureStore:
    """Images at some depth of a stack: at depth 0 the images themselves, at depth l the output of layer l − 1.

    All ranks can read all images. Of the features every rank keeps its share of each chunk.

    Parameters
    ----------
    images: [N, C, H, W], uint8 or floating-point in [0, 1]; only their number and `images[indices]` are used.
    exchange: connects to the other ranks.
    batch: number of images that a rank encodes at a time.
    dtype, device: of the images and features that the store returns.

    Attributes
    ----------
    chunks: ranges of images that all ranks encode together at a time.
    batch: number of images of a block, of which a rank encodes one of every chunk.
    depth: number of layers that have encoded the images.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> images = torch.rand(10, 1, 8, 8)
    >>> store = FeatureStore(images, IDENTITY, batch=4, dtype=torch.float32, device=torch.device("cpu"))
    >>> store.advance(lambda x, part: x.mean(dim=(2, 3)), on_progress=print)
    4
    8
    10
    >>> store.depth, [features.shape for _, features in store.first(6)]
    (1, [torch.Size([4, 1]), torch.Size([2, 1])])
    """

    def __init__(
        self, images: Images, exchange: Exchange, *, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.count, self.exchange, self.batch, self.depth = len(images), exchange, batch, 0
        chunk = batch * exchange.world_size
        self.chunks = [slice(start, min(start + chunk, self.count)) for start in range(0, self.count, chunk)]
        self._images, self._dtype, self._device = images, dtype, device
        self._own: list[Tensor] = []
        self._shape: torch.Size | None = None

    def stored(self, chosen: Tensor | slice) -> Tensor:
        """Images [n, C, H, W] as stored, on the host, whatever the depth of the store."""
        found = select(self._images, chosen)
        self._shape = self._shape or found.shape[1:]
        if found.shape[1:] != self._shape:
            given, expected = list(found.shape[1:]), list(self._shape)
            raise ValueError(f"images: expected the shape of those that were read first, {expected}, got {given}")
        return found

    def unit(self, stored: Tensor) -> Tensor:
        """Images in [0, 1], of the dtype of the features; arithmetic on the device of `stored`."""
        return to_unit(stored, self._dtype)

    def staged(self, batches: Iterator[Tensors]) -> Generator[Tensors]:
        """Tensors of the host on the device, one batch ahead where that hides something: see `simmatch.data`."""
        return staged(batches, self._device, ahead=not in_memory(self._images, self._device))

    @property
    def parts(self) -> list[slice]:
        """Of every chunk, the images that this rank encodes."""
        return [self._part(chunk) for chunk in self.chunks]

    def own(self, encode: Callable[[Tensor], Result]) -> Generator[tuple[slice, Result]]:
        """Something computed from this rank's share of every chunk, and the range of its images."""
        with closing(self._shares()) as shares:
            for part, share in zip(self.parts, shares, strict=True):
                yield part, encode(share)

    def first(self, count: int) -> Generator[tuple[slice, Tensor]]:
        """Those of the first `count` images that this rank has a share of: their range, and their features."""
        with closing(self._shares()) as shares:
            for part, share in zip(self.parts, shares, strict=True):
                if part.start >= count:
                    return
                yield slice(part.start, min(part.stop, count)), share[: count - part.start]

    def _shares(self) -> Generator[Tensor]:
        """This rank's share of the features of every chunk."""
        if self.depth > 0:
            yield from self._own
            return
        with closing(self.staged((self.stored(self._part(chunk)),) for chunk in self.chunks)) as parts:
            for (part,) in parts:
                yield self.unit(part)

    def _part(self, chunk: slice) -> slice:
        """The images of a chunk that this rank encodes: a block whose first image does not depend on the ranks."""
        start = chunk.start + self.exchange.rank * self.batch
        return slice(min(start, chunk.stop), min(start + self.batch, chunk.stop))

    def share(self, index: int, whole: Tensor) -> None:
        """Use a view of `whole`, the features [N, …] of all images, as this rank's share of chunk `index`."""
        self._own[index] = whole[self._part(self.chunks[index])]

    def advance(self, encode: Callable[[Tensor, slice], Tensor], on_progress: Callable[[int], None]) -> None:
        """Encode all images with one more layer.

        Parameters
        ----------
        encode: called with this rank's share of a chunk, [n, …], and its range of images; returns features [n, …].
        on_progress: called with the number of images encoded so far, by all ranks.
        """
        encoded = []
        with closing(self._shares()) as shares:
            for share, chunk in zip(shares, self.chunks, strict=True):
                encoded.append(encode(share, self._part(chunk)))
                on_progress(chunk.stop)
        self._own, self.depth = encoded, self.depth + 1

    def gathered(self, encode: Callable[[Tensor], Tensor] | None = None) -> Iterator[Tensor]:
        """The chunks in order, complete on every rank. `encode`, if given, is applied to each rank's share first."""
        for share, chunk in zip(self._shares(), self.chunks, strict=True):
            part = share if encode is None else encode(share)
            blocks = gather_padded(part, min(self.batch, self.count), self.exchange)
            yield blocks.flatten(0, 1)[: chunk.stop - chunk.start]


@dataclass(frozen=True)
class Staged:
    """One batch on the device, before anything is computed from it.

    Attributes
    ----------
    source: of this rank's part of the batch: images as stored [n, C, H, W], or the indices [n] of cached features.
        Where ranks share a part, and encode it for each other, the images that this one encodes.
    labels: [images], of the whole batch, or None for a layer without labels.
    images: number of images of the batch, on all ranks.

    >>> Staged(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), labels=None, images=5).images
    5
    """

    source: Tensor
    labels: Tensor | None
    images: int


class LayerInputs:
    """This rank's part of every batch, as patches for one layer: from images, cached features, or newly encoded images.

    A rank reads and prepares only the images of its part (`simmatch.sharding.columns`). `staged` brings them to the
    device, one batch ahead of their use, and `prepare` computes patches from them there.
    `prepare` starts work on the device only, except with `below`, so it may be part of a CUDA graph.

    Parameters
    ----------
    layer: the layer that learns, calibrated.
    store: the images, or the output of the layer below.
    size: (H, W) of the layer's input.
    positions: number of positions per image, drawn anew for every update; None: all.
    below: function from images to the input of the layer, called for every batch. None: all features are cached.
    on_progress: called with the number of images cached so far.
    labels: [N], on the host, for a layer that learns from them.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> images = torch.rand(10, 1, 8, 8)
    >>> store = FeatureStore(images, IDENTITY, batch=4, dtype=torch.float32, device=torch.device("cpu"))
    >>> layer = SimilarityMatchingConv2d(1, 4, kernel_size=3)
    >>> inputs = LayerInputs(layer, store, size=(8, 8), positions=5, below=None, on_progress=print)
    >>> batches = Batches(10, batch_size=3, epochs=1, seed=0)
    >>> [inputs.prepare(batch).matrix.shape for batch in inputs.staged(batches, first=2)]
    [torch.Size([15, 9]), torch.Size([5, 9])]
    """

    def __init__(
        self,
        layer: SimilarityMatchingConv2d,
        store: FeatureStore,
        *,
        size: tuple[int, int],
        positions: int | None,
        below: Callable[[Tensor], Tensor] | None,
        on_progress: Callable[[int], None],
        labels: Tensor | None = None,
    ) -> None:
        self._layer, self._store, self._positions, self._below = layer, store, positions, below
        self._columns = positions or math.prod(layer.patch.map_size(size))
        self._labels = None if labels is None else labels.cpu()
        self._cache = self._fill(on_progress) if store.depth > 0 and below is None else None

    def _fill(self, on_progress: Callable[[int], None]) -> Tensor:
        """The input of the layer for all images, on this rank: patches if the layer is dense, else maps."""
        cache = torch.empty(0)
        done = 0

        def dense(x: Tensor) -> Tensor:
            patches = self._layer.prepare(x)
            return x if patches.matrix is None else patches.matrix

        for index, part in enumerate(self._store.gathered(dense)):
            if index == 0:
                cache = part.new_empty(self._store.count, *part.shape[1:])
            cache[done : done + len(part)] = part
            done += len(part)
            if part.ndim == 4:
                self._store.share(index, cache)
            on_progress(done)
        return cache

    def staged(self, batches: Batches, first: int = 0) -> Generator[Staged]:
        """The batches on the device, from number `first` on."""

        def selected() -> Iterator[Tensors]:
            for number in range(first, len(batches)):
                chosen = batches[number]
                labels = () if self._labels is None else (self._labels.index_select(0, chosen),)
                yield self._source(chosen), *labels

        number = first
        with closing(self._store.staged(selected())) as parts:
            for source, *labels in parts:
                yield Staged(source, labels[0] if labels else None, batches.size(number))
                number += 1

    def _part(self, images: int) -> Part:
        """This rank's part of a batch."""
        return self._layer.sharing.part(images, self._columns)

    def _source(self, chosen: Tensor) -> Tensor:
        """What of the images with these indices [n] has to be brought to the device."""
        own = chosen[self._part(len(chosen)).images]
        if self._cache is not None:
            return own
        return self._store.stored(own if self._below is None else own[own_part(len(own), self._layer.sharing.shares)])

    def prepare(self, batch: Staged) -> Patches:
        """Patches of this rank's part of a batch; at positions drawn for the layer's next update, if configured."""
        part = self._part(batch.images)
        if self._cache is not None:
            features = self._cache.index_select(0, batch.source)
            if features.ndim == 2:
                return replace(self._layer.explicit_patches(features), part=part)
            return self._layer.prepare(features, self._positions, part=part)
        x = self._store.unit(batch.source)
        if self._below is not None:
            below = by_blocks(self._below, x, self._layer.sharing.block(part.whole, self._columns))
            x = gather_images(below, part.count, self._layer.sharing.shares)
        return self._layer.prepare(x, self._positions, part=part)
