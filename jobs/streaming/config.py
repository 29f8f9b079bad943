"""Configuration of a stream: what is read, how it is cut, what learns from it, and what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from cluster.config import GroupConfig, Name
from cluster.mesh import MeshConfig
from cluster.tracking.config import TrackingConfig
from jobs.options import override
from jobs.streaming.answers_config import AnswersConfig
from jobs.streaming.events import EventsConfig
from jobs.streaming.page import PageConfig, ReportConfig
from jobs.streaming.sources import SourceConfig
from simmatch.config import (
    ConfigError,
    Frozen,
    ModelConfig,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Reduce,
    parse,
)
from simmatch.config import PositiveInt as Count
from simmatch.data.config import SignalKeys
from simmatch.data.windows import WindowShape
from simmatch.model import InputConfig, layer_inputs
from simmatch.online.arguments import streaming
from simmatch.online.comparison import ComparisonConfig
from simmatch.online.drift import DriftConfig
from simmatch.online.novelty import NoveltyConfig
from simmatch.online.rate import RateConfig
from simmatch.online.readout import ReadoutConfig

OF_CANDIDATES = ("model", "rate", "readout", "novelty", "drift")
"""Sections that a candidate may override: the others are common to all."""

OF_RECORDINGS = ("columns", "time_column", "label_pattern", "split", "turn")
"""Keys of signals that mean nothing for a stream: its source names columns, and where the time and the label are."""

FREE = ("source", "max_wait_s", "journal", "snapshot", "answers", "events", "page", "report", "tracking", "cluster")
"""Keys that may differ between a stream and its continuation: nothing that is learnt follows from them, but by way of
the journal."""


class StreamDataConfig(SignalKeys):
    """How records become windows, and which classes their labels name.

    A record is an image, one sample of a signal, a block of samples, or a whole window. Samples are cut as
    `jobs.pretrain` cuts recordings, group by group.
    """

    missing: Literal["cut", "hold"] = "cut"
    """What to do where a channel has no finite value, see `SignalKeys`; a stream does not end there."""

    classes: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Classes known from the start, in this order; others come after them, in the order in which they appear."""

    new_classes: Literal["allow", "set_aside"] = "allow"
    """A label that is none of the classes so far: a new class, or a fault of the record, which is set aside."""

    most_classes: Count = 1000
    """With `allow`: labels that would be more classes are faults of their records, such as a number for each record."""

    most_groups: Count = 1000
    """Groups that are cut into windows; records of more are set aside."""

    calibrate: Count = 500
    """Windows from which the statistics of patches are measured, before anything is learnt; until then there are no
    scores. Then they are learnt from, as all others."""

    @model_validator(mode="after")
    def _of_streams(self) -> StreamDataConfig:
        given = [key for key in OF_RECORDINGS if getattr(self, key) != SignalKeys.model_fields[key].default]
        if given:
            raise ValueError(f"expected none of {', '.join(OF_RECORDINGS)} for a stream, got {', '.join(given)}")
        if self.hop is not None and self.window is None:
            raise ValueError(f"expected window with hop: {self.hop}, got none")
        if len(set(self.classes)) < len(self.classes):
            raise ValueError(f"expected each class once, got {', '.join(self.classes)}")
        return self

    @property
    def shape(self) -> WindowShape | None:
        """How samples are cut; None where each record is an image or a window."""
        if self.window is None:
            return None
        hold = self.hold_samples if self.missing == "hold" else 0
        return WindowShape(self.window, self.hop or self.window, self.window_scale, self.window_floor, hold)


class LabelsConfig(Frozen):
    """Labels that come late, and what is known to have come already."""

    horizon: NonNegativeInt = 10_000
    """A late label counts if at most so many records have come since its own, or before it: their windows are kept in
    memory until then."""

    ids: Count = 100_000
    """A record or a label that comes again is known by its id if fewer than so many others came in between; some 150
    bytes each."""


class JournalConfig(Frozen):
    """The journal, from which everything follows."""

    sync_ms: NonNegativeFloat = 200.0
    """Longest time from the arrival of a record until it is on the disk, and acknowledged to the source. At the end of
    every batch it is in any case."""

    segment_bytes: Annotated[int, Field(ge=4096)] = 64 * 2**20
    """A file of the journal ends once it is so large."""

    keep: Literal["all", "snapshots"] = "all"
    """`all`: the whole stream can be replayed. `snapshots`: files that no snapshot needs are removed."""

    max_bytes: Count | None = None
    """Most bytes of the journal: its oldest files are removed where no snapshot needs them. None: no limit."""


class SnapshotConfig(Frozen):
    """Snapshots of the state: a restart applies only what the journal holds since."""

    every_batches: Count = 200
    """Batches between two snapshots; one more is written at the end, and at a signal."""

    keep: Annotated[int, Field(ge=2)] = 3
    """Newest snapshots kept: if one is damaged, the one before it serves."""

    copy_to: str | None = None
    """Folder or URI to which each snapshot is copied, in the background. None: none."""


def _one() -> dict[str, tuple[str, ...]]:
    return {"main": ()}


class StreamConfig(Frozen):
    """Everything about one stream; `jobs/configs/stream*.yaml` hold examples."""

    name: Name
    """Names the stream and its default folder, runs/<name>."""

    seed: NonNegativeInt = 0

    device: Literal["cpu", "cuda"] = "cpu"
    """Where the layers are: `cuda` is a GPU for all candidates, or with a `mesh` of several ranks a whole one for every
    rank of each. All else is in the memory of this process. Another device changes the last bits."""

    threads: Count = 1
    """torch threads of this process; another number changes the last bits."""

    source: SourceConfig
    data: StreamDataConfig = StreamDataConfig()
    model: ModelConfig

    candidates: dict[str, Annotated[tuple[str, ...], Field(strict=False)]] = Field(default_factory=_one)
    """Configurations that learn from the stream side by side: name → assignments `key=value`, as for `--set`, of keys
    below model, rate, readout, novelty and drift."""

    mesh: MeshConfig = MeshConfig()
    """Ranks of each candidate's stack: replicas (`data`) and shards of the channels (`channel`), Ray actors. One rank:
    this process."""

    reduce: Reduce = "fast"
    """How ranks add their sums, see `jobs.pretrain`. `exact`: the bits of one process at any number of ranks."""

    cluster: GroupConfig = GroupConfig()
    """The actors, their waits and their network. `threads_per_rank`: as `threads`, unless it is set."""

    champion: str = "main"
    """Which of them answers first; from then on the comparison decides."""

    batch_size: Count = 64
    """Windows of a batch: what is scored, then learnt from, at once. Of samples: as many samples as make so many
    windows."""

    max_wait_s: PositiveFloat = 1.0
    """A batch ends so long after its first record, full or not."""

    labels: LabelsConfig = LabelsConfig()
    rate: RateConfig = RateConfig()
    readout: ReadoutConfig = ReadoutConfig()
    novelty: NoveltyConfig = NoveltyConfig()
    drift: DriftConfig = DriftConfig()
    comparison: ComparisonConfig = ComparisonConfig()

    recompute_every: NonNegativeInt = 0
    """Batches after which the readout's sums are computed anew from the features that its reservoir
    (`readout.reservoir`) has by then. 0: never."""

    journal: JournalConfig = JournalConfig()
    snapshot: SnapshotConfig = SnapshotConfig()
    answers: AnswersConfig = AnswersConfig()
    events: EventsConfig = EventsConfig()
    page: PageConfig = PageConfig()
    report: ReportConfig = ReportConfig()
    tracking: TrackingConfig = TrackingConfig()

    @field_validator("candidates")
    @classmethod
    def _at_least_one(cls, candidates: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        if not candidates:
            raise ValueError("expected at least one, got none")
        return candidates

    @field_validator("champion")
    @classmethod
    def _champion_is_one(cls, champion: str, others: ValidationInfo) -> str:
        names = others.data.get("candidates", {champion: ()})
        if champion not in names:
            raise ValueError(f"expected one of {', '.join(names)}, got {champion!r}")
        return champion

    def candidate(self, name: str) -> StreamConfig:
        """This configuration with the overrides of a candidate.

        Raises
        ------
        ConfigError
            An override is invalid, or of a key that is common to all.
        """
        assignments = list(self.candidates[name])
        try:
            for assignment in assignments:
                section = assignment.partition("=")[0].partition(".")[0]
                if section not in OF_CANDIDATES:
                    raise ConfigError(f"expected a key below {', '.join(OF_CANDIDATES)}, got {assignment!r}")
            return parse(StreamConfig, override(self.model_dump(mode="json"), assignments)) if assignments else self
        except ConfigError as error:
            raise ConfigError(f"candidates.{name}: {str(error).removeprefix('--set ')}") from None

    @property
    def samples_per_window(self) -> int:
        """Samples after which a group's next window ends."""
        shape = self.data.shape
        return 1 if shape is None else shape.hop


def parse_stream(values: Mapping[str, Any]) -> StreamConfig:
    """Build the configuration, with all its candidates checked.

    Raises
    ------
    ConfigError
        Some values are invalid.
    """
    config = parse(StreamConfig, values)
    window = config.data.window
    for name in config.candidates:
        candidate = config.candidate(name)
        try:
            model = streaming(candidate.model, candidate.rate)
            model.check_reduce(config.reduce)
            config.mesh.check(model)
            if window is not None:  # whatever the number of channels, which the first record tells
                layer_inputs(model, InputConfig(in_channels=1, height=1, width=window, num_classes=0))
        except ConfigError as error:
            raise ConfigError(f"candidates.{name}: {error}" if config.candidates[name] else str(error)) from None
    broker, ids = config.source.mqtt, config.labels.ids
    if broker is not None and broker.most_unacknowledged > ids:
        again = f"source.mqtt.most_unacknowledged={broker.most_unacknowledged}, as so many may come again"
        raise ConfigError(f"labels.ids: expected at least {again}, got {ids}")
    config.mesh.check_stream()
    if config.mesh.world_size > 1:
        config.cluster.check_mesh(config.mesh)
        threads = config.cluster.threads_per_rank
        if config.reduce == "exact" and threads not in (None, config.threads):
            raise ConfigError(
                f"cluster.threads_per_rank: expected threads={config.threads} with reduce: exact, as in one process, "
                f"got {threads}"
            )
    return config
