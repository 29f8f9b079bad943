"""What one row gave with one seed, on the disk as soon as it is known: an interrupted evaluation goes on from there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from simmatch.files import write_whole


class Result(BaseModel):
    """One row with one seed. Budgets are labels per class, 'all' for all of them; accuracies are on the test images."""

    model_config = ConfigDict(extra="forbid")

    row: str
    seed: int
    settings: str
    """The candidate that was chosen on held-out images."""

    features: int
    """Values that the readout sees."""

    parameters_trained: int
    parameters_inference: int
    parameters_readout: int = 0
    operations: int
    """Multiply–adds per image, without pooling and readout."""

    fit_seconds: float
    images_per_second: float
    """Encoded; as learning, by the layers that the row looks at and those below."""

    active_fraction: list[float] = []
    """Per layer."""

    held_out: dict[str, float] = {}
    """Budget → accuracy on the held-out images, by which settings and penalties were chosen; `logistic`,
    `kernel <budget>` likewise."""

    accuracy: dict[str, float] = {}
    """Budget → test accuracy: of a ridge readout, or of the network itself."""

    kernel: dict[str, float] = {}
    """Budget → test accuracy of a kernel readout."""

    logistic: float | None = None
    """Of a logistic readout of all labels."""

    decode: float | None = None
    """Nearest column of V: no trained classifier."""

    neighbours: float | None = None
    """Vote of ten nearest training images."""

    corruptions: dict[str, float] = {}
    """Corruption → accuracy on the first test images; `clean` on the same without one."""

    transfer: dict[str, float] = {}
    """Budget → accuracy on the data set not seen while learning."""

    outliers: dict[str, float] = {}
    """Share of noise among the training images → accuracy."""


def budget_name(budget: int | None) -> str:
    """
    >>> budget_name(None), budget_name(10)
    ('all', '10')
    """
    return "all" if budget is None else str(budget)


class Store:
    """Results of a run, a file each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, row: str, seed: int) -> Path:
        return self.folder / f"{re.sub(r'[^A-Za-z0-9_-]', '_', row)}-{seed}.json"

    def load(self, row: str, seed: int) -> Result | None:
        """What is known already; None for nothing, or for a file that does not hold a result."""
        try:
            found = Result.model_validate_json(self.path(row, seed).read_text())
        except (FileNotFoundError, ValidationError):
            return None
        return found if (found.row, found.seed) == (row, seed) else None

    def save(self, result: Result) -> None:
        """Written whole or not at all."""
        write_whole(self.path(result.row, result.seed), json.dumps(result.model_dump(), indent=1))
