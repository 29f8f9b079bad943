"""The record of a run: gathered by the controller, written as `summary.json`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.checkpoints.manifest import Cursor
from cluster.config import RunConfig
from cluster.messages import LayerMetrics, LayerProfiled, ReadoutScored
from cluster.tracking.events import MetricsEvent, TagsEvent
from cluster.tracking.spool import Spool

ABANDONED_TAG = "simmatch.given_up"
"""Tag of a run that went back to a checkpoint and continued at lower rates, see `abandoned`."""

ABANDONED = re.compile(r"of layer (\d{1,9}) after step (\d{1,9})")

RATE_TAG = "simmatch.rate"
"""Tag of a run at lower learning rates: the factor by which they are multiplied."""

RATE = re.compile(r"0\.\d{0,8}[1-9]")

TOTALS = frozenset({"bytes_exchanged", "num_exchanges"})
"""Metrics of a layer that a run which continues counts on from."""


def abandoned(cursor: Cursor) -> str:
    """Value of the tag for the records after a checkpoint: for people, and for `RunRecord.continue_from`."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"records before {now} of layer {cursor.layer} after step {cursor.updates}, at higher rates"


@dataclass
class RunRecord:
    """What is known of a run so far; becomes `summary.json`."""

    curves: dict[int, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)
    """Layer → (updates of the layer, its metrics after them)."""
    readout: ReadoutScored | None = None
    steps: int = 0
    restarts: int = 0
    steps_again: int = 0
    images: int = 0
    """Learned from since this process began; those of repeated updates count once."""
    bytes_exchanged: float = 0.0
    num_exchanges: float = 0.0
    rate: float = 1.0
    """Factor of the learning rates; below 1 after a divergence."""

    profiles: dict[int, dict[int, LayerProfiled]] = field(default_factory=dict)
    """Layer → rank → its profile; all ranks recorded the same updates."""

    _before: tuple[int, float, float] = (0, 0.0, 0.0)

    def start_group(self, images: int) -> None:
        """A new group counts its exchanges from 0. `images`: of the run, before this process began."""
        self._before = images, self.bytes_exchanged, self.num_exchanges

    def add(self, metrics: LayerMetrics) -> dict[str, float] | None:
        """Take in the metrics of a layer. Returns their values for the tracker; None where they were recorded before.

        Exchanges of earlier groups are added.
        """
        images, bytes_exchanged, num_exchanges = self._before
        self.images = metrics.images - images
        self.bytes_exchanged = bytes_exchanged + metrics.bytes_exchanged
        self.num_exchanges = num_exchanges + metrics.num_exchanges
        totals = {"bytes_exchanged": self.bytes_exchanged, "num_exchanges": self.num_exchanges}
        values = metrics.values() | totals
        return values if self._append(metrics.layer, metrics.update, values) else None

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

    def forget(self, cursor: Cursor) -> None:
        """Drop the records after a checkpoint that is continued at lower rates: they will be recorded again."""
        for layer in [layer for layer in self.curves if layer >= cursor.layer]:
            last = cursor.updates if layer == cursor.layer else 0
            self.curves[layer] = [(update, values) for update, values in self.curves[layer] if update <= last]
            if not self.curves[layer]:
                del self.curves[layer]

    def continue_from(self, spool: Path) -> None:
        """Take over what earlier attempts of this run have recorded, so that nothing is recorded twice."""
        for event, _ in Spool(spool).read():
            match event:
                case TagsEvent(values=values):
                    if mark := ABANDONED.search(str(values.get(ABANDONED_TAG))):
                        self.forget(Cursor(step=0, layer=int(mark[1]), updates=int(mark[2])))
                    if RATE.fullmatch(rate := str(values.get(RATE_TAG))):
                        self.rate = min(self.rate, float(rate))
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
        "mesh": config.mesh.model_dump(),
        "steps": record.steps,
        "images_per_second": record.images / seconds if seconds > 0 else 0.0,
        "seconds": seconds,
        "bytes_exchanged": int(record.bytes_exchanged),
        "num_exchanges": int(record.num_exchanges),
        "restarts": record.restarts,
        "steps_again": record.steps_again,
        "skipped_images": skipped_images,
        "mlflow_run_id": run_id,
        "layers": [
            record.curves[index][-1][1] if index in record.curves else {} for index in range(len(config.model.layers))
        ],
    }
    return summary | ({"message": message} if message else {})
