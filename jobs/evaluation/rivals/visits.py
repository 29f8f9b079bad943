"""How long learners learn, and from which images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simmatch.data.order import epoch_order


@dataclass(frozen=True)
class Visits:
    """Length of learning: so many updates, or passes over the images if those end sooner.

    Attributes
    ----------
    images, columns: images of an update, and their columns (images × positions); whichever is fewer.
    updates, passes: most of them.
    """

    images: int
    columns: int
    updates: int
    passes: int

    def batches(self, count: int, positions: int, seed: int) -> list[Tensor]:
        """Indices into `count` images for every update, pass by pass in the order that our layers visit them."""
        size = max(1, min(self.images, self.columns // positions))
        batches: list[Tensor] = []
        for number in range(self.passes):
            batches += torch.split(epoch_order(count, seed=seed, epoch=number), size)
            if len(batches) >= self.updates:
                break
        return batches[: self.updates]


def enough_passes(patches: int, batch: int, passes: int, updates: int) -> int:
    """Passes over patches in batches: so many, or more where they would be fewer updates."""
    return max(passes, -(-updates * batch // patches))
