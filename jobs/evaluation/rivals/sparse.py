"""Nonnegative sparse codes by the filters of another rival, in place of its own code.

    y* = argmin over y ≥ 0 of ½ ‖x̃ − Dᵀ y‖² + λ Σ y
       = argmin over y ≥ 0 of ½ yᵀ M y − yᵀ (D x̃ − λ),  M = D Dᵀ

which is the dynamics of our layers, solved by the same solver. D [K, P]: the filters that the other rival learns with
the same seed and patches, each brought to norm 1. So a row beside that rival shows what its code costs or gains.

Source: Coates & Ng, "The importance of encoding versus training with sparse coding and vector quantization" (2011),
where sparse codes do well with almost any filters, above all with few labels.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from jobs.evaluation.material import UnitImages
from jobs.evaluation.rivals.convolutional import Convolutional, Learnt
from jobs.evaluation.rivals.hebbian_wta import HebbianSettings, HebbianWTA
from jobs.evaluation.rivals.kmeans import KMeans, KMeansSettings
from jobs.evaluation.rivals.patches import PatchView, Preprocessing
from jobs.evaluation.rivals.random_filters import Exemplars, RandomSettings


@dataclass(frozen=True)
class SparseSettings(Preprocessing):
    """Settings to choose from.

    Attributes
    ----------
    penalty: λ, in standard deviations of a white direction.
    """

    penalty: float = 0.0


class Sparse(Convolutional[SparseSettings], ABC):
    """Learns as `rival` with the settings `learning`; patches are those of its own settings."""

    rival: ClassVar[type[Convolutional[Any]]]
    learning: ClassVar[Preprocessing]
    candidates: ClassVar[tuple[SparseSettings, ...]] = tuple(
        SparseSettings(penalty=penalty, contrast_floor=0.03) for penalty in (0.25, 0.5, 1.0, 1.5)
    )

    @property
    def draws(self) -> str:
        """Those of the rival, so that its filters are the same."""
        return self.rival.name

    def learn(self, images: UnitImages, view: PatchView, generator: torch.Generator) -> Learnt:
        learnt = self.rival(self.shape, self.learning, self.seed).learn(images, view, generator)
        filters = F.normalize(learnt.filters, dim=1)
        return Learnt(
            filters, torch.full_like(learnt.offset, -self.settings.penalty), learnt.trained, filters @ filters.T
        )


class SparseKMeans(Sparse):
    """Centroids as filters."""

    name, rival, learning = "kmeans_sparse", KMeans, KMeansSettings()


class SparseHebbian(Sparse):
    """The filters of a winner-take-all layer."""

    name, rival, learning = "hebbian_sparse", HebbianWTA, HebbianSettings()


class SparseExemplars(Sparse):
    """Patches drawn from the data as filters."""

    name, rival, learning = "exemplars_sparse", Exemplars, RandomSettings("patches")
