"""What all learners of features have in common, so that the same readouts see the features of all.

A `Learner` sees images without labels: whole ones, in an order of the seed that is the same for all of them, or patches
at random positions of random images. It takes as many as it needs, and turns an image into K maps of nonnegative
activities. `PooledFeatures` average-pools the maps to the same size; a stack of layers gives a block of features for
each layer (`FeatureLearner`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from jobs.evaluation.material import UnitImages, in_batches
from simmatch.config import Frozen, NonNegativeInt, PositiveInt

BATCH = 250
"""Images encoded at a time."""

OnProgress = Callable[[str, int, int], None]
"""Called with what is being done, how many parts of it are done, and how many there are."""


def no_progress(what: str, done: int, total: int) -> None:
    """An `OnProgress` that does nothing."""


def num_active(maps: Tensor) -> int:
    """Number of activities above zero, of maps ≥ 0; numpy counts several times as fast as torch.

    >>> num_active(torch.tensor([[0.0, 2.0], [0.5, 0.0]]))
    2
    """
    return int(np.count_nonzero(maps.numpy()))


class Shape(Frozen):
    """Geometry that all learners share."""

    channels: PositiveInt
    """K, features per position."""

    kernel_size: PositiveInt
    stride: PositiveInt = 1
    padding: NonNegativeInt = 0

    pool: PositiveInt = 4
    """Height and width of the map that readouts see."""

    @property
    def features(self) -> int:
        """Values of an image that readouts see."""
        return self.channels * self.pool**2


@dataclass(frozen=True)
class Cost:
    """Parameters of a learner, and the work for an image: multiply–adds, without pooling and readout.

    Attributes
    ----------
    trained: parameters that learning changed (an autoencoder's decoder included).
    inference: parameters that encoding needs.
    operations: multiply–adds to encode one image.
    """

    trained: int
    inference: int
    operations: int


class Learner(Protocol):
    """A learner of features without labels."""

    name: str

    def fit(self, images: UnitImages) -> None:
        """Learn from images [N, C, H, W] in [0, 1]."""

    def maps(self, images: Tensor) -> Tensor:
        """Activities [B, K, H', W'] ≥ 0 of images [B, C, H, W] in [0, 1], float32."""

    def cost(self, image_size: tuple[int, int]) -> Cost:
        """Parameters, and operations for an image of this height and width."""


class FeatureLearner(Protocol):
    """A learner as the comparison sees it: blocks of features, one for each layer."""

    def fit(self, images: UnitImages, labels: Tensor, depth: int | None = None) -> None:
        """Learn the first `depth` blocks, or all; supervised layers use the labels."""

    def outputs(self, images: UnitImages) -> tuple[list[Tensor], Tensor | None]:
        """Features [N, F] of each block; class scores of the learner itself, or None."""

    def cost(self, depth: int) -> Cost:
        """Cost of the first `depth` blocks."""

    def seconds(self, depth: int) -> tuple[float, float]:
        """Seconds of learning, and of encoding the latest images, in the first `depth` blocks."""

    def active(self) -> list[float]:
        """Share of nonzero activities per block over the latest images; empty if it is not counted."""


class PooledFeatures:
    """A learner of one layer: one block, its maps average-pooled."""

    def __init__(self, learner: Learner, shape: Shape, image_size: tuple[int, int], on_progress: OnProgress) -> None:
        self.learner, self.shape, self.image_size, self.on_progress = learner, shape, image_size, on_progress
        self._active: list[float] = []
        self._fit_seconds = self._encode_seconds = 0.0

    def fit(self, images: UnitImages, labels: Tensor, depth: int | None = None) -> None:
        started = time.monotonic()
        self.learner.fit(images)
        self._fit_seconds = time.monotonic() - started

    @torch.no_grad()
    def outputs(self, images: UnitImages) -> tuple[list[Tensor], Tensor | None]:
        features, active, values, started = [], 0, 0, time.monotonic()
        for x in in_batches(images, BATCH):
            maps = self.learner.maps(x)
            active, values = active + num_active(maps), values + maps.numel()
            features.append(rearrange(F.adaptive_avg_pool2d(maps, self.shape.pool), "b k h w -> b (k h w)"))
            self.on_progress("encode", len(features) * BATCH, len(images))
        self._active, self._encode_seconds = [active / max(values, 1)], time.monotonic() - started
        return [torch.cat(features)], None

    def cost(self, depth: int) -> Cost:
        return self.learner.cost(self.image_size)

    def seconds(self, depth: int) -> tuple[float, float]:
        return self._fit_seconds, self._encode_seconds

    def active(self) -> list[float]:
        return self._active


class Pixels:
    """The images themselves as features: nothing is learnt."""

    def fit(self, images: UnitImages, labels: Tensor, depth: int | None = None) -> None:
        pass

    def outputs(self, images: UnitImages) -> tuple[list[Tensor], Tensor | None]:
        return [rearrange(images[:], "b c h w -> b (c h w)")], None

    def cost(self, depth: int) -> Cost:
        return Cost(0, 0, 0)

    def seconds(self, depth: int) -> tuple[float, float]:
        return 0.0, 0.0

    def active(self) -> list[float]:
        return []
