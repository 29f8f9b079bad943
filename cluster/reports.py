"""What becomes of the reports of ranks: records, checkpoints, and lines for a person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import assert_never

from cluster.checkpoints.collector import CheckpointCollector
from cluster.config import RunConfig
from cluster.layout import RankInfo
from cluster.messages import (
    Display,
    FeaturesFound,
    LayerMetrics,
    LayerProfiled,
    LayerWarning,
    Message,
    ModelExported,
    NodeWarning,
    Progress,
    RankStatus,
    ReadoutScored,
    ShardFailed,
    ShardWritten,
    Traceback,
    TrainingWarning,
)
from cluster.node_usage import metrics_of
from cluster.summary import RunRecord
from cluster.tracking.tracker import Tracker


class Reports:
    """Of all groups of one run.

    Parameters
    ----------
    record, checkpoints, recorder, display: where the reports go.
    """

    def __init__(
        self, record: RunRecord, checkpoints: CheckpointCollector, recorder: Tracker, display: Display
    ) -> None:
        self._record, self._checkpoints, self._recorder, self._display = record, checkpoints, recorder, display
        self._phases_shown = 0
        self._node_warnings: set[str] = set()
        self._metrics: dict[int, LayerMetrics] = {}

    def start_group(self) -> None:
        """A new group starts, with phases of its own."""
        self._phases_shown = 0

    def take_in(self, statuses: Sequence[RankStatus], ranks: Sequence[RankInfo], config: RunConfig) -> None:
        """The new messages of every rank.

        config: of the group.
        """
        for status in statuses:
            for message in status.messages:
                self._handle(status.rank, message, config)
            if status.usage is not None:
                usage = metrics_of(status.usage, ranks[status.rank], ranks)
                self._recorder.metrics(self._record.next_sample(), usage)

    def show(self, phases: Sequence[Progress]) -> None:
        """The present phase of the first rank, and those that have ended since the last call."""
        for latest in phases[self._phases_shown :]:
            if latest.phase == "learn" and latest.layer is None:  # layers of other stages, too
                latest = replace(latest, metrics=tuple(self._metrics[layer] for layer in sorted(self._metrics)))
            self._display.progress(latest)
        self._phases_shown = max(0, len(phases) - 1)

    def _handle(self, rank: int, message: Message, config: RunConfig) -> None:
        match message:
            case ShardWritten():
                self._record.steps = max(self._record.steps, message.cursor.step)
                self._checkpoints.shard_written(rank, message, config, self._record.rate)
            case ShardFailed():
                self._checkpoints.shard_failed(rank, message)
            case Traceback(text):
                self._display.note(f"rank {rank}:\n{text}")
            case LayerProfiled():
                problem = self._record.add_profile(rank, message)
                if problem is not None:
                    self._display.note(problem)
            case LayerMetrics():
                values = self._record.add(message, config.mesh.place(rank).stage)
                self._metrics[message.layer] = replace(message, bytes_exchanged=self._record.bytes_exchanged)
                if values is not None:
                    self._recorder.metrics(message.update, values, layer=message.layer)
            case FeaturesFound():
                self._display.note(str(message))
            case TrainingWarning(text) | LayerWarning(text):
                self._display.note(f"warning: {text}")
            case NodeWarning(text):
                if text not in self._node_warnings:
                    self._node_warnings.add(text)
                    self._display.note(f"warning: {text}")
            case ModelExported(folder):
                self._checkpoints.model_exported(folder)
            case ReadoutScored():
                self._record.readout = message
            case _:
                assert_never(message)
