"""Random numbers for images, each from a generator of its own."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Generator, Tensor

from simmatch.seeding import seeded


class ImageDraws:
    """Random numbers for N images; those of an image depend on no other image.

    Parameters
    ----------
    purpose: what the numbers are for.
    seed: a number that tells one set of draws from the next.
    indices: of the images in their data set, N of them.
    """

    def __init__(self, purpose: str, seed: int, indices: range) -> None:
        self._purpose, self._seed, self._indices = purpose, seed, indices

    @cached_property
    def _generators(self) -> list[Generator]:
        return [seeded(self._purpose, self._seed, index) for index in self._indices]

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high): [N, *shape], float64."""
        drawn = [torch.rand(shape, generator=generator, dtype=torch.float64) for generator in self._generators]
        return low + (high - low) * torch.stack(drawn)

    def normal(self, *shape: int) -> Tensor:
        """Of mean 0 and variance 1: [N, *shape], float64."""
        drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for generator in self._generators]
        return torch.stack(drawn)

    def sign(self, *shape: int) -> Tensor:
        """−1 or 1, as likely: [N, *shape], float64."""
        return torch.where(self.uniform(*shape) < 0.5, -1.0, 1.0).double()

    def poisson(self, means: Tensor) -> Tensor:
        """Counts of these means [N, ...], in the same shape and dtype."""
        drawn = [torch.poisson(mean, generator) for mean, generator in zip(means, self._generators, strict=True)]
        return torch.stack(drawn)
