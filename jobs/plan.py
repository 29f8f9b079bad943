"""Sizes of a run before it starts, in memory and in exchanged bytes: the text of `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from rich.console import Console

from cluster.config import RunConfig, public
from cluster.text import count, size
from jobs.display import PLAIN
from jobs.plan_layout import layout_table, placement_lines, volumes_table
from jobs.plan_memory import DRIVER_BYTES, PROGRAM_BYTES, plan_disk, plan_features, plan_memory
from jobs.reporting import Table
from simmatch.config import LayerConfig
from simmatch.data.prepared import PreparedImages
from simmatch.data.sources import Dataset
from simmatch.documents import dump_yaml
from simmatch.geometry import PatchConfig
from simmatch.model import InputConfig, layer_inputs
from simmatch.sharding.rows import split_rows
from simmatch.solvers.block import TAIL as BLOCK_TAIL
from simmatch.solvers.tile import TAIL

COLUMNS = (
    "layer", "input", "output", "rows", "columns", "parameters", "activations", "cache", "exchange", "at a time",
)  # fmt: skip


@dataclass(frozen=True)
class LayerPlan:
    """One layer on the rank that holds most of it.

    Attributes
    ----------
    input, output: [C, H, W] before, and [K, H', W'] after the dynamics (before pooling).
    rows: channels per rank.
    columns: N = images per batch and replica × positions.
    parameters: values of W, M and V held.
    activation_bytes: full activities, own drive, and the solver's tiles.
    cache_bytes: encoded input of the layer for all training images, on the disk, where it is cached.
    exchange: how often shards exchange something: every 'iteration', 'block step' or 'update' of a batch.
    exchange_bytes: bytes that then reach a rank, for its replica's part of the batch.
    """

    input: tuple[int, int, int]
    output: tuple[int, int, int]
    rows: int
    columns: int
    parameters: int
    activation_bytes: int
    cache_bytes: int
    exchange: str
    exchange_bytes: int


def plan_layers(config: RunConfig, source: InputConfig, train_images: int) -> list[LayerPlan]:
    """Sizes of every layer."""
    inputs = layer_inputs(config.model, source)
    return [
        _plan_layer(config, layer, index, channels, extent, source.num_classes, train_images)
        for index, (layer, (channels, extent)) in enumerate(zip(config.model.layers, inputs, strict=True))
    ]


def _plan_layer(
    config: RunConfig,
    layer: LayerConfig,
    index: int,
    channels: int,
    extent: tuple[int, int],
    num_classes: int,
    train_images: int,
) -> LayerPlan:
    value_bytes, exact = 8 if config.dtype == "float64" else 4, config.reduce == "exact"
    patch = PatchConfig.of_layer(layer, channels, extent)
    height, width = patch.map_size(extent)
    rows = split_rows(layer.out_channels, config.mesh.channel)[0]
    columns = -(-layer.train.batch_size // config.mesh.data) * (layer.train.positions or height * width)
    classes = num_classes if layer.supervised else 0
    tile = min(columns, layer.dynamics.columns_per_tile(layer.out_channels))
    in_flight = layer.dynamics.tiles_in_flight if config.mesh.channel > 1 else 1
    slices = config.mesh.channel * (rows.padded + TAIL)
    tiles = in_flight * tile * (slices + 5 * rows.count)
    activations = columns * (layer.out_channels + rows.count)
    return LayerPlan(
        input=(channels, *extent),
        output=(layer.out_channels, height, width),
        rows=rows.count,
        columns=columns,
        parameters=rows.count * (patch.patch_size + layer.out_channels + classes),
        activation_bytes=value_bytes * (activations + tiles),
        cache_bytes=value_bytes * channels * extent[0] * extent[1] * train_images
        if index > 0 and config.cache_features and config.model.schedule == "greedy"
        else 0,
        exchange=EXCHANGES[layer.dynamics.exchange],
        exchange_bytes=(config.mesh.channel - 1)
        * slice_bytes(layer, rows.padded, columns, patch.patch_size, classes, value_bytes, exact=exact),
    )


FIXED_BYTES = torch.int64.itemsize
"""Of a fixed-point number."""

EXCHANGES = {"every_iteration": "iteration", "block": "block step", "gather_state": "update"}
"""How often each mode exchanges something."""


def slice_bytes(
    layer: LayerConfig,
    rows: int,
    columns: int,
    patch_size: int,
    classes: int,
    value_bytes: int,
    *,
    exact: bool = False,
) -> int:
    """Bytes from one owner to another in one exchange: activities and tails of a batch, or weights and statistics."""
    mode = layer.dynamics.exchange
    if mode == "gather_state":
        gained = classes if layer.label_gain > 0 else 0
        weights, statistics = patch_size + layer.out_channels + gained, patch_size + layer.out_channels + classes
        if exact:  # integers, with Σ y, and the magnitudes that scale them
            return value_bytes * (rows * weights + 1 + 4) + FIXED_BYTES * (rows * (statistics + 1) + 1)
        return value_bytes * (rows * (weights + statistics) + 2)  # a mark behind each
    tails = TAIL if mode == "every_iteration" else BLOCK_TAIL
    body_bytes = min(value_bytes, {"bfloat16": 2, "float32": 4}.get(layer.dynamics.exchange_dtype or "", value_bytes))
    return columns * (body_bytes * rows + value_bytes * tails)


def image_bytes(dataset: Dataset) -> tuple[int, int]:
    """Bytes of the images that every rank and the driver hold, and of those that they read from a node's cache."""
    parts = dataset.train_images, dataset.test_images
    held = sum(part.nbytes for part in parts if not isinstance(part, PreparedImages))
    return held, sum(part.shape.numel() for part in parts if isinstance(part, PreparedImages))


def rank_bytes(config: RunConfig, dataset: Dataset) -> float:
    """Memory of the host that a rank takes at its most, with the program itself."""
    phases = plan_memory(config, dataset.source, len(dataset.train_images))
    working = 0.0 if config.device == "cuda" else max(phase.total for phase in phases)
    return PROGRAM_BYTES + image_bytes(dataset)[0] + working


def print_plan(console: Console, config: RunConfig, dataset: Dataset) -> None:
    """The resolved configuration, the mesh, and tables of the layers and of the memory."""
    source, train_images = dataset.source, len(dataset.train_images)
    text = dump_yaml(public(config))
    console.print(text, **PLAIN)
    mesh = config.mesh
    console.print(f"mesh: {mesh}, {count(mesh.world_size, 'rank')} on {config.device}", highlight=False)
    for line in placement_lines(config):
        console.print(line, **PLAIN)
    layout_table(config, source).show(console)
    rows = [
        (
            str(index),
            "×".join(map(str, plan.input)),
            "×".join(map(str, plan.output)),
            f"{plan.rows} of {plan.output[0]}",
            plan.columns,
            plan.parameters,
            size(plan.activation_bytes),
            size(plan.cache_bytes),
            f"every {plan.exchange}" if mesh.channel > 1 else "none",
            size(plan.exchange_bytes),
        )
        for index, plan in enumerate(plan_layers(config, source, train_images))
    ]
    Table("per rank (the one with the most rows)", COLUMNS, rows).show(console)
    console.print(
        "columns: per update and replica; cache: encoded input of the layer, on the disk; exchange, at a time: when a "
        "rank receives something from the other shards, and how many bytes for all columns",
        highlight=False,
        soft_wrap=True,
    )
    if mesh.data * mesh.layer > 1:
        volumes_table(config, source).show(console)
    _print_memory(console, config, dataset)


def _print_memory(console: Console, config: RunConfig, dataset: Dataset) -> None:
    """Memory of rank 0 and the driver, and what goes to the disk."""
    images, stored = image_bytes(dataset)
    phases = plan_memory(config, dataset.source, len(dataset.train_images))
    rows = [
        (phase.phase, *map(size, (images, phase.features, phase.weights, phase.working, images + phase.total)))
        for phase in phases
    ]
    columns = ("phase", "images", "features", "weights", "working", "in all")
    which = "memory of rank 0, which needs most"
    if config.mesh.layer > 1:
        which += "; while layers learn, of the first rank of each stage"
    Table(which, columns, rows).show(console)
    place = "images: in every rank and in the driver"
    if config.device == "cuda":
        place += f", {size(images)} of the host's memory; all else is on the device"
    encoded = plan_features(config, dataset.source, len(dataset.train_images))
    shards = f"{size(stored)} of images, " if stored else ""
    past = stored + encoded - config.data.cache_bytes
    cache = (
        f"node cache: {size(stored + encoded - max(past, 0))} of each node's disk, for {shards}"
        f"{size(encoded)} of encoded images"
    )
    if past > 0:
        cache += "; more than data.cache_bytes: layers that are not read any more make room, and what then still does "
        cache += "not fit stays in memory"
    disk = plan_disk(config, dataset.source)
    for line in (
        f"{place}; features: encoded images in memory; working: batches, the solver, a whitening, a readout; "
        f"add {size(PROGRAM_BYTES)} for the program itself",
        f"driver: {size(DRIVER_BYTES + images)}",
        cache,
        f"disk: {size(disk.checkpoint)} for a checkpoint, {size(disk.constants)} written once, {size(disk.kept)} in "
        f"all for the checkpoints that are kept; {size(disk.model)} for the model",
    ):
        console.print(line, highlight=False, soft_wrap=True)
