"""K-means with the triangle activation, on normalised and whitened patches.

    z_k = ‖x̃ − c_k‖,  f_k = max(0, mean_j z_j − z_k)

‖x̃ − c_k‖² = ‖x̃‖² + (‖c_k‖² − 2 c_k · x̃): one convolution with K + P filters, the last P of which are x̃ itself.

Source: Coates, Lee & Ng, "An analysis of single-layer networks in unsupervised feature learning" (2011).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jobs.evaluation.material import UnitImages
from jobs.evaluation.rivals.convolutional import Convolutional, Learnt
from jobs.evaluation.rivals.patches import PATCHES, PatchView, Preprocessing, draw_seed

BATCH = 4096
PASSES = 10


@dataclass(frozen=True)
class KMeansSettings(Preprocessing):
    """Settings to choose from: those of the patches."""


class KMeans(Convolutional[KMeansSettings]):
    """Learns K centroids of `PATCHES` patches in `PASSES` passes of scikit-learn's `MiniBatchKMeans`."""

    name = "kmeans"
    candidates: ClassVar[tuple[KMeansSettings, ...]] = tuple(
        KMeansSettings(contrast_floor=floor, whiten_ridge=ridge) for floor in (0.03, 0.01) for ridge in (0.1, 1.0)
    )

    def learn(self, images: UnitImages, view: PatchView, generator: torch.Generator) -> Learnt:
        from sklearn.cluster import MiniBatchKMeans

        patches = view.sample(images, PATCHES, generator)
        model = MiniBatchKMeans(
            self.shape.channels,
            batch_size=BATCH,
            max_iter=PASSES,
            max_no_improvement=None,
            n_init=1,
            random_state=draw_seed(generator),
        ).fit(patches.numpy())
        centroids = torch.from_numpy(model.cluster_centers_).to(patches)
        return Learnt(centroids, torch.zeros(len(centroids)), centroids.numel())

    def encoding(self, learnt: Learnt) -> tuple[Tensor, Tensor]:
        centroids = learnt.filters
        size = centroids.shape[1]
        filters = torch.cat([-2 * centroids, torch.eye(size)])
        return filters, torch.cat([centroids.square().sum(dim=1), torch.zeros(size)])

    def activity(self, columns: Tensor) -> Tensor:
        """f of [‖c‖² − 2 c · x̃; x̃], the triangle."""
        linear, patches = columns[: self.shape.channels], columns[self.shape.channels :]
        z = linear.add_(patches.square().sum(dim=0)).clamp_(min=0.0).sqrt_()
        return torch.sub(z.mean(dim=0), z, out=z).clamp_(min=0.0)
