"""What a rank reports to the controller while it works: one frozen class for each kind of message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from cluster.checkpoints.manifest import Cursor, LayerState, Shard

Phase = Literal["calibrate", "cache", "learn", "encode", "readout"]


@dataclass(frozen=True)
class LayerMetrics:
    """Metrics of one layer after an update; all ranks know the same, but for the times, which are each rank's own.

    Attributes
    ----------
    update: updates of the layer so far; the step in MLflow.
    images: images that the run has learned from so far.
    objective: relative similarity-matching objective on some of the batch's columns.
    residual, num_iters: of the slowest column of the batch.
    active_fraction: share of activities above zero.
    dead_channels, revived_channels: see `SimilarityMatchingConv2d`.
    images_per_second, window_s: throughput since the metrics before, and how long ago they were.
    waiting_share, checkpoint_share: shares of that time spent waiting for other ranks, and on checkpoints.
    bytes_exchanged, num_exchanges: of all ranks since this group started.
    """

    layer: int
    update: int
    images: int
    objective: float
    residual: float
    num_iters: float
    active_fraction: float
    dead_channels: float
    revived_channels: float
    images_per_second: float
    window_s: float
    waiting_share: float
    checkpoint_share: float
    bytes_exchanged: float
    num_exchanges: float

    def values(self) -> dict[str, float]:
        """Name → value, as the spool and MLflow keep them."""
        return {name: value for name, value in vars(self).items() if name not in ("layer", "update", "images")}


@dataclass(frozen=True)
class Progress:
    """How far the present phase is; only the latest of a phase counts.

    Attributes
    ----------
    done, total: of the phase, in its own units: updates or images.
    step: updates of the run so far, while it learns.
    images_per_second: of a phase that has no metrics.
    """

    phase: Phase
    done: int
    total: int
    layer: int | None = None
    step: int | None = None
    images_per_second: float | None = None
    metrics: LayerMetrics | None = None


@dataclass(frozen=True)
class ShardWritten:
    """This rank's part of a checkpoint is in the run directory; `layers` goes into the manifest."""

    cursor: Cursor
    shard: Shard
    layers: list[LayerState]


@dataclass(frozen=True)
class ShardFailed:
    """This rank's part of the checkpoint of `step` could not be written; training goes on."""

    step: int
    reason: str


@dataclass(frozen=True)
class Traceback:
    """Where an error was raised on this rank."""

    text: str


@dataclass(frozen=True)
class TrainingWarning:
    """Something to show to a person."""

    text: str


@dataclass(frozen=True)
class ModelExported:
    """The model is written to this folder of the run directory, and not yet published."""

    folder: str


@dataclass(frozen=True)
class ReadoutScored:
    """Accuracies on the test images; None for a readout that could not be made.

    Attributes
    ----------
    readout: the one fitted on `train_images` images, whose accuracy is `accuracy`.
    accuracy_decode: of the label weights of a supervised last layer.
    """

    readout: str
    train_images: int
    accuracy: float | None = None
    accuracy_decode: float | None = None


OfOneRank = ShardWritten | ShardFailed | Traceback
"""Messages that concern the rank that sends them."""

OfTheRun = LayerMetrics | TrainingWarning | ModelExported | ReadoutScored
"""Messages that every rank may send; the controller takes rank 0's."""

Message = OfOneRank | OfTheRun


class Reporter(Protocol):
    """A rank's way to the controller; nothing here waits."""

    stopping: bool
    """Whether the controller has asked this rank to stop at a step that all ranks agree on."""

    def beat(self) -> None:
        """A sign of life, for steps that have nothing to report."""

    def progress(self, progress: Progress) -> None:
        """How far the present phase is."""

    def send(self, message: Message) -> None:
        """Every message reaches the controller once, in order."""
