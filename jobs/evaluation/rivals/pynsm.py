"""The authors' library, `pynsm` 1.0.1: it learns, and our solver encodes with what it has learnt.

Learning is their example's loop (`jobs.pynsm`): 40 projected-gradient iterations, SGD on their loss, its
rate and τ. Their module takes any encoder, so it is given patches as channels of a map, and a 1 × 1 convolution W: any
stride, and normalised patches as the other learners have them. Codes are solved to a residual, because their own
iterations end far from the solution on weights that have learnt for long.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from einops import rearrange

from jobs.evaluation.material import UnitImages
from jobs.evaluation.rivals.convolutional import Convolutional, Learnt
from jobs.evaluation.rivals.patches import PatchView, Preprocessing
from jobs.evaluation.rivals.visits import Visits
from jobs.pynsm import CHANNELS, RATE, PynsmTraining, convolution, require_pynsm, similarity_matching

VISITS = Visits(images=100, columns=5000, updates=400, passes=3)
"""6 images an update at the 784 positions of 28 × 28 images: 2,400 images. Learning takes some 50 ms an image of these
at 128 channels."""


@dataclass(frozen=True)
class PynsmSettings(Preprocessing):
    """Settings to choose from.

    Attributes
    ----------
    step: of their iteration; anything at or above 2/λmax(M) may diverge.
    """

    step: float = 1.0


class Pynsm(Convolutional[PynsmSettings]):
    """Learns W and M from batches of images, as many as `VISITS` says."""

    name = "pynsm"
    candidates: ClassVar[tuple[PynsmSettings, ...]] = (
        PynsmSettings(contrast=False, whiten=False),
        PynsmSettings(step=0.3, contrast=False, whiten=False),
        PynsmSettings(step=0.3, contrast_floor=0.03, whiten=False),
        PynsmSettings(step=0.3, contrast_floor=0.03),
    )

    def fit(self, images: UnitImages) -> None:
        """Learn from images [N, C, H, W].

        Raises
        ------
        MissingError
            Their library is not installed.
        """
        require_pynsm()
        super().fit(images)

    def learn(self, images: UnitImages, view: PatchView, generator: torch.Generator) -> Learnt:
        channels, size = self.shape.channels, view.config.patch_size
        # as torch begins a convolution: uniform within ± 1/√P
        weight = torch.rand(channels, size, 1, 1, generator=generator).mul_(2).sub_(1) / size**0.5
        model = similarity_matching(convolution(weight), torch.eye(channels), step=self.settings.step)
        # their loss is a mean over channels: at this rate a step is η = 4ρ/K of our rules as in their example
        training = PynsmTraining(model, RATE * channels / CHANNELS)
        height, width = view.config.map_size((images.shape[2], images.shape[3]))
        for indices in VISITS.batches(len(images), height * width, self.seed):
            maps = rearrange(view.all(images[indices]), "(b h w) p -> b p h w", h=height, w=width)
            training.learn(maps.contiguous())  # their products take half as long again on a permuted map
        lateral = (training.lateral + training.lateral.T) / 2  # symmetric but for rounding
        filters = training.feedforward.flatten(1)
        return Learnt(filters, torch.zeros(channels), filters.numel() + lateral.numel(), lateral)
