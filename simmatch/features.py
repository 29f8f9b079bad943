"""Encoded images at some depth of a stack, and the batches of patches from which a layer learns.

Images are encoded independently of each other. So a trained layer is complete on every rank, and images, not channels,
are split over the ranks. Encoded images are exchanged only if a layer or a readout needs all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from simmatch.data.sources import to_unit
from simmatch.geometry import Patches, draw_positions
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.seeding import folded, stream
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.state import gather_padded


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

    All ranks have all images. Of the features every rank keeps its share of each chunk.

    Parameters
    ----------
    images: [N, C, H, W], uint8 or floating-point in [0, 1].
    exchange: connects to the other ranks.
    batch: number of images that a rank encodes at a time.
    dtype, device: of the images and features that the store returns.

    Attributes
    ----------
    chunks: ranges of images that all ranks encode together at a time.
    depth: number of layers that have encoded the images.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> images = torch.rand(10, 1, 8, 8)
    >>> store = FeatureStore(images, IDENTITY, batch=4, dtype=torch.float32, device=torch.device("cpu"))
    >>> store.advance(lambda x, part: x.mean(dim=(2, 3)), on_progress=print)
    4
    8
    10
    >>> store.depth, store.first(3).shape
    (1, torch.Size([3, 1]))
    """

    def __init__(
        self, images: Tensor, exchange: Exchange, *, batch: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.count, self.exchange, self.depth = len(images), exchange, 0
        chunk = batch * exchange.world_size
        self.chunks = [slice(start, min(start + chunk, self.count)) for start in range(0, self.count, chunk)]
        self._images, self._dtype, self._device = images, dtype, device
        self._own: list[Tensor] = []

    def images(self, chosen: Tensor | slice) -> Tensor:
        """Images [n, C, H, W] in [0, 1], whatever the depth of the store."""
        return to_unit(self._images[chosen], self._dtype).to(self._device)

    def own(self, index: int) -> Tensor:
        """This rank's share of the features of chunk `index`."""
        return self.images(self._part(self.chunks[index])) if self.depth == 0 else self._own[index]

    def _part(self, chunk: slice) -> slice:
        """The images of a chunk that this rank encodes."""
        part = own_part(chunk.stop - chunk.start, self.exchange)
        return slice(chunk.start + part.start, chunk.start + part.stop)

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
        for index, chunk in enumerate(self.chunks):
            encoded.append(encode(self.own(index), self._part(chunk)))
            on_progress(chunk.stop)
        self._own, self.depth = encoded, self.depth + 1

    def gathered(self, encode: Callable[[Tensor], Tensor] | None = None) -> Iterator[Tensor]:
        """The chunks in order, complete on every rank. `encode`, if given, is applied to each rank's share first."""
        parts = (self.own(index) for index in range(len(self.chunks)))
        return self.gather_parts(parts if encode is None else map(encode, parts))

    def gather_parts(self, own: Iterable[Tensor]) -> Iterator[Tensor]:
        """Like `gathered`, for other tensors [share, …] computed by this rank, one per chunk."""
        for part, chunk in zip(own, self.chunks, strict=True):
            yield gather_images(part, chunk.stop - chunk.start, self.exchange)

    def first(self, count: int) -> Tensor:
        """Features of the first `count` images, on every rank."""
        return first_rows(self.gathered(), count)


def first_rows(parts: Iterable[Tensor], count: int) -> Tensor:
    """The first `count` rows of concatenated tensors [n, …]; no more tensors are requested than necessary.

    >>> first_rows(iter([torch.zeros(4, 2), torch.zeros(4, 2), torch.zeros(4, 2)]), 6).shape
    torch.Size([6, 2])
    """
    selected, rows = [], 0
    for part in parts:
        selected.append(part)
        rows += len(part)
        if rows >= count:
            break
    return torch.cat(selected)[:count]


class LayerInputs:
    """Batches of patches for one layer, equal on every rank: from images, cached features, or newly encoded images.

    Parameters
    ----------
    layer: the layer that learns, calibrated.
    store: the images, or the output of the layer below.
    positions: number of positions per image, drawn anew for every update; None: all.
    below: function from images to the input of the layer, called for every batch. None: all features are cached.
    on_progress: called with the number of images cached so far.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> images = torch.rand(10, 1, 8, 8)
    >>> store = FeatureStore(images, IDENTITY, batch=4, dtype=torch.float32, device=torch.device("cpu"))
    >>> layer = SimilarityMatchingConv2d(1, 4, kernel_size=3)
    >>> inputs = LayerInputs(layer, store, positions=5, below=None, on_progress=print)
    >>> inputs.batch(torch.tensor([0, 3, 7])).matrix.shape
    torch.Size([15, 9])
    """

    def __init__(
        self,
        layer: SimilarityMatchingConv2d,
        store: FeatureStore,
        *,
        positions: int | None,
        below: Callable[[Tensor], Tensor] | None,
        on_progress: Callable[[int], None],
    ) -> None:
        self._layer, self._store, self._positions, self._below = layer, store, positions, below
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

    def batch(self, chosen: Tensor) -> Patches:
        """Patches of the images with these indices [n], equal on every rank; at drawn positions, if configured."""
        if self._cache is not None:
            features = self._cache[chosen.to(self._cache.device)]
            return self._layer.explicit_patches(features) if features.ndim == 2 else self._prepare(features)
        if self._below is None:
            return self._prepare(self._store.images(chosen))
        exchange = self._store.exchange
        own = self._store.images(chosen[own_part(len(chosen), exchange)])
        return self._prepare(gather_images(self._below(own), len(chosen), exchange))

    def _prepare(self, x: Tensor) -> Patches:
        return self._layer.prepare(x) if self._positions is None else self._layer.prepare(x, self._draw(x))

    def _draw(self, x: Tensor) -> Tensor:
        """Positions depend only on the seed and the number of updates of the layer, not on the number of ranks."""
        assert self._positions is not None
        map_size = self._layer.patch.map_size((x.shape[2], x.shape[3]))
        key = folded(stream("positions", self._layer.seed), self._layer.updates)
        return draw_positions(self._positions, len(x), map_size, key, x.device)
