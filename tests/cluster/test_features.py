"""Kept features: what a run's readout sees is what the exported model calls features."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from cluster.features import FeatureStore
from simmatch.config import ModelConfig, parse
from simmatch.data.sources import Dataset, to_unit
from simmatch.model import InputConfig, Stack, pooled, readable
from simmatch.sharding.exchange import IDENTITY

LAYERS = [
    {"out_channels": 5, "kernel_size": 3, "padding": 1, "pool": 4, "power": 0.5},
    {"out_channels": 4, "kernel_size": 3, "padding": 1, "pool": 4},
    {"out_channels": 6, "kernel_size": "full", "supervised": True, "label_gain": 3.0},
]


@pytest.mark.parametrize("features", ["last", "all", "unsupervised"])
@pytest.mark.parametrize("pool", [None, 2, 4])
def test_kept_features_are_the_models(digits: Dataset, features: str, pool: int | None) -> None:
    config = parse(ModelConfig, {"layers": LAYERS, "features": features, "feature_pool": pool})
    stack = Stack(config, InputConfig(in_channels=1, height=8, width=8, num_classes=10), seed=2).eval()
    images = digits.test_images[:30]
    store = FeatureStore(
        images,
        IDENTITY,
        batch=8,
        dtype=torch.float32,
        device=torch.device("cpu"),
        kept={
            index: partial(readable, config=config.layers[index], pool=config.feature_pool)
            for index in config.feature_layers()
        },
    )
    for index in range(len(config.layers)):

        def encode(x: Tensor, _: slice, index: int = index) -> Tensor:
            return pooled(stack.layer(index)(x), config.layers[index])

        store.advance(encode, lambda _: None)
    expected = stack.features(to_unit(images))
    found = torch.cat(list(store.features()))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # batches of 8 and of 30 round differently
    sizes = {"last": 6, "all": 9 * (pool or 4) ** 2 + 6, "unsupervised": 9 * (pool or 4) ** 2}
    assert found.shape == (30, sizes[features])
