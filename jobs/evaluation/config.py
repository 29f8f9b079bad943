"""Configuration of a comparison; `jobs/configs/evaluate_*.yaml` hold examples."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from cluster.config import Name
from cluster.tracking.config import TrackingConfig
from jobs.evaluation.learners import Shape
from jobs.options import add_set, override
from simmatch.config import ConfigError, Frozen, ModelConfig, NonNegativeInt, PositiveInt, parse
from simmatch.data.config import DataConfig

CANDIDATES = 4
"""Most settings that a row may choose from."""

Overrides = Annotated[tuple[str, ...], Field(strict=False)]


class StackRow(Frozen):
    """A similarity-matching stack, the rows of the table that it fills, and up to four variants to choose from."""

    model: ModelConfig

    rows: Annotated[
        dict[str, Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)]], Field(min_length=1)
    ]
    """Row name → layers, from 0, whose features its readout sees side by side. Supervised layers are excluded, because
    they learn from the labels of all training images. Settings are chosen by all rows."""

    pool: PositiveInt | None = None
    """Height and width to which feature maps are average-pooled; default: `shape.pool`."""

    candidates: Annotated[tuple[Overrides, ...], Field(strict=False, max_length=CANDIDATES)] = ()
    """Variants of `model`, each a list of overrides such as `layers.0.whiten=true`; none: the model as it is."""

    @model_validator(mode="after")
    def _rows_are_unsupervised(self) -> StackRow:
        for name, layers in self.rows.items():
            for index in layers:
                if index >= len(self.model.layers) or self.model.layers[index].supervised:
                    raise ValueError(f"expected rows.{name} to name unsupervised layers of the model, got {index}")
        return self

    def models(self) -> list[ModelConfig]:
        """The models to choose from.

        Raises
        ------
        ConfigError
            An override that does not fit the model.
        """
        variants = self.candidates or ((),)
        return [parse(ModelConfig, override(self.model.model_dump(mode="json"), list(each))) for each in variants]


class MeasurementConfig(Frozen):
    """What is measured of every row."""

    budgets: Annotated[tuple[PositiveInt, ...], Field(strict=False)] = (10, 50, 100, 1000)
    """Labels per class, the smallest first; readouts of all labels are always measured as well."""

    candidates: Annotated[PositiveInt, Field(le=CANDIDATES)] = CANDIDATES
    """Number of settings that every row may choose from, the first of its list: equal search budgets; 1: no search."""

    tuning_images: PositiveInt = 5000
    """Settings are compared after learning from the first so many training images."""

    ridge_only: bool = False
    """No other readouts: kernel, logistic and nearest neighbours take longest where images are many."""

    corrupted_images: NonNegativeInt = 1000
    """Every corruption is applied to the first so many test images; 0: no corruptions."""

    outlier_shares: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = (0.01, 0.05)
    """Shares of the training images replaced by noise, one experiment each."""

    outlier_images: NonNegativeInt = 10_000
    """Training images of these experiments, and of one without noise; 0: no such experiments."""

    def all_budgets(self) -> tuple[int | None, ...]:
        """Labels per class; None for all."""
        return (*self.budgets, None)


class EvaluationConfig(MeasurementConfig):
    """Everything about one comparison."""

    name: Name
    """Names the run and its default folder, runs/<name>."""

    data: DataConfig

    unseen: DataConfig | None = None
    """A data set that learners are not trained on: they stay as they are, and readouts are trained on its labels. Its
    images are resized to the size of those of `data`, and made grey if those are."""

    seeds: Annotated[tuple[NonNegativeInt, ...], Field(strict=False, min_length=1)] = (0, 1, 2)
    """Seeds of weights, data order and label subsets."""

    held_out: PositiveInt = 5000
    """The last so many training images are not trained on: settings and penalties are chosen on them."""

    shape: Shape
    """Geometry of the rivals, that of the single similarity-matching layer."""

    stacks: Annotated[dict[str, StackRow], Field(min_length=1)]
    """Row name → similarity-matching stack."""

    rivals: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Rows of `jobs.evaluation.rivals.RIVALS`."""

    networks: Annotated[tuple[str, ...], Field(strict=False)] = ()
    """Rows of `jobs.evaluation.networks.NETWORKS`: trained by backpropagation."""

    tracking: TrackingConfig = TrackingConfig()

    quick: Overrides = ()
    """Overrides that `--quick` applies: a table of the same rows in minutes, with less precise figures."""

    @model_validator(mode="after")
    def _budgets_rise_and_nothing_is_twice(self) -> EvaluationConfig:
        if list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"expected rising budgets, got {list(self.budgets)}")
        for key in ("seeds", "rivals", "networks"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"expected {key} that differ, got {list(getattr(self, key))}")
        return self


def command_parser(program: str, purpose: str, default: Path) -> argparse.ArgumentParser:
    """The options that comparisons have in common.

    default: file of the configuration.
    """
    parser = argparse.ArgumentParser(prog=program, description=purpose)
    parser.add_argument("--config", default=str(default), metavar="FILE", help="YAML file (default: %(default)s)")
    add_set(parser, "--set held_out=500")
    parser.add_argument("--run-dir", metavar="DIR", help="folder of results and figures (default: runs/<name>)")
    parser.add_argument("--quick", action="store_true", help="same tables from less: minutes, less precise")
    return parser


def overridden(values: dict[str, Any], assignments: list[str], *, quick: bool) -> dict[str, Any]:
    """Values of a YAML file with `--set` assignments applied; with `quick`, the file's own overrides before them.

    Raises
    ------
    ConfigError
        One line, naming the key.
    """
    shortcuts = values.get("quick") or []
    if quick and not shortcuts:
        raise ConfigError("--quick: expected a configuration with overrides under 'quick', got none")
    return override(values, [*(shortcuts if quick else []), *assignments])


def read(values: dict[str, Any], assignments: list[str], *, quick: bool) -> EvaluationConfig:
    """The configuration of a comparison; parameters as in `overridden`.

    Raises
    ------
    ConfigError
        One line, naming the key.
    """
    config = parse(EvaluationConfig, overridden(values, assignments, quick=quick))
    for name, row in config.stacks.items():
        try:
            row.models()
        except ConfigError as error:
            raise ConfigError(f"stacks.{name}.{error}") from None
    return config
