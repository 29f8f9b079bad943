"""The rows of a comparison, made from its configuration, and what is measured of a row with one seed.

To add a rival write one class (`jobs.evaluation.learners.Learner`) and one entry of `jobs.evaluation.rivals.RIVALS`; a
similarity-matching stack is an entry of the configuration.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Protocol

from jobs.evaluation import features, memory, networks
from jobs.evaluation.backprop import CANDIDATES
from jobs.evaluation.config import EvaluationConfig
from jobs.evaluation.features import FeatureRow, FeatureView
from jobs.evaluation.learners import FeatureLearner, OnProgress, Pixels, PooledFeatures
from jobs.evaluation.lenet import LeNetSizes
from jobs.evaluation.material import Material
from jobs.evaluation.networks import NETWORKS, Network
from jobs.evaluation.results import RowResult
from jobs.evaluation.rivals import RIVALS
from jobs.evaluation.stacks import StackLearner
from simmatch.config import ConfigError, ModelConfig
from simmatch.model import InputConfig

PIXELS = "pixels"


class Row(Protocol):
    """A row of the table."""

    @property
    def name(self) -> str: ...

    @property
    def definition(self) -> object:
        """What the row is made of, as plain values: results of another definition do not belong to it."""

    def held_bytes(self) -> int:
        """Memory that tuning or running takes at its most, besides images that are in memory before."""

    def tune(self, on_progress: OnProgress) -> object:
        """Choose settings on held-out images; returns a value that JSON can hold."""

    @property
    def views(self) -> tuple[str, ...]:
        """The lines of the table that it fills."""

    def run(self, chosen: object, seed: int, on_progress: OnProgress) -> tuple[list[RowResult], FeatureLearner | None]:
        """Measure with one seed: a result for each view, and the learner, for figures.

        What takes long and varies little is measured with the first seed only: a kernel readout of many labels,
        logistic regression, nearest neighbours, corruptions, noise.
        """


class FeatureRun:
    """A row of features with the images of one evaluation."""

    def __init__(self, row: FeatureRow, config: EvaluationConfig, material: Material, other: Material | None) -> None:
        self.row, self.config, self.material, self.other = row, config, material, other

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def definition(self) -> object:
        return self.row.definition

    @property
    def views(self) -> tuple[str, ...]:
        own = () if self.row.decoding is None else (self.row.decoding,)
        return (*(view.name for view in self.row.views), *own)

    def held_bytes(self) -> int:
        row, config = self.row, self.config
        blocks, passed = row.values()
        view = max(sum(blocks[index] for index in view.blocks) for view in row.views)
        read = [memory.features_bytes(each, blocks, view) for each in (self.material, self.other) if each]
        learnt = memory.learning_bytes(self.material, blocks, passed)
        altered = memory.selected_bytes(self.material.source, config.outlier_images, config.corrupted_images)
        return max(*read, learnt, altered)

    def tune(self, on_progress: OnProgress) -> object:
        return features.tune(self.row, self.material, self.config, self.config.seeds[0], on_progress)

    def run(self, chosen: object, seed: int, on_progress: OnProgress) -> tuple[list[RowResult], FeatureLearner | None]:
        assert isinstance(chosen, int)
        config, material, row = self.config, self.material, self.row
        first = seed == self.config.seeds[0]
        results, learner, fitted = features.evaluate(
            row, chosen, material, config, seed, on_progress, every_readout=first
        )
        measured: dict[str, list[dict[str, float]]] = {}
        if self.other is not None:
            measured["transfer"] = features.transferred(
                learner, row.views, self.other, material.source, config.all_budgets(), seed
            )
        if config.corrupted_images and first:
            on_progress("corrupted images", 0, 1)
            measured["corruptions"] = features.corrupted_accuracy(learner, fitted, material, config.corrupted_images)
        if config.outlier_images and first:
            on_progress("learn from images with noise", 0, 1)
            measured["outliers"] = features.with_noise(row, chosen, material, config, seed)
        for measure, by_view in measured.items():
            for result, values in zip(results, by_view, strict=False):  # the last result may be the learner's own
                setattr(result, measure, values)
        return results, learner


class NetworkRun:
    """A row trained by backpropagation, with the images of one evaluation."""

    def __init__(self, network: Network, config: EvaluationConfig, material: Material, other: Material | None) -> None:
        self.network, self.config, self.material, self.other = network, config, material, other

    @property
    def name(self) -> str:
        return self.network.name

    @property
    def definition(self) -> object:
        count = self.config.candidates
        settings = {kind: [repr(each) for each in known[:count]] for kind, known in CANDIDATES.items()}
        return {"network": repr(self.network), "settings": settings}

    @property
    def views(self) -> tuple[str, ...]:
        return (self.network.name,)

    def held_bytes(self) -> int:
        config, source = self.config, self.material.source
        size = LeNetSizes.of(source.image_size).features(self.network.channels)
        read = [memory.features_bytes(each, [size], size, landmarks=0) for each in (self.material, self.other) if each]
        return max(*read, memory.selected_bytes(source, config.outlier_images, config.corrupted_images))

    def tune(self, on_progress: OnProgress) -> object:
        return self.network.tune(self.material, self.config, self.config.seeds[0], on_progress)

    def run(self, chosen: object, seed: int, on_progress: OnProgress) -> tuple[list[RowResult], FeatureLearner | None]:
        assert isinstance(chosen, dict)
        config, material = self.config, self.material
        first = seed == self.config.seeds[0]
        result, net = self.network.evaluate(chosen, material, config, seed, on_progress, every_readout=first)
        if self.other is not None:
            result.transfer = networks.transferred(net, self.other, material.source, config.all_budgets(), seed)
        if config.corrupted_images and first:
            result.corruptions = networks.corrupted_accuracy(net, material, config.corrupted_images)
        if config.outlier_images and first:
            result.outliers = self.network.with_noise(chosen, material, config, seed)
        return [result], None


def rows_of(config: EvaluationConfig, material: Material, other: Material | None) -> list[Row]:
    """All rows, in the order of the table: stacks, rivals, pixels, networks.

    Raises
    ------
    ConfigError
        A rival or a network that does not exist, or two rows of one name.
    """
    rows: list[Row] = [
        FeatureRun(row, config, material, other) for row in (*_stacks(config, material), *_rivals(config, material))
    ]
    for name in config.networks:
        if name not in NETWORKS:
            raise ConfigError(f"networks: expected some of {', '.join(NETWORKS)}, got {name!r}")
        rows.append(NetworkRun(NETWORKS[name], config, material, other))
    names = [name for row in rows for name in sorted({row.name, *row.views})]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"stacks: expected rows whose names differ from all others, got {name!r} twice")
    return rows


def only(rows: list[Row], names: Collection[str]) -> list[Row]:
    """The rows of these names, in the order of the table.

    A stack is named as itself or as one of the lines that it fills: these are measured together, so that results do not
    depend on which others were asked for.

    Raises
    ------
    ConfigError
        A name that no row has.
    """
    known = {name: row for row in rows for name in (row.name, *row.views)}
    for name in names:
        if name not in known:
            raise ConfigError(f"--rows: expected some of {', '.join(known)}, got {name!r}")
    chosen = [known[name] for name in names]
    return [row for row in rows if row in chosen]


def _stacks(config: EvaluationConfig, material: Material) -> Iterator[FeatureRow]:
    for name, row in config.stacks.items():
        words = tuple(" ".join(each) or "as configured" for each in (row.candidates or ((),))[: config.candidates])
        views = tuple(FeatureView(view, blocks) for view, blocks in row.rows.items())
        decoding = f"{name}_decode" if row.model.layers[-1].supervised else None
        models, pool = row.models(), row.pool or config.shape.pool
        make, definition = _stack_maker(models, pool, material), row.model_dump(mode="json", exclude_defaults=True)
        values = partial(_most_values, models, material.source, pool)
        yield FeatureRow(name, views, words, make, decoding, definition, values)


def _one_block(features: int) -> tuple[list[int], int]:
    return [features], 0


def _most_values(models: list[ModelConfig], source: InputConfig, pool: int) -> tuple[list[int], int]:
    return max((memory.stack_values(model, source, pool) for model in models), key=lambda each: sum(each[0]) + each[1])


def _stack_maker(
    models: list[ModelConfig], pool: int, material: Material
) -> Callable[[int, int, OnProgress], FeatureLearner]:
    return lambda index, seed, on_progress: StackLearner(models[index], material.source, seed, on_progress, pool=pool)


def _rivals(config: EvaluationConfig, material: Material) -> Iterator[FeatureRow]:
    for name in config.rivals:
        if name == PIXELS:
            source = material.source
            values = source.in_channels * math.prod(source.image_size)
            yield FeatureRow(
                PIXELS,
                (FeatureView(PIXELS),),
                ("the images themselves",),
                lambda index, seed, on_progress: Pixels(),
                values=partial(_one_block, values),
            )
        elif name in RIVALS:
            candidates = RIVALS[name].candidates[: config.candidates]
            make, definition = _rival_maker(name, config, material), [repr(each) for each in candidates]
            views, words = (FeatureView(name),), tuple(map(str, candidates))
            yield FeatureRow(
                name, views, words, make, definition=definition, values=partial(_one_block, config.shape.features)
            )
        else:
            raise ConfigError(f"rivals: expected some of {', '.join((*RIVALS, PIXELS))}, got {name!r}")


def _rival_maker(
    name: str, config: EvaluationConfig, material: Material
) -> Callable[[int, int, OnProgress], FeatureLearner]:
    rival, shape, size = RIVALS[name], config.shape, material.source.image_size

    def make(index: int, seed: int, on_progress: OnProgress) -> FeatureLearner:
        return PooledFeatures(rival(shape, rival.candidates[index], seed), shape, size, on_progress)

    return make
