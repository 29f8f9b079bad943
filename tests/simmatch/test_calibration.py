"""Calibration as a sum over blocks of images and over ranks, against numpy on all patches at once."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from simmatch import ModelConfig, Stack
from simmatch.config import parse
from simmatch.data.sources import Dataset
from simmatch.features import FeatureStore
from simmatch.fit import Trainer
from simmatch.geometry import sample_patches
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.learning import MEASURED
from simmatch.model import InputConfig
from simmatch.moments import Moments
from simmatch.observer import Observer
from simmatch.seeding import seeded
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.state import moments_over_ranks
from tests.exchanges import ThreadExchange, results, run_owners
from tests.live_bytes import LiveBytes
from tests.reference import inverse_root

CPU = torch.device("cpu")
RIDGE = 0.1


@pytest.mark.parametrize("whiten", [True, False])
@pytest.mark.parametrize("count", [100, 10_000])
def test_calibration_against_numpy(whiten: bool, count: int) -> None:
    """On the drawn patches, or on all of them; accurate to condition · eps, of a condition below 1e4."""
    images = torch.rand(30, 2, 6, 6, generator=seeded("images", 0), dtype=torch.float64)
    layer = SimilarityMatchingConv2d(
        2, 4, kernel_size=3, whiten=whiten, whiten_ridge=RIDGE, normalize="contrast", dtype=torch.float64, seed=3
    )
    layer.calibrate(images, count)
    patches = sample_patches(images, layer.patch, count, seeded("calibrate", 3)).numpy()
    assert len(patches) == min(count, 30 * 16)
    power = np.mean(np.sum(patches**2, axis=1))
    if whiten:
        spread = np.cov(patches.T, bias=True)
        matrix = inverse_root(spread + RIDGE * np.trace(spread) / len(spread) * np.eye(len(spread)))
        np.testing.assert_allclose(layer.whitening.numpy(), matrix, rtol=0, atol=1e-10)
        np.testing.assert_allclose(layer.whitening_mean.numpy(), patches.mean(axis=0), rtol=0, atol=1e-14)
        power = np.trace(matrix @ spread @ matrix)
    assert float(layer.input_power) == pytest.approx(power, rel=1e-10)


class Calibrated(Exception):
    """Ends a training before the first update of a layer."""


class FirstUpdate(Observer):
    def __init__(self, index: int) -> None:
        self.index, self.measured = index, dict[str, Tensor]()

    def started(self, index: int, layer: SimilarityMatchingConv2d) -> None:
        if index == self.index:
            self.measured = {name: getattr(layer, name).clone() for name in MEASURED}
            raise Calibrated


@pytest.mark.parametrize("index", [0, 1])
def test_any_number_of_ranks_measures_the_same(index: int, digits: Dataset) -> None:
    """float64: sums of 13 blocks in another order, 1e-15 each, times the condition of the covariance, about 1e3."""
    layer: dict[str, Any] = {
        "out_channels": 6,
        "kernel_size": 3,
        "whiten": True,
        "whiten_images": 610,
        "whiten_patches": 3000,
    }
    layer["train"] = {"images": 60, "batch_size": 20}
    model = parse(ModelConfig, {"layers": [layer | {"pool": 4}, layer]})
    images = digits.train_images[:700]

    def measured(exchange: Exchange) -> dict[str, Tensor]:
        stack = Stack(model, InputConfig.of(images, 0), dtype=torch.float64)
        observer = FirstUpdate(index)
        with pytest.raises(Calibrated):
            Trainer(stack, images, mesh=Mesh.of_owners(exchange), observer=observer, encode_batch=50, depth=2).fit()
        return observer.measured

    expected = measured(IDENTITY)
    assert float(expected["input_power"]) > 0
    for ranks in (2, 3):
        for found in results(run_owners(ranks, measured)):
            for name in MEASURED:
                scale = float(expected[name].abs().max())
                torch.testing.assert_close(found[name], expected[name], rtol=0, atol=1e-11 * scale, msg=name)


def peak(images: int, ranks: int, batch: int = 50) -> int:
    """Bytes of tensors of rank 0 while it sums the moments of 100 patches of each image."""
    layer = SimilarityMatchingConv2d(4, 4, kernel_size=5, whiten=True)
    data = torch.rand(images, 4, 16, 16)

    def owner(exchange: ThreadExchange) -> int:
        store = FeatureStore(data, exchange, batch=batch, dtype=torch.float32, device=CPU)
        with LiveBytes() as live:
            sample = layer.patch_sample(images, (16, 16), 100 * images)
            with closing(store.first(images)) as parts:
                blocks = ((part.start, rows) for part, x in parts for rows in sample.rows(x, part.start))
                moments = moments_over_ranks(blocks, sample.moments(CPU), exchange)
            assert moments.count == 100 * images
            layer_of(exchange).set_input(moments)
        return live.peak

    def layer_of(exchange: ThreadExchange) -> SimilarityMatchingConv2d:
        return layer if exchange.rank == 0 else SimilarityMatchingConv2d(4, 4, kernel_size=5, whiten=True)

    return int(results(run_owners(ranks, owner))[0])


def test_memory_is_flat_in_the_sample_and_in_the_ranks() -> None:
    """Ten times as many images, whose patches would take 80 MB; of a patch only its index stays."""
    few = peak(200, ranks=1)
    assert peak(2000, ranks=1) < 1.1 * few + 24 * 100 * 2000
    assert peak(200, ranks=4) < 1.1 * few


def test_moments_know_no_whole_sample() -> None:
    """What a rank without images adds is nothing."""

    def owner(exchange: ThreadExchange) -> Moments:
        store = FeatureStore(torch.ones(40, 1, 4, 4), exchange, batch=40, dtype=torch.float64, device=CPU)
        sample = SimilarityMatchingConv2d(1, 2, kernel_size=2, dtype=torch.float64).patch_sample(40, (4, 4), 10)
        blocks = ((part.start, rows) for part, x in store.first(40) for rows in sample.rows(x, part.start))
        return moments_over_ranks(blocks, sample.moments(CPU), exchange)

    for moments in results(run_owners(3, owner)):
        assert (moments.count, moments.mean.tolist()) == (10, [4.0])
