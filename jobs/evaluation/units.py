"""Units of work of a comparison: choose the settings of a row, or measure the row with one seed.

A `UnitResult` can be sent between processes, figures as the bytes of their files. Units share nothing but the
configuration, so they may run side by side (`jobs.evaluation.ray_units`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from jobs.evaluation import charts
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.learners import FeatureLearner, OnProgress
from jobs.evaluation.material import Material
from jobs.evaluation.results import RowResult
from jobs.evaluation.rows import Row
from jobs.evaluation.stacks import StackLearner
from jobs.figures import filters
from jobs.reporting import MissingError, save_figure
from simmatch.data.config import DataConfig
from simmatch.data.sources import Dataset, load_dataset

FIGURE_IMAGES = 500
"""Test images by whose activities filters are ordered and scaled."""

HELD_OUT_SHARE = 10
"""One in so many training images of the second data set is held out."""


@dataclass(frozen=True)
class Unit:
    """One piece of work.

    Attributes
    ----------
    row: its name.
    seed: measure the row with this seed; None: choose the row's settings.
    """

    row: str
    seed: int | None

    def __str__(self) -> str:
        return f"{self.row}, {'settings' if self.seed is None else f'seed {self.seed}'}"


@dataclass(frozen=True)
class UnitResult:
    """The result of a unit.

    Attributes
    ----------
    chosen: settings, as `Row.tune` returns them; None if the unit measures.
    results: one for each line of the table that the row fills.
    figures: file name → PNG.
    missing: what the row needs and this machine lacks; there are no results then.
    """

    chosen: object = None
    results: list[RowResult] = field(default_factory=list)
    figures: dict[str, bytes] = field(default_factory=dict)
    missing: str | None = None
    seconds: float = 0.0


def load(
    config: EvaluationConfig, read: Callable[[DataConfig], Dataset] = load_dataset
) -> tuple[Material, Material | None]:
    """The images of an evaluation, and those of the data set that nothing learns from.

    read: reads a data set, and may show its progress.

    Raises
    ------
    ConfigError, DataError
        Images that do not exist, or too few of them.
    """
    material = Material.of(read(config.data), config.held_out)
    if config.unseen is None:
        return material, None
    dataset = read(config.unseen)
    return material, Material.of(dataset, max(1, len(dataset.train_images) // HELD_OUT_SHARE))


def run_unit(
    rows: Sequence[Row], unit: Unit, chosen: object, material: Material, on_progress: OnProgress, *, draw: bool
) -> UnitResult:
    """Do the work of a unit.

    Parameters
    ----------
    chosen: the row's settings, for a unit that measures.
    draw: for a stack, the filters, and an image's activities in every layer.
    """
    started = time.monotonic()
    [row] = [each for each in rows if each.name == unit.row]
    try:
        if unit.seed is None:
            return UnitResult(chosen=row.tune(on_progress), seconds=time.monotonic() - started)
        results, learner = row.run(chosen, unit.seed, on_progress)
    except MissingError as error:
        return UnitResult(missing=str(error))
    figures = _figures(row.name, learner, material) if draw else {}
    return UnitResult(results=results, figures=figures, seconds=time.monotonic() - started)


def _figures(name: str, learner: FeatureLearner | None, material: Material) -> dict[str, bytes]:
    """Filters of every layer, and an image's activities in it."""
    if not isinstance(learner, StackLearner):
        return {}
    stack = learner.stack
    images = material.test.images[:FIGURE_IMAGES]
    with TemporaryDirectory() as folder:
        for index in range(len(stack.layers)):
            filters(stack, index, images, Path(folder) / f"filters-{name}-layer-{index}.png")
        save_figure(charts.activation_figure(stack, images[0]), Path(folder) / f"activations-{name}.png")
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
