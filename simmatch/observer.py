"""Observers of a trainer (`simmatch.fit`): they restore layers, follow every update, and may end the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from simmatch.chunks import Chunks
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.measurement import Measurement
from simmatch.sharding.exchange import Exchange

Phase = Literal["calibrate", "cache", "encode"]
"""Phases other than learning: measuring the input of a layer, caching its encoded input, encoding with the layer."""


@dataclass(frozen=True, eq=False)
class Update:
    """A completed update of a layer.

    Attributes
    ----------
    index: index of the layer in the stack.
    layer: the layer, with the rows held by this rank.
    number: number of the update, counted from 1.
    total: number of updates of the layer.
    images: number of images in the batch.
    measurement: metrics of the update, or None if it was not measured.
    looked: whether faults up to this update have been raised. False where they are recorded on the device, and the host
        has not looked: anything that is read from the layer waits for the device, and `layer.raise_faults()` must come
        before anything is kept.

    >>> layer = SimilarityMatchingConv2d(1, 8, kernel_size=3)
    >>> Update(index=0, layer=layer, number=1, total=60, images=100, measurement=None).images
    100
    """

    index: int
    layer: SimilarityMatchingConv2d
    number: int
    total: int
    images: int
    measurement: Measurement | None
    looked: bool = True


@dataclass(frozen=True, eq=False)
class Pass:
    """A completed update of a pass in which all layers learn together.

    Attributes
    ----------
    number: number of the update of the pass, counted from 1; a layer that began later has made fewer.
    total: number of updates of the pass.
    layers: by their index, those that this rank holds, with its rows; also such as have not begun.
    images: number of images in the batch.
    stop: whether learning stops here, see `Observer.stop_after`.

    >>> Pass(number=7, total=60, layers={}, images=100, stop=False).number
    7
    """

    number: int
    total: int
    layers: Mapping[int, SimilarityMatchingConv2d]
    images: int
    stop: bool


class Observer:
    """Base class of observers. Its methods do nothing; an exception raised by a method ends the training.

    With several ranks every rank has its own observer. If observers exchange data, all must make the same exchanges.

    >>> class Log(Observer):
    ...     def updated(self, update):
    ...         print(f"update {update.number} of {update.total}")
    >>> Log().updated(Update(0, SimilarityMatchingConv2d(1, 8, kernel_size=3), 1, 60, 100, None))
    update 1 of 60
    """

    def restore(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        """Called with a new layer. To continue an earlier run, fill the buffers of the layer, `updates` included."""

    def started(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        """Called with a calibrated layer before its first update, or the first update after those restored."""

    def updating(self, index: int, layer: SimilarityMatchingConv2d) -> AbstractContextManager[None]:
        """Return a context in which the next update runs, including the preparation of its batch."""
        return nullcontext()

    def updated(self, update: Update) -> None:
        """Called after every update."""

    def encoding(self, index: int, layer: SimilarityMatchingConv2d) -> AbstractContextManager[None]:
        """Return a context in which the layer encodes a batch for the layer above (`schedule: together`)."""
        return nullcontext()

    def stop_after(self, number: int) -> bool:
        """Called before every update of a pass (`schedule: together`) by the ranks of the first stage: whether learning
        stops with it. All of them give the same answer, which reaches the other stages with the batch."""
        return False

    def passed(self, done: Pass) -> None:
        """Called after every update of a pass, when all layers of this rank have made theirs."""

    def learnt(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        """Called after the last update of a layer and before it encodes; `layer` has all rows."""

    def encoded(self, index: int, activities: Tensor, passed: Tensor) -> None:
        """Called with activities [B, K, H, W] and output of a layer for images that this rank encodes."""

    def keeps(self, index: int) -> bool:
        """Whether `advanced` reads the output of a layer. That of the last layer is not kept otherwise: it may be far
        more than the images, and no layer learns from it."""
        return False

    def advanced(self, index: int, features: Chunks) -> None:
        """Called with the output of a layer for all images, of which this rank can read its own blocks; of the last
        layer the values are left out, [N, 0], unless the observer `keeps` it.

        `features.found` of them were in the cache: they have not been encoded again.
        """

    def progress(self, phase: Phase, done: int, total: int, layer: int, images_per_second: float | None = None) -> None:
        """Called with the progress of a phase: `done` of `total` images, or of 1; and the rate of encoding."""

    def on_one_rank(self, work: Callable[[], None] | None, ranks: Exchange | None = None) -> None:
        """Run the work of the first of some ranks, None: of all ranks, while the others, whose `work` is None, wait."""
        if work is not None:
            work()
