"""What most rivals share: an affine function of every patch, one convolution, then something within a position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from jobs.evaluation.learners import Cost, Shape
from jobs.evaluation.material import UnitImages
from jobs.evaluation.rivals.patches import Affine, PatchView, Preprocessing, encoded, fitted
from simmatch.seeding import seeded

SettingsT = TypeVar("SettingsT", bound=Preprocessing)


@dataclass(frozen=True, eq=False)
class Learnt:
    """The result of learning.

    Attributes
    ----------
    filters, offset: [R, P] and [R], of whitened patches: what an encoder begins with.
    trained: parameters that learning moved.
    """

    filters: Tensor
    offset: Tensor
    trained: int


class Convolutional(ABC, Generic[SettingsT]):
    """A `jobs.evaluation.learners.Learner` whose codes are `activity(filters · x̃ + offset)`.

    Parameters
    ----------
    shape: geometry that all share.
    settings: of the learner and of its patches.
    seed: of every random draw.
    """

    name: str

    def __init__(self, shape: Shape, settings: SettingsT, seed: int) -> None:
        self.shape, self.settings, self.seed = shape, settings, seed
        self._encoder: Affine | None = None
        self._trained = 0

    @abstractmethod
    def learn(self, images: UnitImages, view: PatchView, generator: torch.Generator) -> Learnt:
        """Learn from images [N, C, H, W], seen as `view` has them."""

    @abstractmethod
    def activity(self, columns: Tensor) -> Tensor:
        """Affine functions [R, N] → codes [K, N] ≥ 0; may overwrite them."""

    def fit(self, images: UnitImages) -> None:
        generator = seeded(self.name, self.seed)
        view = PatchView.of(images, self.shape, self.settings, generator)
        learnt = self.learn(images, view, generator)
        self._encoder = view.affine(learnt.filters, learnt.offset)
        self._trained = learnt.trained + view.parameters

    @property
    def encoder(self) -> Affine:
        """The convolution; ValueError before `fit`."""
        return fitted(self._encoder, self.name)

    def maps(self, images: Tensor) -> Tensor:
        encoder = self.encoder
        rows = max(len(encoder.offset), self.shape.channels)
        return encoded(images, encoder.config, rows, lambda part: self.activity(encoder.columns(part)))

    def cost(self, image_size: tuple[int, int]) -> Cost:
        """The whitening, measured on the images, counts as trained; for encoding it is part of the filters."""
        encoder = self.encoder
        return Cost(self._trained, encoder.parameters, encoder.operations(image_size))
