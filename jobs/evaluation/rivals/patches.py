"""Patches as rivals see them, and the affine functions of patches that their encoders begin with.

A patch is normalised and whitened as in our layers (`simmatch.geometry`), so that what differs is the learning.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from einops import rearrange
from torch import Tensor

from jobs.evaluation.learners import Shape
from jobs.evaluation.material import UnitImages
from simmatch.geometry import (
    PatchConfig,
    drawn_patches,
    drive,
    explicit,
    normalised_patches,
    prepare,
    sample_patches,
)
from simmatch.moments import Moments
from simmatch.whitening import Whitening, zca

PATCHES = 200_000
"""Patches, at random positions of the images to learn from, that statistics are taken from."""

CHUNK_VALUES = 1 << 20
"""Values of the largest intermediate result while encoding, unless one image has more: 4 MiB in float32."""

IMAGES_AT_ONCE = 1000
"""Images that are read together for the patches drawn from them."""

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """What is done to a patch before a learner sees it; by default as in the first layer of the main job.

    Attributes
    ----------
    contrast: zero mean and unit standard deviation.
    contrast_floor: least deviation a patch is divided by, in units of the input.
    whiten: ZCA whitening.
    whiten_ridge: added to the eigenvalues of the covariance, relative to their mean.
    """

    contrast: bool = True
    contrast_floor: float = 0.1
    whiten: bool = True
    whiten_ridge: float = 0.1

    @property
    def raw(self) -> bool:
        """Patches as they are."""
        return not (self.contrast or self.whiten)

    def __str__(self) -> str:
        """What differs from the default.

        >>> str(Preprocessing(whiten=False, contrast_floor=0.03))
        'contrast_floor=0.03, whiten=False'
        """
        values = [(each.name, getattr(self, each.name), each.default) for each in fields(self)]
        return ", ".join(f"{name}={value}" for name, value, default in values if value != default) or "default"


def sampled(images: UnitImages, config: PatchConfig, count: int, generator: torch.Generator) -> Tensor:
    """`sample_patches` of images that may have to be read: each of those it needs is read once, a few at a time."""
    if isinstance(images, Tensor):
        return sample_patches(images, config, count, generator)
    height, width = config.map_size((images.shape[2], images.shape[3]))
    positions = height * width
    index = drawn_patches(len(images) * positions, count, generator)
    order = index.argsort(stable=True)
    needed, which = torch.unique_consecutive(index[order] // positions, return_inverse=True)
    among_needed = which * positions + index[order] % positions
    patches = torch.empty(len(index), config.patch_size)
    for first in range(0, len(needed), IMAGES_AT_ONCE):
        start, stop = torch.searchsorted(which, torch.tensor([first, first + IMAGES_AT_ONCE])).tolist()
        read, rows = images[needed[first : first + IMAGES_AT_ONCE]], slice(start, stop)
        patches[order[rows]] = normalised_patches(read, config, among_needed[rows] - first * positions)
    return patches


@dataclass(frozen=True, eq=False)
class Affine:
    """a · x + b for R filters a, on patches x normalised but not whitened: whitening is folded into a and b.

    Attributes
    ----------
    config: geometry and normalisation of x.
    weight: [R, C, k, k].
    offset: [R].
    """

    config: PatchConfig
    weight: Tensor
    offset: Tensor

    @property
    def parameters(self) -> int:
        return self.weight.numel() + self.offset.numel()

    def columns(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] → [R, N], columns in the order 'b h w'."""
        return drive(prepare(images, self.config), self.weight).add_(self.offset.unsqueeze(1))

    def operations(self, image_size: tuple[int, int]) -> int:
        """Multiply–adds of the products with the filters, for one image; what is done once per patch is not counted."""
        height, width = self.config.map_size(image_size)
        return height * width * self.weight.numel()


@dataclass(frozen=True, eq=False)
class PatchView:
    """How patches x̃ = Π (x − μ) are seen, x the normalised patch; Π and μ measured once.

    Attributes
    ----------
    config: geometry and normalisation.
    whitening: Π and μ, or None for x̃ = x.
    """

    config: PatchConfig
    whitening: Whitening | None

    @classmethod
    def of(
        cls, images: UnitImages, shape: Shape, preprocessing: Preprocessing, generator: torch.Generator
    ) -> PatchView:
        """Measured on `PATCHES` patches of the images [N, C, H, W]."""
        config = PatchConfig(
            images.shape[1],
            shape.kernel_size,
            shape.stride,
            shape.padding,
            preprocessing.contrast,
            preprocessing.contrast_floor,
        )
        if not preprocessing.whiten:
            return cls(config, None)
        sample = sampled(images, config, PATCHES, generator)
        return cls(config, zca(Moments.of(sample), preprocessing.whiten_ridge, sample.dtype)[0])

    @property
    def parameters(self) -> int:
        """Values of Π and μ, measured on the images to learn from."""
        return 0 if self.whitening is None else self.whitening.matrix.numel() + self.whitening.mean.numel()

    def sample(self, images: UnitImages, count: int, generator: torch.Generator) -> Tensor:
        """x̃ at random positions of random images, in random order: [n, P], n = count or all that there are."""
        patches = sampled(images, self.config, count, generator)
        return self._whitened(patches[torch.randperm(len(patches), generator=generator)])

    def all(self, images: Tensor) -> Tensor:
        """x̃ of all patches, [N, P], rows in the order 'b h w'; for a few images."""
        return explicit(prepare(images, self.config, self.whitening))

    def _whitened(self, patches: Tensor) -> Tensor:
        if self.whitening is None:
            return patches
        return (patches - self.whitening.mean) @ self.whitening.matrix.T

    def affine(self, filters: Tensor, offset: Tensor) -> Affine:
        """filters [R, P] · x̃ + offset [R], as a convolution."""
        if self.whitening is not None:
            offset = offset - filters @ self.whitening.offset
            filters = filters @ self.whitening.matrix
        return Affine(self.config, filters.reshape(-1, self.config.in_channels, *self.config.kernel), offset)


def encoded(images: Tensor, config: PatchConfig, rows: int, code: Callable[[Tensor], Tensor]) -> Tensor:
    """Maps [B, K, H', W'] of images [B, C, H, W], a few images at a time.

    Parameters
    ----------
    rows: values per column that `code` holds at its peak.
    code: images → codes [K, N], columns in the order 'b h w'.
    """
    height, width = config.map_size((images.shape[2], images.shape[3]))
    step = max(1, CHUNK_VALUES // (rows * height * width))
    parts = torch.split(images, step) if len(images) else (images,)
    maps: Tensor | None = None
    with torch.no_grad():
        for index, part in enumerate(parts):
            codes = rearrange(code(part), "k (b h w) -> b k h w", h=height, w=width)
            if maps is None:
                maps = codes.new_empty(len(images), *codes.shape[1:])
            maps[index * step : index * step + len(part)] = codes
    assert maps is not None
    return maps


def fitted(state: T | None, name: str) -> T:
    """The state that learning has set; ValueError before it."""
    if state is None:
        raise ValueError(f"{name}: expected fit() before anything is encoded or counted, got an unfitted learner")
    return state


def draw_seed(generator: torch.Generator) -> int:
    """A seed for libraries that take a number."""
    return int(torch.randint(2**31 - 1, (1,), generator=generator))
