"""How a comparison opens its record: `jobs.evaluate` and `jobs.finetune` alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.tracking.tracker import Tracker
from jobs.evaluation.identity import DATA, keep, same_data, unwritable
from jobs.evaluation.material import Material, digest_of
from jobs.reporting import hardware


def begin(
    tracker: Tracker,
    identity: Mapping[str, Any],
    params: Mapping[str, Any],
    data: str,
    material: Material,
    unseen: Material | None = None,
) -> None:
    """Open the record; keep what is compared, `jobs.evaluation.identity`, and record it.

    Parameters
    ----------
    identity: what results of the run directory depend on.
    params: of the run.
    data: name of the data set; material: its images; unseen: those of another that results depend on, too.

    Raises
    ------
    SpoolBusyError
        Another process works in the run directory.
    ConfigError
        It cannot be written to, or holds results of other data.
    """
    digest = digest_of(material, unseen)
    same_data(tracker.run_dir, digest)
    facts = hardware()
    tags = {f"simmatch.{key}": str(facts[key]) for key in ("cpu", "cores_available", "commit", "torch")}
    try:
        tracker.start(tracker.run_dir.name, layers=0, tags=tags)
    except OSError as error:
        raise unwritable(tracker.run_dir, error) from None
    definition = keep(tracker.run_dir, {**identity, DATA: digest})
    tracker.params(params)
    images = len(material.train) + len(material.held_out)
    tracker.dataset(data, source=data, digest=material.digest, num_images=images)
    tracker.artifact(definition)
