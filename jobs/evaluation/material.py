"""The images of a comparison, the same for every row: splits, corruption, outliers, resizing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.evaluation.corruptions import CORRUPTIONS, corrupt
from simmatch.config import ConfigError
from simmatch.data.order import stratified_subset
from simmatch.data.sources import Dataset, to_unit
from simmatch.labels import UNLABELLED
from simmatch.model import InputConfig
from simmatch.seeding import seeded


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images [N, C, H, W] in [0, 1] with labels [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor | slice) -> Labelled:
        return Labelled(self.images[index], self.labels[index])


@dataclass(frozen=True, eq=False)
class Material:
    """The images that all rows learn from and are tested on.

    Attributes
    ----------
    source: shape and classes of the images.
    train: to learn from; `held_out`: to choose with; `test`: to report.
    digest: of the whole data set, see `simmatch.data.sources.Dataset.digest`.
    """

    source: InputConfig
    train: Labelled
    held_out: Labelled
    test: Labelled
    digest: str

    @classmethod
    def of(cls, dataset: Dataset, held_out: int) -> Material:
        """The last `held_out` training images are held out.

        Raises
        ------
        ConfigError
            Fewer training images than that, or images without labels.
        """
        count = len(dataset.train_images)
        for part, labels in (("training", dataset.train_labels), ("test", dataset.test_labels)):
            if missing := int((labels == UNLABELLED).sum()):
                raise ConfigError(
                    f"data: expected a label of each {part} image of {dataset.name}, got none of {missing:,}"
                )
        if held_out >= count:
            raise ConfigError(f"held_out: expected less than the {count} training images, got {held_out}")
        every = Labelled(to_unit(dataset.train_images[:], torch.float32), dataset.train_labels)
        return cls(
            dataset.source,
            every.take(slice(0, count - held_out)),
            every.take(slice(count - held_out, count)),
            Labelled(to_unit(dataset.test_images[:], torch.float32), dataset.test_labels),
            dataset.digest(),
        )

    def check_budgets(self, budgets: Mapping[str, int]) -> None:
        """Check that every class has enough training images.

        budgets: key of the configuration → labels per class.

        Raises
        ------
        ConfigError
            Names the key of the first budget that a class cannot fill.
        """
        least = int(torch.bincount(self.train.labels, minlength=self.source.num_classes).min())
        for key, budget in budgets.items():
            if budget > least:
                raise ConfigError(f"{key}: expected at most {least}, the images of the rarest class, got {budget}")

    def labelled(self, per_class: int | None, seed: int) -> Tensor:
        """Indices of the training images whose labels a budget gives; nested over budgets, None for all."""
        if per_class is None:
            return torch.arange(len(self.train))
        return stratified_subset(self.train.labels, per_class, seed)


def digest_of(material: Material, unseen: Material | None) -> str:
    """Digest of all data that results depend on."""
    return material.digest if unseen is None else f"{material.digest}+{unseen.digest}"


def resized(images: Tensor, source: InputConfig) -> Tensor:
    """Images [N, C, H, W] as another data set has them: its size (bilinear, antialiased) and its number of channels."""
    if images.shape[1] != source.in_channels:
        images = images.mean(dim=1, keepdim=True).expand(-1, source.in_channels, -1, -1)
    if images.shape[2:] == source.image_size:
        return images
    scaled = F.interpolate(images, source.image_size, mode="bilinear", antialias=True, align_corners=False)
    return scaled.clamp(0.0, 1.0)


def with_outliers(images: Tensor, share: float, seed: int) -> Tensor:
    """Images with a share of them, drawn by the seed, replaced by uniform noise of their own range."""
    count = round(share * len(images))
    generator = seeded("outliers", seed)
    chosen = torch.randperm(len(images), generator=generator)[:count]
    altered = images.clone()
    altered[chosen] = torch.rand((count, *images.shape[1:]), generator=generator)
    return altered


def corrupted(test: Labelled, count: int, seed: int) -> dict[str, Labelled]:
    """Corruption → the first `count` test images under it."""
    some = test.take(slice(0, count))
    return {name: Labelled(corrupt(some.images, name, seed), some.labels) for name in CORRUPTIONS}
