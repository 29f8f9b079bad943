"""Batches of patches for one layer, the same on every rank, and the calibration of a fresh layer."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from cluster.features import FeatureStore, gather_images, own_part
from cluster.messages import Progress, Reporter
from cluster.sharding import from_rank_zero
from simmatch.config import LayerConfig
from simmatch.geometry import Patches, draw_positions
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.model import Stack
from simmatch.seeding import seeded

LoneWork = Callable[[Callable[[], None] | None], None]
"""Does what rank 0 gives it while all wait, see `cluster.lone_work`."""


class LayerInputs:
    """Batches of patches for one layer: from images, from cached features, or encoded batch by batch.

    A fresh layer is calibrated here: rank 0 measures the input, all ranks take its result.
    """

    def __init__(
        self,
        index: int,
        config: LayerConfig,
        layer: SimilarityMatchingConv2d,
        store: FeatureStore,
        *,
        stack: Stack,
        report: Reporter,
        cache: bool,
        lone_work: LoneWork,
    ) -> None:
        self._index, self._layer, self._store, self._stack, self._report = index, layer, store, stack, report
        self._positions = config.train.positions
        if not layer.calibrated:
            self._calibrate(config, store, lone_work)
        self._cache = self._fill(store) if index > 0 and cache else None

    def _calibrate(self, config: LayerConfig, store: FeatureStore, lone_work: LoneWork) -> None:
        """Measured with as many threads as everything that is learnt: more would change the last bits."""
        self._report.progress(Progress("calibrate", 0, 1, layer=self._index))
        layer, exchange = self._layer, store.exchange
        sample = store.first(min(config.whiten_images, store.count))
        lone_work(partial(layer.calibrate, sample, config.whiten_patches) if exchange.rank == 0 else None)
        for name in ("whitening", "whitening_mean", "input_power"):
            if hasattr(layer, name):
                target = getattr(layer, name)
                target.copy_(from_rank_zero(target, exchange))
        self._report.progress(Progress("calibrate", 1, 1, layer=self._index))

    def _fill(self, store: FeatureStore) -> Tensor:
        """All images' input of this layer on this rank: whole patches where the layer is dense, else maps."""
        cache: Tensor | None = None
        done = 0

        def dense(x: Tensor) -> Tensor:
            patches = self._layer.prepare(x)
            return x if patches.matrix is None else patches.matrix

        for part in store.gathered(dense):
            if cache is None:
                cache = part.new_empty(store.count, *part.shape[1:])
            cache[done : done + len(part)] = part
            done += len(part)
            self._report.progress(Progress("cache", done, store.count, layer=self._index))
        assert cache is not None
        return cache

    def batch(self, chosen: Tensor) -> Patches:
        """Patches of the images with these indices, the same on every rank; of drawn positions, if so configured."""
        if self._cache is not None:
            found = self._cache[chosen.to(self._cache.device)]
            return Patches(None, None, found, (1, 1)) if found.ndim == 2 else self._prepare(found)
        if self._index == 0:
            return self._prepare(self._store.images(chosen))
        exchange = self._store.exchange
        own = self._store.images(chosen[own_part(len(chosen), exchange)])
        return self._prepare(gather_images(self._stack.below(own, self._index), len(chosen), exchange))

    def _prepare(self, x: Tensor) -> Patches:
        """Positions are drawn as a pure function of the layer's seed and update, whatever the number of ranks."""
        if self._positions is None:
            return self._layer.prepare(x)
        map_size = self._layer.patch.map_size((x.shape[2], x.shape[3]))
        generator = seeded("positions", self._layer.seed, int(self._layer.updates))
        return self._layer.prepare(x, draw_positions(self._positions, len(x), map_size, generator))
