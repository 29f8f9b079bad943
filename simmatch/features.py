"""Encoded images at some depth of a stack, and the batches of patches from which a layer learns.

Images are encoded independently of each other. So a trained layer is complete on every rank, and images, not channels,
are split over the ranks. Encoded images are exchanged only if a layer or a readout needs all of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, TypeVar

import torch
from torch import Tensor

from simmatch.chunks import Chunks
from simmatch.data.feature_cache import FeatureCache, program
from simmatch.data.order import Batches
from simmatch.data.sources import to_unit
from simmatch.data.staging import Images, Tensors, in_memory, select, staged
from simmatch.devices import arithmetic
from simmatch.geometry import Patches
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.blocks import by_blocks
from simmatch.sharding.columns import Part
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.state import gather_from_ranks, gather_padded

Result = TypeVar("Result")

Encode = Callable[[Tensor, slice], tuple[Tensor, Tensor]]

RESIDENT_BYTES = 2**30
"""Largest input of a layer that is kept on a GPU while the layer learns."""


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
        blocks = (self.block(number) for number in self.own)
        return self._values([slice(each.start, min(each.stop, count)) for each in blocks if each.start < count])

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


@dataclass(frozen=True)
class Staged:
    """One batch on the device, before anything is computed from it.

    Attributes
    ----------
    source: of this rank's part of the batch: images as stored or their features [n, C, H, W], patches [n, P], or the
        indices [n] of features that the device holds. Where ranks share a part, and encode it for each other, the
        images that this one encodes.
    labels: [images], of the whole batch, or None for a layer without labels.
    images: number of images of the batch, on all ranks.

    >>> Staged(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), labels=None, images=5).images
    5
    """

    source: Tensor
    labels: Tensor | None
    images: int


class LayerInputs:
    """This rank's part of every batch, as patches for one layer: from images, stored features, or newly encoded images.

    A rank reads and prepares only the images of its part (`simmatch.sharding.columns`). `staged` brings them to the
    device, one batch ahead of their use, and `prepare` computes patches from them there.
    `prepare` starts work on the device only, except with `below`, so it may be part of a CUDA graph.

    Parameters
    ----------
    layer: the layer that learns, calibrated.
    store: the images, or the output of the layer below.
    size: (H, W) of the layer's input.
    positions: number of positions per image, drawn anew for every update; None: all.
    below: function from images to the input of the layer, called for every batch. None: the store's features.
    on_progress: called with the number of images whose features this rank can read.
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
        self._rows = self._fill(on_progress) if store.features is not None and below is None else None
        self._resident: Tensor | None = None
        device = layer.feedforward.device
        if self._rows is not None and device.type == "cuda" and self._rows.row_bytes * store.count <= RESIDENT_BYTES:
            self._resident = self._rows.whole(device)

    def _fill(self, on_progress: Callable[[int], None]) -> Chunks:
        """The input of the layer for all images, for this rank to read: patches if the layer is dense, else maps."""
        store, layer = self._store, self._layer
        assert store.features is not None
        _, height, width = store.features.shape
        if layer.patch.padding > 0 or (height, width) != (layer.patch.kernel_size,) * 2:  # not dense
            store.share(store.features, on_progress)
            return store.features
        half = -(-store.count // 2)

        def dense(x: Tensor, _: slice) -> tuple[Tensor, Tensor]:
            matrix = layer.prepare(x).matrix
            assert matrix is not None
            return matrix, x.new_empty(0)

        patches = store.encoded(
            dense,
            (layer.patch.patch_size,),
            lambda done: on_progress(done // 2),
            by=("patches", layer.patch, *([layer.whitening, layer.whitening_mean] if layer.whiten else [])),
        )
        store.share(patches, lambda done: on_progress(half + done // 2))
        return patches

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
        if self._resident is not None:
            return own
        if self._rows is not None:
            return self._rows[own]
        return self._store.stored(own if self._below is None else own[own_part(len(own), self._layer.sharing.shares)])

    def prepare(self, batch: Staged) -> Patches:
        """Patches of this rank's part of a batch; at positions drawn for the layer's next update, if configured."""
        part = self._part(batch.images)
        x = batch.source if self._resident is None else self._resident.index_select(0, batch.source)
        if x.ndim == 2:
            return replace(self._layer.explicit_patches(x), part=part)
        x = self._store.unit(x)
        if self._below is not None:
            below = by_blocks(self._below, x, self._layer.sharing.block(part.whole, self._columns))
            x = gather_images(below, part.count, self._layer.sharing.shares)
        return self._layer.prepare(x, self._positions, part=part)
