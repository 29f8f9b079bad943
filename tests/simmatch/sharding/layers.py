"""Small layers of every kind, shared by the ranks of a mesh."""

from __future__ import annotations

from typing import Any

import torch

from simmatch.config import DynamicsConfig, PlasticityConfig
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import split_rows

CHANNELS = 10  # on 3 owners 4, 3, 3
CLASSES = 10


def layer_of(
    mesh: Mesh, mode: str, kind: str, dynamics: dict[str, Any], rates: PlasticityConfig
) -> SimilarityMatchingConv2d:
    """`conv` or `maps`: unsupervised, 4 × 3 columns an image. `supervised`: with labels and whitening. `dense`: the
    same, one column an image."""
    options: dict[str, Any] = {"normalize": "contrast", "stride": 2, "padding": 1}
    if kind in ("supervised", "dense"):
        options |= {"num_classes": CLASSES, "label_gain": 0.5, "whiten": True}
    if kind == "dense":
        options |= {"normalize": "none", "stride": 1, "padding": 0}
    return SimilarityMatchingConv2d(
        1,
        CHANNELS,
        6 if kind == "dense" else 3,
        dynamics=DynamicsConfig(exchange=mode, **dynamics),
        plasticity=rates,
        dtype=torch.float64,
        rows=split_rows(CHANNELS, mesh.owners.world_size)[mesh.owners.rank],
        mesh=mesh,
        **options,
    )
