"""Who holds what, and what moves along each axis of the mesh: tables of `--dry-run`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from cluster.allocation import allocation
from cluster.config import RunConfig
from cluster.layout import RankInfo, idle_gpus, layout_lines, oversubscribed, threads_per_rank
from cluster.network import LOOPBACK
from cluster.text import count, size
from jobs.plan_memory import LayerSizes, layer_sizes
from jobs.ray_session import embeds_ray
from jobs.reporting import Table
from simmatch.model import InputConfig
from simmatch.sharding.rows import split_rows
from simmatch.stages import stages_of

MOST_RANKS = 16
"""Ranks in a table."""


def stages_in(config: RunConfig, source: InputConfig) -> list[range]:
    """The layers of each stage."""
    return stages_of(config.model, source, config.mesh.layer)


def some(layers: range) -> str:
    """Layers for a table.

    >>> some(range(1, 2)), some(range(0, 3))
    ('1', '0 to 2')
    """
    return str(layers.start) if len(layers) == 1 else f"{layers.start} to {layers.stop - 1}"


def layout_table(config: RunConfig, source: InputConfig) -> Table:
    """The place of every rank, and the channels that it owns of the layers of its stage."""
    mesh, stages = config.mesh, stages_in(config, source)
    rows = []
    for rank in range(min(mesh.world_size, MOST_RANKS)):
        place = mesh.place(rank)
        layers = stages[place.stage]
        own = [split_rows(config.model.layers[index].out_channels, mesh.channel)[place.owner] for index in layers]
        channels = ", ".join(f"{part.start} to {part.stop - 1}" for part in own)
        rows.append((str(rank), place.replica, place.stage, some(layers), channels))
    title = "ranks" if mesh.world_size <= MOST_RANKS else f"the first {MOST_RANKS} of {mesh.world_size} ranks"
    return Table(title, ("rank", "replica", "stage", "layers", "channels of each layer"), rows)


def placement_lines(config: RunConfig) -> list[str]:
    """Where ranks will run, as far as it is known before they start: on this machine, or wherever Ray places them."""
    if not embeds_ray():
        return ["placement: shown when the run starts, as Ray decides; ranks that are neighbours share a node"]
    held, ranks = allocation(config.cluster.interface, LOOPBACK), config.mesh.world_size
    gpus = held.gpus if config.device == "cuda" else ()
    planned = [RankInfo(rank, 0, replace(held, gpus=gpus[rank : rank + 1])) for rank in range(ranks)]
    threads = config.cluster.threads_per_rank or threads_per_rank(planned)
    lines = [f"placement: {line}" for line in layout_lines(planned)]
    lines.append(f"threads: {count(threads, 'thread')} for each rank")
    idle = idle_gpus(config, len(held.gpus) - len(gpus[:ranks]))
    return lines + oversubscribed(planned, threads) + ([] if idle is None else [idle])


@dataclass(frozen=True)
class Volume:
    """What moves along an axis in one update.

    Attributes
    ----------
    axis: `data` or `layer`; for `channel` see `jobs.plan`.
    what: what it is, and between whom.
    received: bytes that reach a rank.
    """

    axis: str
    what: str
    received: int


def volumes(config: RunConfig, source: InputConfig) -> list[Volume]:
    """What replicas and stages exchange in an update of every layer, on the rank with the most rows."""
    value, mesh, sizes = 8 if config.dtype == "float64" else 4, config.mesh, layer_sizes(config, source)
    found = [
        Volume("data", f"statistics of layer {index}", _summed(layer, config))
        for index, layer in enumerate(sizes)
        if mesh.data > 1
    ]
    for stage, layers in enumerate(stages_in(config, source)[1:], 1):
        batch = config.model.layers[0].train.batch_size
        what = f"activities from stage {stage - 1} to stage {stage}"
        found.append(Volume("layer", what, value * (batch * sizes[layers.start].input + 1)))  # and whether to stop
    return found


def _summed(layer: LayerSizes, config: RunConfig) -> int:
    """Bytes of a sum over replicas: each adds a part of the values, and sends its sums to the others.

    With `reduce: exact` they are integers of eight bytes, with Σ y.
    """
    replicas, exact = config.mesh.data, config.reduce == "exact"
    value = 8 if exact or config.dtype == "float64" else 4
    return value * 2 * (replicas - 1) * -(-layer.rows * (layer.width + exact) // replicas)


def volumes_table(config: RunConfig, source: InputConfig) -> Table:
    """What moves along the axes `data` and `layer`."""
    rows = [(volume.what, volume.axis, size(volume.received)) for volume in volumes(config, source)]
    return Table("to a rank, once per update", ("what", "axis", "bytes"), rows)
