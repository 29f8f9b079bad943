"""Messages between the ranks, the controller and the display: one frozen class for each kind.

A rank describes itself once (`RankInfo`), then sends a `Message` for whatever has to be kept; its answer to a poll
(`RankStatus`) carries them with its `Progress`. The controller shows `Progress` and a `Note`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from cluster.checkpoints.manifest import Constant, Cursor, LayerState, Shard
from cluster.layout import RankInfo, layout_lines
from cluster.policy import Failure
from simmatch.parts import PartTime

Phase = Literal["calibrate", "cache", "learn", "encode", "readout"]


@dataclass(frozen=True)
class LayerMetrics:
    """Metrics of one layer after an update; all ranks of a stage know the same, but for times and traffic.

    The first rank of the stage sends its own.

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
    bytes_exchanged, num_exchanges: of all ranks of the stage, as its first rank counts them, since this group started;
        the bytes are those that it received, times the ranks.
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
    metrics: the latest of the layers that learn.
    """

    phase: Phase
    done: int
    total: int
    layer: int | None = None
    step: int | None = None
    images_per_second: float | None = None
    metrics: tuple[LayerMetrics, ...] = ()


@dataclass(frozen=True)
class ShardWritten:
    """This rank's part of a checkpoint is in the run directory; `layers`, by index, and `constants` go into the
    manifest."""

    cursor: Cursor
    shard: Shard
    layers: dict[int, LayerState]
    constants: list[Constant] = field(default_factory=list)


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
class LayerWarning:
    """Something to show to a person about a layer, which the text names."""

    text: str


@dataclass(frozen=True)
class NodeWarning:
    """Something to show to a person about this rank's node, which the text names; its other ranks may send the same."""

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
    subset: which of the training images these are; empty for all.
    """

    readout: str
    train_images: int
    accuracy: float | None = None
    accuracy_decode: float | None = None
    subset: str = ""


@dataclass(frozen=True)
class LayerProfiled:
    """Where this rank's time went in some updates of a layer, see `simmatch.profile`.

    Attributes
    ----------
    first, updates: number of the first recorded update of the layer, and how many were recorded; none if 0.
    parts: name of a part → its time in all these updates.
    kernels: (name, calls, seconds) of the longest kernels on the device.
    file: name of the trace in the run's folder of profiles; empty if there is none.
    problem: why there is none.
    """

    layer: int
    first: int
    updates: int
    parts: dict[str, PartTime]
    kernels: list[tuple[str, int, float]]
    file: str = ""
    problem: str = ""


@dataclass(frozen=True)
class FeaturesFound:
    """Images whose output of a layer was in the caches of the nodes.

    Attributes
    ----------
    found: number of these images, of all ranks.
    images: number of all images.
    """

    layer: int
    found: int
    images: int

    def __str__(self) -> str:
        of_all = "" if self.found == self.images else f" of {self.images:,}"
        return f"layer {self.layer}: {self.found:,}{of_all} encoded images found, not encoded again"


OfOneRank = ShardWritten | ShardFailed | Traceback | LayerProfiled | NodeWarning
"""Messages about the rank that sends them."""
OfAStage = LayerMetrics | LayerWarning
"""Messages that all ranks of a stage would send alike: its first rank sends them."""
OfTheRun = FeaturesFound | TrainingWarning | ModelExported | ReadoutScored
"""Messages that all ranks would send alike: rank 0 sends them."""
Message = OfOneRank | OfAStage | OfTheRun


@dataclass(frozen=True)
class RankStatus:
    """A rank's answer to a poll.

    Attributes
    ----------
    phases: of rank 0 the latest progress of each phase so far, in order; of other ranks that of the present phase.
    messages: those sent since the poll before.
    exchanges: connection → exchanges started, on a GPU those that the device has come to; the others of a connection
        wait for the rank that has started the fewest. Connections by their names, "" for that of all ranks.
    usage: of the node, if this rank samples it and has a new sample, see `cluster.node_usage`.
    stopped: it is done because it was asked to stop, and its shard is written.
    terminated: its process has got SIGTERM, and goes on until its group ends.
    idle_s: since a poll last found that its training thread or its GPU had moved: started or ended an exchange, sent a
        message or reported progress. A rank that waits in an exchange is idle as well; see `cluster.failures.stalled`.
    """

    rank: int
    done: bool
    failure: Failure | None
    phases: list[Progress]
    messages: list[Message]
    exchanges: dict[str, int]
    usage: dict[str, float] | None = None
    stopped: bool = False
    terminated: bool = False
    idle_s: float = 0.0

    @property
    def progress(self) -> Progress | None:
        """Of the present phase; None before the first."""
        return self.phases[-1] if self.phases else None


@dataclass(frozen=True)
class StartingPoint:
    """The next group starts from the checkpoint of `step`, or from the beginning (0); `text` says why."""

    step: int
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class GroupStarted:
    """All ranks of a group have met and begin to train."""

    ranks: tuple[RankInfo, ...]

    def __str__(self) -> str:
        return "ranks: " + "\n       ".join(layout_lines(self.ranks))


Note = str | StartingPoint | GroupStarted
"""Something to show to a person, who reads `str(note)`; a program that watches a job reads the fields."""


class Display(Protocol):
    """Where progress and notes are shown."""

    def progress(self, latest: Progress) -> None:
        """How far the present phase is; the same may come again and again."""

    def note(self, note: Note) -> None:
        """Something to read."""


@dataclass
class Outbox:
    """A rank's messages to the controller: filled by the training thread, read by polls. Nothing here waits.

    Attributes
    ----------
    rank: of the sender. What all ranks would send alike is kept on rank 0 only.
    leads: whether this is the first rank of its stage, which sends what all of them would send alike.
    messages: sent so far, without those that the controller has; each reaches it once, in order.
    arrived: number of those that it has.
    phases: the latest progress of every phase so far; on other ranks than 0 of the present phase, without metrics.
    stopping: whether the controller has asked this rank to stop at a step that all ranks agree on.
    beats: signs of life so far.
    """

    rank: int = 0
    leads: bool = False
    messages: list[Message] = field(default_factory=list)
    arrived: int = 0
    phases: list[Progress] = field(default_factory=list)
    stopping: bool = False
    beats: int = 0

    def beat(self) -> None:
        """A sign of life, for steps that have nothing to report."""
        self.beats += 1

    def progress(self, progress: Progress) -> None:
        """How far the present phase is."""
        self.beat()
        if self.rank > 0:
            self.phases[:] = [replace(progress, metrics=())]
        elif self.phases and (self.phases[-1].layer, self.phases[-1].phase) == (progress.layer, progress.phase):
            self.phases[-1] = progress
        else:
            self.phases.append(progress)

    @property
    def sent(self) -> int:
        """Number of messages so far."""
        return self.arrived + len(self.messages)

    def since(self, first: int) -> list[Message]:
        """Messages from number `first` on; those before have arrived, and are not kept."""
        del self.messages[: max(0, first - self.arrived)]
        self.arrived = max(first, self.arrived)
        return list(self.messages)

    def send(self, message: Message) -> None:
        """Send a message that has to be kept."""
        if self.rank == 0 or isinstance(message, OfOneRank) or (self.leads and isinstance(message, OfAStage)):
            self.messages.append(message)
