"""Similarity-matching stacks as learners of the comparison: taught by the trainer that ships, in this process.

Encoding solves the dynamics to the layer's tolerance, as learning does; an exported model takes a fixed number of
iterations instead.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from jobs.evaluation.learners import BATCH, Cost, OnProgress, no_progress, num_active
from jobs.evaluation.material import UnitImages, in_batches
from jobs.evaluation.nonnegative import COUNTED_IMAGES, NonnegativeCodes
from simmatch.config import ModelConfig
from simmatch.extent import at_most, pooled_size
from simmatch.fit import Trainer
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import InputConfig, Stack, pooled
from simmatch.observer import Observer, Phase, Update
from simmatch.readout import decode


@dataclass
class EncodedLayer:
    """Images after one layer, in parts.

    Attributes
    ----------
    features: [n, F], activities on a small map.
    codes: [n, K], mean activities.
    active: nonzero activities, and all of them.
    seconds: of encoding, given the layer below.
    """

    features: list[Tensor] = field(default_factory=list)
    codes: list[Tensor] = field(default_factory=list)
    active: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    def add(self, activities: Tensor, pool: int) -> None:
        """The next images; maps are averaged down to `pool`, unless smaller already.

        Before the layer's power: exponents are for the readout to choose, from the same for all learners.
        """
        size = activities.shape[2], activities.shape[3]
        small = activities if (few := at_most(size, pool)) == size else F.adaptive_avg_pool2d(activities, few)
        self.features.append(rearrange(small, "b k h w -> b (k h w)"))
        self.codes.append(reduce(activities, "b k h w -> b k", "mean"))
        self.active = self.active[0] + num_active(activities), self.active[1] + activities.numel()


class StackLearner(Observer):
    """A stack that learns in this process: a block of features for each layer.

    Parameters
    ----------
    config: the layers, their geometry and training.
    source: shape and classes of the images.
    seed: of weights, order and drawn positions.
    on_progress: see `OnProgress`.
    pool: features are maps averaged down to so many rows and columns, unless smaller already.

    Attributes
    ----------
    depth: layers that have learnt, and encode.
    fit_seconds: learning time of each layer, with the encoding of its input and the scaling of its label weights.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: InputConfig,
        seed: int,
        on_progress: OnProgress = no_progress,
        *,
        pool: int = 4,
    ) -> None:
        self.config, self.source, self.on_progress, self.pool = config, source, on_progress, pool
        self.stack = Stack(config, source, seed=seed).eval()
        self.depth = len(config.layers)
        self.fit_seconds = [0.0] * self.depth
        self._iterations: list[float] = []
        self._images: UnitImages | None = None
        self._encoded: list[EncodedLayer] = []

    @torch.no_grad()
    def fit(self, images: UnitImages, labels: Tensor | None = None, depth: int | None = None) -> None:
        """Learn from images [N, C, H, W] in [0, 1]; labels [N] for the supervised layers.

        depth: learn, and from then on encode, the first layers only; None for all.

        Raises
        ------
        ValueError
            A supervised layer without labels.
        """
        self.depth = len(self.config.layers) if depth is None else depth
        self._images, self._encoded = images, [EncodedLayer() for _ in range(self.depth)]
        self._started = time.monotonic()
        Trainer(
            self.stack,
            images,
            labels,
            observer=self,
            depth=self.depth,
            encode_batch=BATCH,
            encode_last=True,
            to_tolerance=True,
        ).fit()
        self._iterations, x = [], images[:COUNTED_IMAGES]
        for index, config in enumerate(self.config.layers[: self.depth]):
            layer = self.stack.layer(index)
            codes = NonnegativeCodes(layer.lateral, config.dynamics.tolerance)
            self._iterations.append(codes.mean_iterations(layer.drive(x)))
            x = pooled(layer.solve(x).y, config)

    def updated(self, update: Update) -> None:
        self._lap(update.index)
        self.on_progress(f"layer {update.index}: learn", update.number, update.total)

    @contextmanager
    def encoding(self, index: int, layer: SimilarityMatchingConv2d) -> Iterator[None]:
        yield
        self._lap(index + 1)

    def learnt(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        self._lap(index)

    def encoded(self, index: int, activities: Tensor, passed: Tensor) -> None:
        self._encoded[index].add(activities, self.pool)

    def progress(self, phase: Phase, done: int, total: int, layer: int, images_per_second: float | None = None) -> None:
        self.on_progress(f"layer {layer}: {phase}", done, total)
        if phase == "encode" and done == total and self.config.layers[layer].supervised:
            self._lap(layer)

    def _lap(self, index: int) -> None:
        """Add the time since the last call to this layer."""
        now = time.monotonic()
        self.fit_seconds[index] += now - self._started
        self._started = now

    @torch.no_grad()
    def outputs(self, images: UnitImages) -> tuple[list[Tensor], Tensor | None]:
        """Features of every layer, and scores decoded from V if the last layer is supervised.

        `fit` has encoded the images that it learnt from; the first call with them returns that result.

        Returns
        -------
        [N, F] for each layer; [N, num_classes] or None.
        """
        if images is not self._images:
            self._encode(images)
        self._images, last = None, self.depth - 1
        blocks = [torch.cat(layer.features) for layer in self._encoded]
        codes = torch.cat(self._encoded[last].codes)
        for layer in self._encoded:
            layer.features, layer.codes = [], []
        decodes = self.config.layers[last].supervised
        return blocks, decode(codes, self.stack.layer(last).label) if decodes else None

    def _encode(self, images: UnitImages) -> None:
        self._encoded = [EncodedLayer() for _ in range(self.depth)]
        for number, x in enumerate(in_batches(images, BATCH)):
            for index, encoded in enumerate(self._encoded):
                started = time.monotonic()
                activities = self.stack.layer(index).solve(x).y
                x = pooled(activities, self.config.layers[index])
                encoded.seconds += time.monotonic() - started
                encoded.add(activities, self.pool)
            self.on_progress("encode", min((number + 1) * BATCH, len(images)), len(images))

    def seconds(self, depth: int) -> tuple[float, float]:
        """Seconds of learning, and of encoding the images encoded last, for the first `depth` layers."""
        return sum(self.fit_seconds[:depth]), sum(layer.seconds for layer in self._encoded[:depth])

    def active(self) -> list[float]:
        """Fraction of nonzero activities of each layer, over the images encoded last."""
        return [nonzero / max(every, 1) for nonzero, every in (layer.active for layer in self._encoded)]

    def cost(self, depth: int) -> Cost:
        """W, M, V and the whitening of the first `depth` layers. Operations: drive, and products with M.

        The dynamics are counted as they were on the first images learnt from, as those of the rivals that have some;
        an exported model takes `encode_iterations` of them.

        Raises
        ------
        ValueError
            Before learning.
        """
        if not self._iterations:
            raise ValueError("expected fit() before anything is counted, got a stack that has not learnt")
        trained = inference = operations = 0
        size = self.source.image_size
        for index, config in enumerate(self.config.layers[:depth]):
            layer = self.stack.layer(index)
            weights = layer.feedforward.numel() + layer.lateral.numel() + layer.label.numel()
            whitening = layer.whitening.numel() + layer.whitening_mean.numel() if layer.whiten else 0
            height, width = layer.patch.map_size(size)
            channels, patch = layer.out_channels, layer.patch.patch_size
            # the whitening is folded into the filter: inference holds W Π and an offset
            trained += weights + whitening
            inference += weights + (channels if layer.whiten else 0)
            operations += round(height * width * channels * (patch + self._iterations[index] * channels))
            size = pooled_size((height, width), config.pool)
        return Cost(trained, inference, operations)
