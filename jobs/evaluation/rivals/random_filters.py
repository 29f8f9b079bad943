"""Random filters, not learnt: Gaussian, or patches drawn from the data, on normalised and whitened patches.

    f = max(0, a_k · x̃ − θ),  ‖a_k‖ = 1

Patches as filters with a threshold: Coates & Ng, "The importance of encoding versus training with sparse coding and
vector quantization" (2011), where they came close to learnt ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F

from jobs.evaluation.material import UnitImages
from jobs.evaluation.rivals.convolutional import Convolutional, Learnt
from jobs.evaluation.rivals.patches import PatchView, Preprocessing

THRESHOLDS = (0.0, 0.25, 0.5, 1.0)
"""θ that rows of one kind of filters choose from."""


@dataclass(frozen=True)
class RandomSettings(Preprocessing):
    """Settings to choose from.

    Attributes
    ----------
    source: of the filters.
    threshold: θ, in standard deviations of a white direction.
    """

    source: Literal["gaussian", "patches"] = "gaussian"
    threshold: float = 0.0


class Random(Convolutional[RandomSettings]):
    """K random filters of norm 1; only the whitening is taken from the images, and with `patches` the filters."""

    name = "random"
    candidates: ClassVar[tuple[RandomSettings, ...]] = (
        RandomSettings("gaussian", contrast_floor=0.1),
        RandomSettings("gaussian", contrast_floor=0.03),
        RandomSettings("patches", contrast_floor=0.03),
        RandomSettings("patches", threshold=0.25, contrast_floor=0.03),
    )

    def learn(self, images: UnitImages, view: PatchView, generator: torch.Generator) -> Learnt:
        """Draw the filters."""
        channels = self.shape.channels
        if self.settings.source == "gaussian":
            filters = torch.randn(channels, view.config.patch_size, generator=generator)
        else:
            filters = view.sample(images, channels, generator)
        return Learnt(F.normalize(filters, dim=1), torch.full((channels,), -self.settings.threshold), trained=0)


class Gaussian(Random):
    """Gaussian filters only."""

    name = "gaussian"
    candidates: ClassVar[tuple[RandomSettings, ...]] = tuple(
        RandomSettings("gaussian", threshold, contrast_floor=0.03) for threshold in THRESHOLDS
    )


class Exemplars(Random):
    """Patches drawn from the data only."""

    name = "exemplars"
    candidates: ClassVar[tuple[RandomSettings, ...]] = tuple(
        RandomSettings("patches", threshold, contrast_floor=0.03) for threshold in THRESHOLDS
    )
