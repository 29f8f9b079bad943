"""Who follows a trainer (`simmatch.fit`): restores layers, sees every update, and may end the training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from simmatch.layer import SimilarityMatchingConv2d
from simmatch.measurement import Measurement

Phase = Literal["calibrate", "cache", "encode"]
"""Work on a layer other than learning: measuring its input, keeping its encoded input, encoding with it."""


@dataclass(frozen=True, eq=False)
class Update:
    """One update of a layer, done.

    Attributes
    ----------
    index, layer: which layer, and this rank's rows of it.
    number, total: of the layer's updates, the first being 1.
    images: in the batch.
    measurement: what was measured; None where it was not this update's turn.
    """

    index: int
    layer: SimilarityMatchingConv2d
    number: int
    total: int
    images: int
    measurement: Measurement | None


class Observer:
    """Follows a trainer. Every method does nothing unless overridden; an exception raised here ends the training.

    On several ranks each has an observer of its own, and all must make the same exchanges, if any.
    """

    def restore(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        """A layer is made. Filling its buffers continues an earlier run after its `layer.updates`."""

    def started(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        """A layer, calibrated, is about to make its first update, or the first after those restored."""

    def updating(self, index: int, layer: SimilarityMatchingConv2d) -> AbstractContextManager[None]:
        """Surrounds every update, from the making of the batch on."""
        return nullcontext()

    def updated(self, update: Update) -> None:
        """After every update."""

    def learnt(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        """All updates of a layer are done, and `layer`, with all rows, is about to encode."""

    def encoded(self, index: int, activities: Tensor, passed: Tensor) -> None:
        """Some images went through a layer: its activities [B, K, H, W], and what it passes on. Shares of all ranks."""

    def progress(self, phase: Phase, done: int, total: int, layer: int, images_per_second: float | None = None) -> None:
        """How far a phase other than learning is, in images, or 0 or 1 of 1; the rate where images are encoded."""

    def on_one_rank(self, work: Callable[[], None] | None) -> None:
        """Do the work of rank 0 while the other ranks, whose `work` is None, wait."""
        if work is not None:
            work()
