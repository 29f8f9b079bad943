"""Statistics of a layer's input, measured once before it learns: of patches that are drawn from the first images.

The patches are chosen as one set, from a seed. Whoever holds some of the images adds the moments of the patches in
them, so the sample never exists as a whole, and the sum is that of one process.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from simmatch.geometry import PatchConfig, drawn_patches, normalised_patches
from simmatch.moments import ROWS, Moments


class PatchSample:
    """The patches to measure in the first images: at most `count` of them, at random positions, or all.

    Parameters
    ----------
    config: the geometry of the patches.
    whiten: whether the patches are to be whitened: their covariance is needed. False: only their mean square.
    images: number of images to draw from.
    size: height and width of the images.
    count: number of patches to draw; fewer are all used.
    generator: decides which.

    >>> config, generator = PatchConfig(in_channels=1, kernel_size=3), torch.Generator().manual_seed(0)
    >>> sample = PatchSample(config, True, images=4, size=(8, 8), count=100, generator=generator)
    >>> x, moments = torch.rand(4, 1, 8, 8), sample.moments("cpu")
    >>> for part in (slice(0, 2), slice(2, 4)):
    ...     for rows in sample.rows(x[part], part.start):
    ...         moments.add(rows)
    >>> moments.count, moments.mean.shape
    (100, torch.Size([9]))
    """

    def __init__(
        self,
        config: PatchConfig,
        whiten: bool,
        *,
        images: int,
        size: tuple[int, int],
        count: int,
        generator: torch.Generator,
    ) -> None:
        height, width = config.map_size(size)
        self._config, self._whiten, self._positions = config, whiten, height * width
        total = images * height * width
        self._chosen = drawn_patches(total, count, generator).sort().values if total > count else None

    def moments(self, device: torch.device | str) -> Moments:
        """Empty sums for `rows`."""
        return Moments(self._config.patch_size if self._whiten else 1, device)

    def rows(self, x: Tensor, first: int = 0) -> Iterator[Tensor]:
        """What has to be known of the patches in some of the images, in order, at most `ROWS` of them at a time.

        Parameters
        ----------
        x: [n, C, H, W].
        first: number of the first of these images in the data.

        Yields
        ------
        The patches [m, P], normalised, or, if they are not whitened, ‖x‖² [m, 1].

        Raises
        ------
        ValueError
            Values are not finite.
        """
        if not bool(x.isfinite().all()):
            raise ValueError("images: expected finite values, got NaN or infinity")
        start, stop = first * self._positions, (first + len(x)) * self._positions
        if self._chosen is None:
            within = torch.arange(stop - start, device="cpu")
        else:
            edges = torch.searchsorted(self._chosen, torch.tensor([start, stop], device="cpu")).tolist()
            within = self._chosen[slice(*edges)] - start
        for part in torch.split(within, ROWS):
            if len(part) > 0:
                patches = normalised_patches(x, self._config, part.to(x.device))
                yield patches if self._whiten else patches.square().sum(dim=1, keepdim=True)
