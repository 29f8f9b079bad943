"""Memory and disk of a run before it starts: what each phase holds on rank 0, which holds most, and in the driver.

The numbers count tensors. Each rank needs about `PROGRAM_BYTES` for the program itself besides. Main job with 10,000
images, two ranks: rank 0 planned 1.75 GB, resident at its most 2.04 GB; driver 0.92 and 0.97 GB.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from cluster.config import RunConfig
from cluster.text import size
from simmatch.config import ConfigError, LayerConfig
from simmatch.extent import at_most
from simmatch.geometry import PatchConfig
from simmatch.inputs import RESIDENT_BYTES
from simmatch.model import InputConfig, layer_inputs, output_shape
from simmatch.moments import ROWS
from simmatch.sharding.passing import IN_FLIGHT
from simmatch.sharding.rows import split_rows
from simmatch.solvers.tile import TAIL
from simmatch.stages import stages_of

PROGRAM_BYTES, DRIVER_BYTES = 0.6e9, 0.9e9
"""Resident memory of a rank, and of the driver, without data: the program and its libraries."""

SOLVE_COPIES = 5
"""Matrices [P, P] in float64 that a whitening holds at once: C_x, its eigenvectors, and LAPACK's workspace."""

INDEX_BYTES = 24
"""Of the index of a drawn patch, while the indices are sorted."""

READOUT_COPIES = 3
"""Matrices [F, F] in float64 that a ridge readout of F features holds at once."""

EIGENVALUES_S = 2e-10
"""Processor seconds of the eigenvalues of a matrix [P, P], over P³: 0.19e-9 to 0.25e-9 for P = 512 to 3,072."""

MOST_WHITENED = 32_766
"""Largest P for which LAPACK can count its workspace of 1 + 6 P + 2 P² numbers."""

OBJECTIVE_COLUMNS = 4096
"""Columns on which a measured update computes its objective."""


@dataclass(frozen=True)
class PhaseMemory:
    """Bytes that rank 0 holds in one phase, at its most.

    Attributes
    ----------
    features: encoded images: a block, or what a GPU keeps while a layer learns from it.
    weights: of all layers, whole, and of its own rows while they learn.
    working: of a batch, a calibration or a readout: patches, activities, the solver, gathered weights and statistics.
    """

    phase: str
    features: float
    weights: float
    working: float

    @property
    def total(self) -> float:
        return self.features + self.weights + self.working


@dataclass(frozen=True)
class LayerSizes:
    """Counts of values of one layer.

    Attributes
    ----------
    input, activities, output, features: of one image: before the layer, after the dynamics, after pooling, and as a
        readout sees it.
    patch, channels, rows: P, K, and the rows of rank 0.
    images, columns: of this replica's part of a batch.
    whole, own: of W, M, V and the whitening: of the whole layer, and of the rows of rank 0.
    """

    config: LayerConfig
    input: int
    activities: int
    output: int
    features: int
    patch: int
    channels: int
    rows: int
    classes: int
    images: int
    columns: int

    @property
    def width(self) -> int:
        """Of a row of W, M and V."""
        return self.patch + self.channels + self.classes

    @property
    def whitening(self) -> int:
        return self.patch * (self.patch + 1) if self.config.whiten else 0

    @property
    def whole(self) -> int:
        return self.channels * self.width + self.whitening

    @property
    def own(self) -> int:
        return self.rows * self.width + self.whitening


def layer_sizes(config: RunConfig, source: InputConfig) -> list[LayerSizes]:
    """Sizes of every layer."""
    sizes = []
    for layer, (channels, extent) in zip(config.model.layers, layer_inputs(config.model, source), strict=True):
        patch = PatchConfig.of_layer(layer, channels, extent)
        positions = math.prod(patch.map_size(extent))
        neurons, *passed = output_shape(layer, patch, extent)
        images = -(-layer.train.batch_size // config.mesh.data)
        sizes.append(
            LayerSizes(
                config=layer,
                input=channels * math.prod(extent),
                activities=layer.out_channels * positions,
                output=neurons * math.prod(passed),
                features=neurons * math.prod(at_most((passed[0], passed[1]), config.model.feature_pool)),
                patch=patch.patch_size,
                channels=layer.out_channels,
                rows=split_rows(layer.out_channels, config.mesh.channel)[0].count,
                classes=source.num_classes if layer.supervised else 0,
                images=images,
                columns=images * (layer.train.positions or positions),
            )
        )
    return sizes


def check_whitening(config: RunConfig, source: InputConfig, memory_bytes: float | None = None) -> None:
    """Refuse a layer whose whitening cannot be solved: its patches have too many values.

    memory_bytes: of the machine of rank 0, which solves it; None if that is unknown.

    Raises
    ------
    ConfigError
        P is above `MOST_WHITENED`, or the matrices [P, P] do not fit into the memory.
    """
    for index, layer in enumerate(layer_sizes(config, source)):
        needed = _solving(layer)
        if layer.config.whiten and (layer.patch > MOST_WHITENED or needed > (memory_bytes or math.inf)):
            limit = (
                f"{MOST_WHITENED:,} values" if layer.patch > MOST_WHITENED else f"what {size(memory_bytes or 0)} hold"
            )
            raise ConfigError(
                f"model.layers.{index}.whiten: expected patches of at most {limit}, got {layer.patch:,} values, whose "
                f"whitening needs {size(needed)} and about {EIGENVALUES_S * layer.patch**3 / 3600:.2g} hours of a "
                "processor; lower pool or out_channels of the layer below, or the kernel"
            )


def plan_memory(config: RunConfig, source: InputConfig, train_images: int) -> list[PhaseMemory]:
    """What rank 0 holds in every phase of a run, encoded images being on the disk; while layers learn together, the
    first rank of every stage."""
    value = 8 if config.dtype == "float64" else 4
    layers = layer_sizes(config, source)
    stack = value * sum(layer.whole for layer in layers)
    together = config.model.schedule == "together"
    phases = _together(config, source, layers, train_images) if together else []
    scratch = 0  # of the solvers that have encoded
    kept = 0  # values of a readout's input, per image
    block = min(config.encode_batch, train_images)
    for index, layer in enumerate(layers):
        own = value * layer.own
        resident = value * layer.input * train_images if index > 0 and config.cache_features else 0
        if config.device != "cuda" or resident > RESIDENT_BYTES:
            resident = 0
        stage, calibration = f"layer {index}", _calibration(config, layer, value, train_images)
        update = value * (2 * layer.rows * layer.width + _batch(config, layer))
        if not together:
            phases.append(PhaseMemory(f"{stage}, calibrate", 0, stack + own, scratch + calibration))
            phases.append(PhaseMemory(f"{stage}, learn", resident, stack + own, scratch + update))
        if index in config.model.feature_layers():
            kept += layer.features
        scratch += value * _scratch(config, layer)
        encoding = value * block * (2 * layer.input + 3 * layer.activities)
        phases.append(PhaseMemory(f"{stage}, encode", 2 * value * layer.output * block, stack, scratch + encoding))
    return [*phases, PhaseMemory("readout", 0, stack, scratch + _readout(config, kept, value, train_images))]


def plan_features(config: RunConfig, source: InputConfig, train_images: int) -> float:
    """Bytes of encoded images on the disk of each node: outputs of all layers, and patches of dense layers.

    A node holds them all where a layer learns from them, and else those that its ranks have made.
    """
    value = 8 if config.dtype == "float64" else 4
    layers = layer_sizes(config, source)
    read = config.cache_features and config.model.schedule == "greedy"  # by layers that learn
    dense = sum(layer.input for layer in layers[1:] if read and layer.activities == layer.channels)
    return value * train_images * (sum(layer.output for layer in layers) + dense)


def _together(config: RunConfig, source: InputConfig, layers: list[LayerSizes], train_images: int) -> list[PhaseMemory]:
    """What the first rank of every stage holds: rows of all layers of the stage, and batches on their way."""
    value, phases = 8 if config.dtype == "float64" else 4, []
    stack = value * sum(layer.whole for layer in layers)
    stages = stages_of(config.model, source, config.mesh.layer)
    for stage, indices in enumerate(stages):
        own = [layers[index] for index in indices]
        batch = config.model.layers[0].train.batch_size
        passing = value * batch * IN_FLIGHT * (own[-1].output if stage + 1 < len(stages) else 0)
        encoding = value * batch * sum(2 * layer.input + 3 * layer.activities for layer in own)
        updates = [value * (2 * layer.rows * layer.width + _batch(config, layer)) for layer in own]
        calibration = max(_calibration(config, layer, value, train_images) for layer in own)
        name = f"stage {stage}" if len(stages) > 1 else "all layers"
        weights = stack + value * sum(layer.own for layer in own)
        phases.append(PhaseMemory(f"{name}, calibrate", 0.0, weights, encoding + calibration))
        phases.append(PhaseMemory(f"{name}, learn", 0.0, weights, max(updates) + encoding + passing))
    return phases


def _readout(config: RunConfig, features: int, value: int, train_images: int) -> float:
    """Moments while they are summed and solved, or collected features and a copy of them; and a chunk with a copy."""
    probe, chunk = config.probe, 2 * value * features * config.encode_batch
    images = probe.train_images or train_images
    if probe.readout != "ridge":
        return chunk + 2 * min(value * features * images, probe.max_feature_bytes)
    if images >= features:
        return chunk + 8 * READOUT_COPIES * features**2
    return chunk + (value + 2 * 8) * features * images + 2 * 8 * images**2


def _calibration(config: RunConfig, layer: LayerSizes, value: int, train_images: int) -> float:
    """Patches of a block of images, the index of those that are drawn, and moments while they are summed and solved."""
    drawn = min(layer.config.whiten_patches, train_images * layer.activities // layer.channels)
    block = min(config.encode_batch, train_images)
    rows = min(ROWS, block * layer.activities // layer.channels)
    return value * (layer.input * block + 4 * layer.patch * rows) + INDEX_BYTES * drawn + _solving(layer)


def _solving(layer: LayerSizes) -> int:
    """Bytes of the matrices of a whitening while it is solved."""
    return 8 * SOLVE_COPIES * layer.patch**2 if layer.config.whiten else 0


def _scratch(config: RunConfig, layer: LayerSizes) -> int:
    """Values that the solver keeps from batch to batch: six for each activity of a tile, in tiles of three widths."""
    columns = config.encode_batch * layer.activities // layer.channels
    return 3 * 6 * layer.channels * min(columns, layer.config.dynamics.columns_per_tile(layer.channels, config.device))


def _batch(config: RunConfig, layer: LayerSizes) -> int:
    """Values of a batch that learns."""
    dynamics, ranks = layer.config.dynamics, config.mesh.channel
    explicit = layer.config.train.positions is not None or layer.columns == layer.images
    patches = layer.columns * layer.patch if explicit else layer.images * layer.input
    objective = min(layer.columns, OBJECTIVE_COLUMNS) * (layer.patch + layer.channels)
    exact = config.reduce == "exact"
    if dynamics.exchange == "gather_state" and (ranks > 1 or exact):
        value = 8 if config.dtype == "float64" else 4
        copies = 3 + 4 * 8 // value if exact else 5  # integers of a rank, sent, received, and of a block
        columns, gathered = -(-layer.columns // ranks), copies * layer.channels * layer.width
        return gathered + patches + objective + 5 * columns * layer.channels
    tile = min(layer.columns, dynamics.columns_per_tile(layer.channels))
    in_flight = dynamics.tiles_in_flight if ranks > 1 else 1
    tiles = in_flight * tile * (layer.channels + ranks * TAIL + 5 * layer.rows)
    return patches + objective + layer.columns * (layer.channels + layer.rows) + tiles


@dataclass(frozen=True)
class DiskPlan:
    """Bytes in the run directory.

    Attributes
    ----------
    constants: written once: whitenings and layers that have learnt.
    checkpoint: the largest of one commit, of all ranks.
    kept: of the checkpoints that are kept, and the constants.
    model: of the exported model.
    """

    constants: float
    checkpoint: float
    kept: float
    model: float


def plan_disk(config: RunConfig, source: InputConfig) -> DiskPlan:
    """What a run writes into its directory, without records and figures."""
    value, layers = 8 if config.dtype == "float64" else 4, layer_sizes(config, source)
    commits = [value * layer.channels * layer.width for layer in layers]
    if config.model.schedule == "together":  # every checkpoint holds all layers
        commits = [sum(commits)]
    model = value * sum(layer.whole for layer in layers)
    constants = model - commits[-1]
    kept = config.checkpoint.keep + (len(commits) > 1)  # one of an earlier layer
    return DiskPlan(constants, max(commits), constants + kept * max(commits), model)
