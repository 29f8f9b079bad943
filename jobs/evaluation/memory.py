"""Memory of a comparison, before anything starts: the images in memory, and what a unit holds beside them.

Images of a prepared data set are read batch by batch, so what grows with their number is features. Numbers count
tensors; a process takes about `jobs.plan_memory.PROGRAM_BYTES` for the program itself besides.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from cluster.text import size
from jobs.evaluation.corruptions import CORRUPTIONS
from jobs.evaluation.kernel_readout import LANDMARKS
from jobs.evaluation.material import Material
from simmatch.config import ConfigError, ModelConfig
from simmatch.extent import at_most, pooled_size
from simmatch.geometry import PatchConfig
from simmatch.model import InputConfig, layer_inputs

VALUE_BYTES = 4
"""Images and features are float32."""

READOUT_COPIES = 4
"""Of the features that a readout is learnt from, at its most: those of the labelled images, raised to a power, centred,
and squared."""


def image_bytes(*materials: Material | None) -> int:
    """Of images in memory; those of a prepared data set are not."""
    parts = [part for each in materials if each is not None for part in (each.train, each.held_out, each.test)]
    return sum(part.images.nbytes for part in parts if isinstance(part.images, Tensor))


def features_bytes(material: Material, blocks: Sequence[int], view: int, *, landmarks: int = LANDMARKS) -> int:
    """Of the features of all images, and of what reading them out takes.

    Parameters
    ----------
    blocks: features of an image in each block of the learner.
    view: most features of an image that a readout sees.
    landmarks: most of a kernel readout; 0: there is none.
    """
    images = len(material.train) + len(material.held_out) + len(material.test)
    readout = max(READOUT_COPIES * view, 2 * view + min(landmarks, len(material.train)))
    return VALUE_BYTES * images * (sum(blocks) + view + readout)


def learning_bytes(material: Material, blocks: Sequence[int], passed: int) -> int:
    """Of the features of the training images, and of the maps between the layers of a stack.

    passed: values of an image before and after the layer where these are most.
    """
    return VALUE_BYTES * len(material.train) * (sum(blocks) + passed)


def selected_bytes(source: InputConfig, outliers: int, corrupted: int) -> int:
    """Of images that a measurement alters: a copy with noise beside those it was made of, and every corruption."""
    values = source.in_channels * math.prod(source.image_size)
    return VALUE_BYTES * values * max(2 * outliers, (1 + len(CORRUPTIONS)) * corrupted)


def stack_values(model: ModelConfig, source: InputConfig, pool: int) -> tuple[list[int], int]:
    """Values of an image in a stack: features of each layer, and most values before and after a layer but the first."""
    inputs = layer_inputs(model, source)
    blocks, passed = [], []
    for config, (channels, extent) in zip(model.layers, inputs, strict=True):
        size = PatchConfig.of_layer(config, channels, extent).map_size(extent)
        blocks.append(config.out_channels * math.prod(at_most(size, pool)))
        passed.append(config.out_channels * math.prod(pooled_size(size, config.pool)))
    between = [0, *passed[:-1]]
    return blocks, max(before + after for before, after in zip(between, [*passed[:-1], 0], strict=True))


def memory_line(
    unit_bytes: Mapping[str, int], *materials: Material | None, limit: float | None, workers: int = 1, threads: int = 1
) -> str:
    """What a comparison takes in memory, in one line.

    Parameters
    ----------
    unit_bytes: name → bytes of each unit of work, besides images.
    materials: all images.
    limit: memory of the machine that does all of the work; None: a cluster does it.
    workers: processes at a time, each with images of its own; threads: units at a time in each.

    Raises
    ------
    ConfigError
        It is more than the limit.
    """
    name = max(unit_bytes, key=lambda each: unit_bytes[each])
    held = workers * image_bytes(*materials)
    needed = held + workers * threads * unit_bytes[name]
    images = sum(len(part) for each in materials if each for part in (each.train, each.held_out, each.test))
    words = f"{size(needed)} for {images:,} images"
    if workers * threads > 1:
        words += f" and {workers * threads} units of work at a time"
    if limit is not None and needed > limit:
        raise ConfigError(
            f"data.train_images: expected a comparison that fits this machine's memory of {size(limit)}, got {words}, "
            f"most of it for {name}"
        )
    return f"memory: up to {words}; {size(held)} are images, most of the rest is for {name}"
