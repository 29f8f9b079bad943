"""A unit of an evaluation: settings chosen for a row, or the row measured with one seed; in any process.

What a unit gives can be sent from process to process, figures as the bytes of their files: nothing is shared but the
configuration, so units may run side by side (`jobs.evaluation.side_by_side`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from jobs.evaluation import charts
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.features import Features, StackFeatures
from jobs.evaluation.material import Material
from jobs.evaluation.results import Result
from jobs.evaluation.rows import Row
from jobs.evaluation.stacks import Seen
from jobs.figures import filters
from jobs.reporting import MissingError
from simmatch.data.sources import load_dataset
from simmatch.model import Stack

FIGURE_IMAGES = 500
"""Test images whose activities filters are ordered and scaled by."""

UNSEEN_HELD_OUT = 10
"""One in so many training images of the unseen data set is held out."""


@dataclass(frozen=True)
class Unit:
    """What is done at a time.

    Attributes
    ----------
    row: its name.
    seed: to measure with; None: choose the row's settings.
    """

    row: str
    seed: int | None

    def __str__(self) -> str:
        return f"{self.row}, {'settings' if self.seed is None else f'seed {self.seed}'}"


@dataclass(frozen=True)
class Outcome:
    """What a unit gives.

    Attributes
    ----------
    chosen: settings, as `Row.tune` returns them; None where it measured.
    results: one for each row of the table that the row fills.
    figures: file name → PNG.
    missing: what the row needs and does not have; it has no results then.
    """

    chosen: object = None
    results: list[Result] = field(default_factory=list)
    figures: dict[str, bytes] = field(default_factory=dict)
    missing: str | None = None
    seconds: float = 0.0


def load(config: EvaluationConfig) -> tuple[Material, Material | None]:
    """The images of an evaluation, and those of the unseen data set.

    Raises
    ------
    ConfigError, DataError
        Images that are not there, or too few of them.
    """
    material = Material.of(load_dataset(config.data), config.held_out)
    if config.unseen is None:
        return material, None
    dataset = load_dataset(config.unseen)
    return material, Material.of(dataset, max(1, len(dataset.train_images) // UNSEEN_HELD_OUT))


def perform(rows: Sequence[Row], unit: Unit, chosen: object, material: Material, seen: Seen, *, draw: bool) -> Outcome:
    """Do what a unit says.

    Parameters
    ----------
    chosen: the row's settings, for a unit that measures.
    draw: filters, and an image's way through the layers, of a stack.
    """
    started = time.monotonic()
    [row] = [each for each in rows if each.name == unit.row]
    try:
        if unit.seed is None:
            return Outcome(chosen=row.tune(seen), seconds=time.monotonic() - started)
        results, learner = row.run(chosen, unit.seed, seen)
    except MissingError as error:
        return Outcome(missing=str(error))
    figures = _figures(row.name, learner, material) if draw else {}
    return Outcome(results=results, figures=figures, seconds=time.monotonic() - started)


def _figures(name: str, learner: Features | None, material: Material) -> dict[str, bytes]:
    """Filters of every layer, and an image's way through them."""
    if not isinstance(learner, StackFeatures):
        return {}
    stack: Stack = learner.learner.stack
    images = material.test.images
    with TemporaryDirectory() as folder:
        for index in range(len(stack.layers)):
            filters(stack, index, images[:FIGURE_IMAGES], Path(folder) / f"filters-{name}-layer-{index}.png")
        charts.activation_maps(stack, images[0], Path(folder) / f"activations-{name}.png")
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
