"""The images of a comparison, the same for every row: splits, corruption, outliers, resizing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from jobs.evaluation.corruptions import CORRUPTIONS, corrupt
from simmatch.config import ConfigError
from simmatch.data.order import stratified_subset
from simmatch.data.prepared import StoredImages
from simmatch.data.sources import Dataset, to_unit
from simmatch.labels import UNLABELLED
from simmatch.model import InputConfig
from simmatch.seeding import seeded


class ReadImages:
    """Images of a prepared data set in [0, 1], or windows of signals, read when they are indexed; otherwise as a tensor
    [N, C, H, W].

    Attributes
    ----------
    stored: all images of the split.
    chosen: which of them, int64 [N].
    source: shape that every image is brought to, see `resized`; None: as stored.
    """

    def __init__(self, stored: StoredImages, chosen: Tensor, source: InputConfig | None = None) -> None:
        self.stored, self.chosen, self.source = stored, chosen, source
        shape = stored.shape[1:] if source is None else (source.in_channels, *source.image_size)
        self.shape = torch.Size((len(chosen), *shape))

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: Tensor | slice) -> Tensor:
        """float32 [n, C, H, W]."""
        images = to_unit(self.stored[self.chosen[index]], torch.float32)
        return images if self.source is None else resized(images, self.source)


UnitImages = Tensor | ReadImages
"""Images [N, C, H, W] in [0, 1]: `images[index]` of some of them is a tensor."""


def in_batches(images: UnitImages, size: int) -> Iterator[Tensor]:
    """Consecutive images, `size` at a time."""
    for start in range(0, len(images), size):
        yield images[start : start + size]


def unit_images(stored: StoredImages) -> UnitImages:
    """Images as stored, uint8 or in [0, 1]: in memory, or to be read when they are needed."""
    if isinstance(stored, Tensor):
        return to_unit(stored, torch.float32)
    return ReadImages(stored, torch.arange(len(stored)))


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images [N, C, H, W] in [0, 1] with labels [N]."""

    images: UnitImages
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor | slice) -> Labelled:
        """Some of them; what is in no memory is not read."""
        images = self.images
        if isinstance(images, ReadImages):
            return Labelled(ReadImages(images.stored, images.chosen[index], images.source), self.labels[index])
        return Labelled(images[index], self.labels[index])


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
        every = Labelled(unit_images(dataset.train_images), dataset.train_labels)
        return cls(
            dataset.source,
            every.take(slice(0, count - held_out)),
            every.take(slice(count - held_out, count)),
            Labelled(unit_images(dataset.test_images), dataset.test_labels),
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

    def to_learn(self, per_class: int | None, seed: int) -> Labelled:
        """The training images whose labels a budget gives, see `labelled`."""
        return self.train if per_class is None else self.train.take(self.labelled(per_class, seed))

    def labelled(self, per_class: int | None, seed: int) -> Tensor:
        """Indices of the training images whose labels a budget gives; nested over budgets, None for all."""
        if per_class is None:
            return torch.arange(len(self.train))
        return stratified_subset(self.train.labels, per_class, seed)


def digest_of(material: Material, unseen: Material | None) -> str:
    """Digest of all data that results depend on."""
    return material.digest if unseen is None else f"{material.digest}+{unseen.digest}"


@overload
def resized(images: Tensor, source: InputConfig) -> Tensor: ...
@overload
def resized(images: UnitImages, source: InputConfig) -> UnitImages: ...
def resized(images: UnitImages, source: InputConfig) -> UnitImages:
    """Images [N, C, H, W] as another data set has them: its size (bilinear, antialiased) and its number of channels."""
    if isinstance(images, ReadImages):
        return ReadImages(images.stored, images.chosen, source)
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
    images = some.images[:]
    return {name: Labelled(corrupt(images, name, seed), some.labels) for name in CORRUPTIONS}
