"""The record of a run: gathered by the controller, written as `summary.json`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.checkpoints.manifest import Cursor
from cluster.config import RunConfig
from cluster.messages import LayerMetrics, LayerProfiled, ReadoutScored
from cluster.node_usage import is_usage
from cluster.tracking.events import MetricsEvent, TagsEvent
from cluster.tracking.spool import Spool
from simmatch.config import ModelConfig
from simmatch.schedule import learning_updates

ABANDONED_TAG = "simmatch.given_up"
"""Tag of a run that went back to a checkpoint and continued at lower rates, see `abandoned`."""

ABANDONED = re.compile(r"of layer (\d{1,9}) after step (\d{1,9})")
"""Once for every layer; layers above the last one that is named had made no update."""

RATE_TAG = "simmatch.rate"
"""Tag of a run at lower learning rates: the factor by which they are multiplied."""

RATE = re.compile(r"0\.\d{0,8}[1-9]")

TOTALS = frozenset({"bytes_exchanged", "num_exchanges"})
"""Metrics of a layer that a run which continues counts on from."""


def updates_at(cursor: Cursor, model: ModelConfig) -> dict[int, int]:
    """Layer → its updates at a cursor. Of layers that learn one after the other the present one: those above it have
    made none.

    >>> from simmatch.config import LayerConfig, TrainConfig
    >>> layers = [LayerConfig(out_channels=8, kernel_size=3, train=TrainConfig(start_after=n)) for n in (0, 60)]
    >>> model = ModelConfig(layers=layers, schedule="together")
    >>> updates_at(Cursor(step=100, layer=0, updates=100), model)
    {0: 100, 1: 40}
    """
    if model.schedule == "greedy":
        return {cursor.layer: cursor.updates}
    starts = [layer.train.start_after for layer in model.layers]
    updates = learning_updates(model, max(cursor.step, *starts, 0) + 1)
    return {index: len(range(each.start, min(each.stop, cursor.step + 1))) for index, each in enumerate(updates)}


def abandoned(updates: Mapping[int, int]) -> str:
    """Value of the tag for the records after so many updates of each layer: for people, and for
    `RunRecord.continue_from`."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    which = ", ".join(f"of layer {layer} after step {number}" for layer, number in updates.items())
    return f"records before {now} {which}, at higher rates"


@dataclass
class RunRecord:
    """What is known of a run so far; becomes `summary.json`."""

    curves: dict[int, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)
    """Layer → (updates of the layer, its metrics after them)."""
    readout: ReadoutScored | None = None
    steps: int = 0
    restarts: int = 0
    """New groups after failures."""
    preemptions: int = 0
    """New groups after nodes that were taken away."""
    growths: int = 0
    """Larger groups after nodes that have come back."""
    steps_again: int = 0
    images: int = 0
    """Learned from since this process began; those of repeated updates count once."""
    bytes_exchanged: float = 0.0
    num_exchanges: float = 0.0
    rate: float = 1.0
    """Factor of the learning rates; below 1 after a divergence."""

    profiles: dict[int, dict[int, LayerProfiled]] = field(default_factory=dict)
    """Layer → rank → its profile; all ranks recorded the same updates."""

    waits: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Stage → seconds in which it has learnt, and how many of them its first rank waited for others."""

    _samples: int = 0
    """Of nodes, recorded so far."""

    _before: tuple[int, float, float] = (0, 0.0, 0.0)
    _exchanged: dict[int, tuple[float, float]] = field(default_factory=dict)
    """Stage → bytes and exchanges since the present group started."""

    def start_group(self, images: int) -> None:
        """A new group counts its exchanges from 0. `images`: of the run, before this process began."""
        self._before = images, self.bytes_exchanged, self.num_exchanges
        self._exchanged = {}

    def add(self, metrics: LayerMetrics, stage: int = 0) -> dict[str, float] | None:
        """Take in the metrics of a layer. Returns their values for the tracker; None where they were recorded before.

        Exchanges of earlier groups, and of other stages, are added.
        """
        images, bytes_exchanged, num_exchanges = self._before
        self._exchanged[stage] = metrics.bytes_exchanged, metrics.num_exchanges
        self.images = max(self.images, metrics.images - images)
        self.bytes_exchanged = bytes_exchanged + sum(moved for moved, _ in self._exchanged.values())
        self.num_exchanges = num_exchanges + sum(number for _, number in self._exchanged.values())
        seconds, waited_s = self.waits.get(stage, (0.0, 0.0))
        share = metrics.window_s * metrics.waiting_share
        self.waits[stage] = seconds + metrics.window_s, waited_s + share
        totals = {"bytes_exchanged": self.bytes_exchanged, "num_exchanges": self.num_exchanges}
        values = metrics.values() | totals
        return values if self._append(metrics.layer, metrics.update, values) else None

    def next_sample(self) -> int:
        """Number of the next sample of a node: the step of its metrics."""
        self._samples += 1
        return self._samples - 1

    def add_profile(self, rank: int, profile: LayerProfiled) -> str | None:
        """Take in a rank's profile of a layer. Returns what to tell: the first problem with that layer's."""
        of_layer = self.profiles.setdefault(profile.layer, {})
        if any(other.first != profile.first for other in of_layer.values()):  # of a group before this one
            of_layer.clear()
        told = any(other.problem for other in of_layer.values())
        of_layer[rank] = profile
        return (
            f"profile of layer {profile.layer}, rank {rank}: {profile.problem}"
            if profile.problem and not told
            else None
        )

    def _append(self, layer: int, update: int, values: dict[str, float]) -> bool:
        """Append to a layer's curve; returns False where it has reached this update already, before a restart."""
        curve = self.curves.setdefault(layer, [])
        if curve and update <= curve[-1][0]:
            return False
        curve.append((update, values))
        return True

    def forget(self, updates: Mapping[int, int]) -> None:
        """Drop the records after so many updates of each layer, from which the run continues at lower rates: they will
        be recorded again. Layers above the last one named have made none."""
        for layer in [layer for layer in self.curves if layer in updates or layer > max(updates)]:
            last = updates.get(layer, 0)
            self.curves[layer] = [(update, values) for update, values in self.curves[layer] if update <= last]
            if not self.curves[layer]:
                del self.curves[layer]

    def continue_from(self, spool: Path) -> None:
        """Take over what earlier attempts of this run have recorded, so that nothing is recorded twice."""
        for event, _ in Spool(spool).read():
            match event:
                case TagsEvent(values=values):
                    if marks := ABANDONED.findall(str(values.get(ABANDONED_TAG))):
                        self.forget({int(layer): int(number) for layer, number in marks})
                    if RATE.fullmatch(rate := str(values.get(RATE_TAG))):
                        self.rate = min(self.rate, float(rate))
                case MetricsEvent(layer=None, step=step, values=values) if any(map(is_usage, values)):
                    self._samples = max(self._samples, step + 1)
                case MetricsEvent(layer=int(layer), step=step, values=values) if values.keys() >= TOTALS:
                    self.bytes_exchanged, self.num_exchanges = values["bytes_exchanged"], values["num_exchanges"]
                    self._append(layer, step, values)


def summarise(
    config: RunConfig,
    record: RunRecord,
    *,
    status: str,
    seconds: float,
    run_id: str | None,
    message: str | None = None,
    skipped_images: int = 0,
) -> dict[str, Any]:
    """The content of `summary.json`."""
    readout = record.readout
    summary: dict[str, Any] = {
        "status": status,
        "name": config.name,
        "accuracy": readout and readout.accuracy,
        "accuracy_decode": readout and readout.accuracy_decode,
        "probe": readout and readout.readout,
        "probe_images": readout and readout.train_images,
        "probe_subset": readout and (readout.subset or None),
        "world_size": config.mesh.world_size,
        "waiting_share": [
            waited_s / seconds if seconds else 0.0
            for seconds, waited_s in (record.waits.get(stage, (0.0, 0.0)) for stage in range(config.mesh.layer))
        ],
        "mesh": config.mesh.model_dump(),
        "steps": record.steps,
        "images_per_second": record.images / seconds if seconds > 0 else 0.0,
        "seconds": seconds,
        "bytes_exchanged": int(record.bytes_exchanged),
        "num_exchanges": int(record.num_exchanges),
        "restarts": record.restarts,
        "preemptions": record.preemptions,
        "growths": record.growths,
        "steps_again": record.steps_again,
        "skipped_images": skipped_images,
        "mlflow_run_id": run_id,
        "layers": [
            record.curves[index][-1][1] if index in record.curves else {} for index in range(len(config.model.layers))
        ],
    }
    return summary | ({"message": message} if message else {})
