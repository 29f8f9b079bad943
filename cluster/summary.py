"""What is known of a run: gathered by the controller, written as `summary.json`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cluster.checkpoints.manifest import Cursor
from cluster.config import RunConfig
from cluster.messages import ReadoutScored
from cluster.tracking.events import sound
from cluster.tracking.spool import Spool

GIVEN_UP_TAG = "simmatch.given_up"
"""Tag of a run that went back to a checkpoint and on at other rates, see `given_up`."""

GIVEN_UP = re.compile(r"of layer (\d{1,9}) after step (\d{1,9})")

COUNTED = frozenset({"bytes_exchanged", "num_exchanges"})
"""What a record of a layer counts on from."""


def given_up(cursor: Cursor) -> str:
    """What a run says, now, of its records after a checkpoint: for people, and for `RunRecord.continue_from`."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return f"records before {now} of layer {cursor.layer} after step {cursor.updates}, at higher rates"


@dataclass
class RunRecord:
    """What is known of the run so far; becomes `summary.json`."""

    layers: dict[int, dict[str, float]] = field(default_factory=dict)
    curves: dict[int, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)
    readout: ReadoutScored | None = None
    steps: int = 0
    restarts: int = 0
    steps_again: int = 0
    images: int = 0
    """Learnt from since this process began; those of updates that are done again count once."""
    bytes_exchanged: float = 0.0
    num_exchanges: float = 0.0

    def forget(self, cursor: Cursor) -> None:
        """Drop what was recorded after a checkpoint, of a branch that was given up: it will be recorded anew."""
        for layer in [layer for layer in self.curves if layer >= cursor.layer]:
            last = cursor.updates if layer == cursor.layer else 0
            curve = self.curves[layer] = [(step, values) for step, values in self.curves[layer] if step <= last]
            if curve:
                self.layers[layer] = curve[-1][1]
            else:
                del self.curves[layer], self.layers[layer]

    def continue_from(self, spool: Path) -> None:
        """Take over what earlier attempts of the same run have recorded, so that none of it is recorded twice."""
        for event, _ in Spool(spool).read():
            tags, metrics = sound(event, "tags"), sound(event, "metrics")
            if tags is not None and (found := GIVEN_UP.search(str(tags["values"].get(GIVEN_UP_TAG)))):
                self.forget(Cursor(step=0, layer=int(found[1]), updates=int(found[2])))
            if metrics is None or metrics["layer"] is None or not metrics["values"].keys() >= COUNTED:
                continue
            layer, step, values = metrics["layer"], metrics["step"], metrics["values"]
            self.bytes_exchanged, self.num_exchanges = values["bytes_exchanged"], values["num_exchanges"]
            curve = self.curves.setdefault(layer, [])
            if not curve or step > curve[-1][0]:
                curve.append((step, values))
                self.layers[layer] = values


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
        "world_size": config.checked_mesh().world_size,
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
        "layers": [record.layers.get(index, {}) for index in range(len(config.model.layers))],
    }
    return summary | ({"message": message} if message else {})
