"""What most rivals share: an affine function of every patch, one convolution, then something within a position.

That is a formula of the learner's own (`activity`), or the dynamics of our layers with a matrix M that it has learnt:

    y* = argmin over y ≥ 0 of ½ yᵀ M y − yᵀ d,  d = filters · x̃ + offset
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from jobs.evaluation.learners import Cost, Shape
from jobs.evaluation.material import UnitImages
from jobs.evaluation.nonnegative import COUNTED_IMAGES, NonnegativeCodes
from jobs.evaluation.rivals.patches import Affine, PatchView, Preprocessing, encoded, fitted
from simmatch.seeding import seeded

SettingsT = TypeVar("SettingsT", bound=Preprocessing)

RESIDUAL = 2.0**-7
"""To which codes are solved; a power of two is the same number in every dtype."""


@dataclass(frozen=True, eq=False)
class Learnt:
    """The result of learning.

    Attributes
    ----------
    filters, offset: [K, P] and [K], of whitened patches.
    trained: parameters that learning moved.
    lateral: [K, K], M of the dynamics that encode; None: `activity` encodes.
    """

    filters: Tensor
    offset: Tensor
    trained: int
    lateral: Tensor | None = None


class Convolutional(ABC, Generic[SettingsT]):
    """A `jobs.evaluation.learners.Learner` that encodes each patch by itself.

    Parameters
    ----------
    shape: geometry that all share.
    settings: of the learner and of its patches.
    seed: of every random draw.

    Attributes
    ----------
    learnt: None before learning.
    """

    name: str

    def __init__(self, shape: Shape, settings: SettingsT, seed: int) -> None:
        self.shape, self.settings, self.seed = shape, settings, seed
        self.learnt: Learnt | None = None
        self._encoder: Affine | None = None
        self._trained = 0
        self._codes: NonnegativeCodes | None = None
        self._iterations = 0.0

    @property
    def draws(self) -> str:
        """Names the stream of random numbers."""
        return self.name

    @abstractmethod
    def learn(self, images: UnitImages, view: PatchView, generator: torch.Generator) -> Learnt:
        """Learn from images [N, C, H, W], seen as `view` has them."""

    def encoding(self, learnt: Learnt) -> tuple[Tensor, Tensor]:
        """Filters [R, P] and offset [R] of the convolution: those that were learnt, unless `activity` needs others."""
        return learnt.filters, learnt.offset

    def activity(self, columns: Tensor) -> Tensor:
        """Affine functions [R, N] → codes [K, N] ≥ 0; may overwrite them."""
        return columns.clamp_(min=0.0)

    def fit(self, images: UnitImages) -> None:
        generator = seeded(self.draws, self.seed)
        view = PatchView.of(images, self.shape, self.settings, generator)
        self.learnt = learnt = self.learn(images, view, generator)
        self._encoder = view.affine(*self.encoding(learnt))
        self._trained = learnt.trained + view.parameters
        if learnt.lateral is not None:
            few = self._encoder.columns(images[:COUNTED_IMAGES])
            self._codes = NonnegativeCodes(learnt.lateral, RESIDUAL)
            self._iterations = self._codes.mean_iterations(few)

    @property
    def encoder(self) -> Affine:
        """The convolution; ValueError before `fit`."""
        return fitted(self._encoder, self.name)

    def maps(self, images: Tensor) -> Tensor:
        encoder, code = self.encoder, self._codes or self.activity
        rows = max(len(encoder.offset), self.shape.channels)
        return encoded(images, encoder.config, rows, lambda part: code(encoder.columns(part)))

    def cost(self, image_size: tuple[int, int]) -> Cost:
        """The whitening, measured on the images, counts as trained; for encoding it is part of the filters.

        The work of the dynamics is what it was, per column, on the first images learnt from.
        """
        encoder, lateral = self.encoder, fitted(self.learnt, self.name).lateral
        height, width = encoder.config.map_size(image_size)
        values = 0 if lateral is None else lateral.numel()
        return Cost(
            trained=self._trained,
            inference=encoder.parameters + values,
            operations=encoder.operations(image_size) + round(height * width * self._iterations * values),
        )
