"""Similarity-matching stacks as learners: greedy, layer by layer, in this process, with nothing flowing backward.

A layer learns on the label-free, pooled activity of the layers below. Encoding solves the dynamics to the layer's
tolerance, as learning does (an exported model takes a fixed number of iterations instead). `jobs.pretrain` trains the
same stacks on a cluster; here they are small enough for one process.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor

from jobs.evaluation.learners import Cost
from jobs.evaluation.nonnegative import COUNTED_IMAGES, mean_iterations
from simmatch.config import ModelConfig
from simmatch.data.order import epoch_order, steps_per_epoch
from simmatch.geometry import draw_positions
from simmatch.labels import one_hot
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import InputConfig, Stack, pooled
from simmatch.readout import decode
from simmatch.seeding import seeded

BATCH = 250
"""Images encoded at a time."""

Seen = Callable[[str, int, int], None]
"""Called with what is being done, how much of it, of how much."""


def unseen(_: str, __: int, ___: int) -> None:
    """Nobody watches."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """Images after the first layers of a stack.

    Attributes
    ----------
    images: [N, C, H, W].
    passed: what the last of these layers passes on.
    blocks: features [N, F] of each of these layers.
    active: its share of nonzero activities.
    seconds: what it took, given the layer below.
    codes: mean activities [N, K] of the last of these layers.
    """

    images: Tensor
    passed: Tensor
    blocks: list[Tensor]
    active: list[float]
    seconds: list[float]
    codes: Tensor


class StackLearner:
    """A stack that learns in this process.

    Parameters
    ----------
    config: the layers, their geometry and training.
    source: shape and classes of the images.
    seed: of weights, order and drawn positions.
    seen: told of progress.
    pool: features are maps averaged down to so many rows and columns, unless smaller already.

    Attributes
    ----------
    active_fraction: of each layer's channels, over the images that were encoded last.
    encode_seconds: that these images took in each layer.
    fit_seconds: that each layer took to learn, its input included.
    """

    def __init__(
        self, config: ModelConfig, source: InputConfig, seed: int, seen: Seen = unseen, *, pool: int = 4
    ) -> None:
        self.config, self.source, self.seed, self.seen, self.pool = config, source, seed, seen, pool
        self.stack = Stack(config, source, seed=seed).eval()
        self.depth = len(config.layers)
        self.active_fraction = [0.0] * self.depth
        self.encode_seconds = [0.0] * self.depth
        self.fit_seconds = [0.0] * self.depth
        self._iterations: list[float] = []
        self._known: Encoded | None = None

    @torch.no_grad()
    def fit(self, images: Tensor, labels: Tensor | None = None, depth: int | None = None) -> None:
        """Learn from images [N, C, H, W] in [0, 1]; labels [N] for the supervised layers.

        depth: learn, and from then on encode, the first layers only; None for all.

        Raises
        ------
        ValueError
            A supervised layer without labels.
        """
        self._known, self.depth = None, len(self.config.layers) if depth is None else depth
        for index, config in enumerate(self.config.layers[: self.depth]):
            if config.supervised and labels is None:
                raise ValueError(f"labels: expected one for every image, layer {index} is supervised, got none")
            started = time.monotonic()
            self._learn(index, images, labels if config.supervised else None)
            self.fit_seconds[index] = time.monotonic() - started
        self._iterations = self._count(images[:COUNTED_IMAGES])

    def _count(self, x: Tensor) -> list[float]:
        """Mean iterations of the dynamics of a column of x [N, C, H, W], for each layer."""
        found = []
        for index, config in enumerate(self.config.layers[: self.depth]):
            layer = self.stack.layer(index)
            found.append(mean_iterations(layer.drive(x), layer.lateral, config.dynamics.tolerance))
            x = pooled(layer.solve(x).y, config)
        return found

    def _learn(self, index: int, images: Tensor, labels: Tensor | None) -> None:
        layer, config = self.stack.layer(index), self.config.layers[index]
        train = config.train
        count = min(train.images or len(images), len(images))  # settings are tried on fewer images
        orders = [epoch_order(len(images), seed=self.seed, epoch=epoch, images=count) for epoch in range(train.epochs)]
        measured = torch.arange(min(config.whiten_images, len(images)))
        wanted = torch.unique(torch.cat([*orders, *([measured] if layer.whiten or layer.label_gain else [])]))
        inputs = self._below(images if len(wanted) == len(images) else images[wanted], index)
        layer.calibrate(inputs[wanted < len(measured)], config.whiten_patches)
        per_epoch = steps_per_epoch(len(images), train.batch_size, images=count)
        for epoch, order in enumerate(orders):
            places = torch.searchsorted(wanted, order)
            for step, chosen in enumerate(torch.split(places, train.batch_size)):
                self._update(layer, inputs[chosen], None if labels is None else labels[wanted[chosen]], train.positions)
                self.seen(f"layer {index}: learn", epoch * per_epoch + step + 1, train.epochs * per_epoch)
        if labels is not None:
            self._settle(layer, inputs, labels[wanted])

    def _update(self, layer: SimilarityMatchingConv2d, x: Tensor, labels: Tensor | None, positions: int | None) -> None:
        """One batch; from drawn positions, if so configured."""
        map_size = layer.patch.map_size((x.shape[2], x.shape[3]))
        drawn = None
        if positions is not None and positions < map_size[0] * map_size[1]:
            drawn = draw_positions(positions, len(x), map_size, seeded("positions", layer.seed, int(layer.updates)))
        layer.partial_fit(layer.prepare(x, drawn), labels)

    def _settle(self, layer: SimilarityMatchingConv2d, inputs: Tensor, labels: Tensor) -> None:
        """V takes the length of label-free activity."""
        yz = torch.zeros_like(layer.label)
        zz = yz.new_zeros(layer.num_classes, layer.num_classes)
        for x, part in zip(torch.split(inputs, BATCH), torch.split(labels, BATCH), strict=True):
            z = one_hot(part, layer.num_classes, layer.label)
            yz.add_(reduce(layer.solve(x).y, "b k h w -> k b", "mean") @ z.T)
            zz.add_(z @ z.T)
        layer.settle_label(yz, zz)

    def _below(self, images: Tensor, index: int) -> Tensor:
        """Input of a layer for images; known again when these images are asked for next."""
        if index == 0:
            return images
        self._known = self._encode(images, index, f"layer {index}: encode its input")
        return self._known.passed

    def _encode(self, images: Tensor, depth: int, words: str) -> Encoded:
        """The first `depth` layers on images, beginning with what is known of them."""
        known = self._known if self._known is not None and self._known.images is images else None
        self._known = None
        first = 0 if known is None else len(known.blocks)
        if known is not None and first == depth:
            return known
        start = images if known is None else known.passed
        parts: list[list[Tensor]] = [[] for _ in range(first, depth)]
        active, seconds, passed, codes = [0.0] * (depth - first), [0.0] * (depth - first), [], []
        for x in torch.split(start, BATCH):
            for place, config in enumerate(self.config.layers[first:depth]):
                started = time.monotonic()
                y = self.stack.layer(first + place).solve(x).y
                x = pooled(y, config)
                seconds[place] += time.monotonic() - started
                active[place] += float((y > 0).double().mean()) * len(y) / len(images)
                # before the power: exponents are for the readout to choose, from the same for all learners
                small = F.adaptive_avg_pool2d(y, self.pool) if y.shape[-1] > self.pool else y
                parts[place].append(rearrange(small, "b k h w -> b (k h w)"))
            passed.append(x)
            codes.append(reduce(y, "b k h w -> b k", "mean"))
            self.seen(words, len(passed) * BATCH, len(images))
        blocks = [torch.cat(each) for each in parts]
        if known is not None:
            blocks, active, seconds = known.blocks + blocks, known.active + active, known.seconds + seconds
        return Encoded(images, torch.cat(passed), blocks, active, seconds, torch.cat(codes))

    @torch.no_grad()
    def outputs(self, images: Tensor) -> tuple[list[Tensor], Tensor | None]:
        """Mean activities of every layer on a small map, and scores decoded from V where the last is supervised.

        Tells `active_fraction` and `encode_seconds`.

        Returns
        -------
        [N, F] for each layer; [N, num_classes] or None.
        """
        found, last = self._encode(images, self.depth, "encode"), self.depth - 1
        self.active_fraction, self.encode_seconds = found.active, found.seconds
        decodes = self.config.layers[last].supervised
        return found.blocks, decode(found.codes, self.stack.layer(last).label) if decodes else None

    def cost(self, depth: int | None = None) -> Cost:
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
        for index, config in enumerate(self.config.layers[: self.depth if depth is None else depth]):
            layer = self.stack.layer(index)
            weights = layer.feedforward.numel() + layer.lateral.numel() + layer.label.numel()
            whitening = layer.whitening.numel() + layer.whitening_mean.numel() if layer.whiten else 0
            height, width = layer.patch.map_size(size)
            channels, patch = layer.out_channels, layer.patch.patch_size
            # the whitening is folded into the filter: inference holds W Π and an offset
            trained += weights + whitening
            inference += weights + (channels if layer.whiten else 0)
            operations += round(height * width * channels * (patch + self._iterations[index] * channels))
            size = (height, width) if config.pool is None else (config.pool, config.pool)
        return Cost(trained, inference, operations)
