"""The batches of patches from which a layer learns: from images, stored features, or images encoded for every batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace

from torch import Tensor

from simmatch.chunks import Chunks
from simmatch.data.order import Batches
from simmatch.data.staging import Tensors
from simmatch.features import FeatureStore
from simmatch.geometry import Patches
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.blocks import by_blocks
from simmatch.sharding.columns import Part
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.state import gather_padded

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
    weights: [images], of the whole batch, as for `partial_fit`, or None.

    >>> Staged(torch.zeros(5, 1, 8, 8, dtype=torch.uint8), labels=None, images=5).images
    5
    """

    source: Tensor
    labels: Tensor | None
    images: int
    weights: Tensor | None = None


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
        self._labels = labels
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
        if any(layer.patch.convolution.margins) or (height, width) != layer.patch.kernel:  # not dense
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
