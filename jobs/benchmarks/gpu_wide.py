"""Wide layers on CIFAR-10 on a GPU: learning, encoding, a ridge readout; other dictionaries of the same width."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.benchmarks.gpu_layer import GpuPlan, Row, batch
from jobs.reporting import Report
from simmatch.config import PlasticityConfig
from simmatch.data.sources import Dataset, to_unit
from simmatch.geometry import drive, sample_patches
from simmatch.layer import SimilarityMatchingConv2d
from simmatch.readout import fit_ridge
from simmatch.seeding import seeded


def measure_wide(plan: GpuPlan, report: Report) -> None:
    """CIFAR-10, one layer, 6 × 6, all positions: learn, encode all images, ridge on 2 × 2 pooled activities."""
    dataset = plan.dataset("cifar10")
    for channels in plan.wide:
        report.row(kind="wide", channels=channels, **wide_layer(dataset, channels, plan))


def wide_layer(dataset: Dataset, channels: int, plan: GpuPlan) -> Row:
    layer = SimilarityMatchingConv2d(
        3, channels, 6, normalize="contrast", whiten=True, plasticity=PlasticityConfig(lr=0.1, lr_decay_steps=100)
    ).to(plan.device)
    train, test = (part[: plan.images].to(plan.device) for part in (dataset.train_images, dataset.test_images))
    layer.calibrate(to_unit(train[:5000]), 100_000)
    updates = 200 if plan.device.type == "cuda" else 2
    started = plan.now()
    for update in range(updates):
        solution = layer.partial_fit(batch(dataset, update, 50, plan))
    learnt = plan.now()
    width = max(10, 2**28 // (channels * 27 * 27))
    labels = [part[: plan.images].to(plan.device) for part in (dataset.train_labels, dataset.test_labels)]

    def features(code: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Of the images learnt from, and of those held out."""
        chunks = (torch.split(images, width) for images in (train, test))
        return [torch.cat([F.adaptive_avg_pool2d(code(to_unit(x)), 2).flatten(1) for x in parts]) for parts in chunks]

    def accuracy(splits: list[Tensor]) -> float:
        predicted = fit_ridge(splits[0], labels[0]).predict(splits[1])
        return float((predicted == labels[1]).double().mean())

    started_encoding = plan.now()
    codes = features(lambda x: layer.solve(x).y)
    encoded = plan.now() - started_encoding
    accuracies = {"simmatch": accuracy(codes)}
    sample = sample_patches(to_unit(train[:5000]), layer.patch, 200_000, seeded("dictionary", plan.seed))
    sample = (sample - layer.whitening_mean) @ layer.whitening.T
    sample = sample[torch.randperm(len(sample), generator=seeded("dictionary order", plan.seed)).to(plan.device)]
    rivals = {"exemplars": Dictionary.exemplars(sample, channels), "k_means": Dictionary.k_means(sample, channels)}
    accuracies |= {name: accuracy(features(partial(rival.maps, layer))) for name, rival in rivals.items()}
    return {
        "updates": updates, "batch_size": 50, "images": len(train) + len(test), "seconds_to_learn": learnt - started,
        "seconds_to_encode": encoded, "ridge_accuracy": accuracies,
        "residual": solution.residual.amax(), "active_fraction": (solution.y > 0).double().mean(),
        "dead_channels": layer.dead_channels,
    }  # fmt: skip


# -- other dictionaries ------------------------------------------------------------------------------------------------

PASSES = 10
"""Of Lloyd's iteration."""

THRESHOLD = 0.25
"""Of an exemplar's answer, in standard deviations of a white direction; as `jobs.evaluation.rivals.random_filters`."""


@dataclass(frozen=True)
class Dictionary:
    """Filters on the whitened patches of a layer, and what is made of their products.

    Attributes
    ----------
    filters: [R, P]; code: products [R, N] → features [K, N].
    """

    filters: Tensor
    code: Callable[[Tensor], Tensor]

    @classmethod
    def exemplars(cls, patches: Tensor, channels: int) -> Dictionary:
        """Patches drawn from the data [n, P], of norm 1: max(0, a · x̃ − θ)."""
        return cls(F.normalize(patches[:channels], dim=1), lambda columns: columns.sub_(THRESHOLD).clamp_(min=0.0))

    @classmethod
    def k_means(cls, patches: Tensor, channels: int) -> Dictionary:
        """Lloyd's iteration from exemplars, and the triangle max(0, mean_j z_j − z_k), z_k = ‖x̃ − c_k‖."""
        centroids = patches[:channels].clone()
        for _ in range(PASSES):
            nearest = torch.cat([torch.cdist(part, centroids).argmin(dim=1) for part in torch.split(patches, 2**14)])
            sums = torch.zeros_like(centroids).index_add_(0, nearest, patches)
            counts = torch.bincount(nearest, minlength=channels).unsqueeze(1)
            centroids = torch.where(counts > 0, sums / counts.clamp(min=1), centroids)
        constant = centroids.square().sum(dim=1, keepdim=True)

        def triangle(columns: Tensor) -> Tensor:
            squares = columns[:channels].add_(constant).add_(columns[channels:].square().sum(dim=0))
            z = squares.clamp_(min=0.0).sqrt_()
            return torch.sub(z.mean(dim=0), z, out=z).clamp_(min=0.0)

        return cls(torch.cat([-2 * centroids, torch.eye(patches.shape[1], device=patches.device)]), triangle)

    def maps(self, layer: SimilarityMatchingConv2d, images: Tensor) -> Tensor:
        """Features [B, K, H', W'], on the patches as the layer sees them."""
        prepared = layer.prepare(images)
        filters = self.filters.view(-1, *layer.feedforward.shape[1:])
        columns = self.code(drive(prepared, filters))
        return columns.view(len(columns), len(images), *prepared.map_size).transpose(0, 1)
