"""Images at some depth of a stack, and the batches of patches that a layer learns from.

Encoding couples nothing, so images are split over the ranks, not channels: a finished layer is whole on every rank.
What is exchanged is the result, where a layer or a readout needs all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from simmatch.data.sources import to_unit
from simmatch.geometry import Patches, draw_positions
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.seeding import seeded
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
    """A set of images at some depth of the stack: the images themselves, then what layer 0, 1, … passes on.

    All ranks reach the images; of the features each keeps its share of every chunk.

    Parameters
    ----------
    images: [N, C, H, W], uint8 or floating-point in [0, 1].
    batch: images per rank and step of encoding.
    dtype, device: of what is given out.

    Attributes
    ----------
    chunks: images that are encoded at a time, by all ranks together.
    depth: layers that the images have passed.
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
        """The images themselves, [n, C, H, W] in [0, 1]."""
        return to_unit(self._images[chosen], self._dtype).to(self._device)

    def own(self, index: int) -> Tensor:
        """This rank's share of chunk `index`."""
        return self.images(self._part(self.chunks[index])) if self.depth == 0 else self._own[index]

    def _part(self, chunk: slice) -> slice:
        """The images of a chunk that are this rank's."""
        part = own_part(chunk.stop - chunk.start, self.exchange)
        return slice(chunk.start + part.start, chunk.start + part.stop)

    def share(self, index: int, whole: Tensor) -> None:
        """Take this rank's share of chunk `index` from the features of all images [N, …], and keep no copy of it."""
        self._own[index] = whole[self._part(self.chunks[index])]

    def advance(self, encode: Callable[[Tensor, slice], Tensor], on_progress: Callable[[int], None]) -> None:
        """Replace every chunk x by encode(x, which images it holds); `on_progress(n)` after n images of all ranks."""
        encoded = []
        for index, chunk in enumerate(self.chunks):
            encoded.append(encode(self.own(index), self._part(chunk)))
            on_progress(chunk.stop)
        self._own, self.depth = encoded, self.depth + 1

    def gathered(self, encode: Callable[[Tensor], Tensor] | None = None) -> Iterator[Tensor]:
        """Chunks in order, whole on every rank; each rank's share goes through `encode` first."""
        parts = (self.own(index) for index in range(len(self.chunks)))
        return self.gather_parts(parts if encode is None else map(encode, parts))

    def gather_parts(self, own: Iterable[Tensor]) -> Iterator[Tensor]:
        """Like `gathered`, for tensors [share, …] computed beside the features, one a chunk."""
        for part, chunk in zip(own, self.chunks, strict=True):
            yield gather_images(part, chunk.stop - chunk.start, self.exchange)

    def first(self, count: int) -> Tensor:
        """The first `count` images' features, on every rank."""
        return first_rows(self.gathered(), count)


def first_rows(parts: Iterable[Tensor], count: int) -> Tensor:
    """The first `count` rows of tensors [n, …], one after the other; takes no more of them than that needs."""
    taken, rows = [], 0
    for part in parts:
        taken.append(part)
        rows += len(part)
        if rows >= count:
            break
    return torch.cat(taken)[:count]


class LayerInputs:
    """Batches of patches for one layer, the same on every rank: of images, of cached features, or encoded each time.

    Parameters
    ----------
    layer: the layer that learns, calibrated.
    store: images, or what the layer below passes on.
    positions: drawn anew for every update, see `simmatch.config.TrainConfig`; None: all.
    below: images → input of the layer, for features that are not cached; None: all features are cached.
    on_progress: called with the images cached so far.
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
        """All images' input of this layer on this rank: whole patches where the layer is dense, else maps."""
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
        """Patches of the images with these indices, the same on every rank; of drawn positions, if so configured."""
        if self._cache is not None:
            features = self._cache[chosen.to(self._cache.device)]
            return self._layer.explicit_patches(features) if features.ndim == 2 else self._prepare(features)
        if self._below is None:
            return self._prepare(self._store.images(chosen))
        exchange = self._store.exchange
        own = self._store.images(chosen[own_part(len(chosen), exchange)])
        return self._prepare(gather_images(self._below(own), len(chosen), exchange))

    def _prepare(self, x: Tensor) -> Patches:
        """Positions are drawn as a pure function of the layer's seed and update, whatever the number of ranks."""
        if self._positions is None:
            return self._layer.prepare(x)
        map_size = self._layer.patch.map_size((x.shape[2], x.shape[3]))
        generator = seeded("positions", self._layer.seed, int(self._layer.updates))
        return self._layer.prepare(x, draw_positions(self._positions, len(x), map_size, generator))
