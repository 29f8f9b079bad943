"""Which columns (images × positions) an owner holds where columns are split: contiguous ranges, as even as they can be.

Ranges follow the order 'b h w' and may begin and end inside an image, so that they balance also when a batch has fewer
images than there are owners. With fewer columns than owners some hold none.

>>> [columns.count for columns in split_columns(10, 3)]
[3, 3, 4]
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor

from simmatch.batch import Batch
from simmatch.geometry import Patches


@dataclass(frozen=True)
class Columns:
    """Columns start … stop − 1 of `total`."""

    start: int
    stop: int
    total: int

    @property
    def count(self) -> int:
        return self.stop - self.start


def split_columns(total: int, parts: int) -> list[Columns]:
    """Split `total` columns into `parts` contiguous ranges whose sizes differ by at most one; some may be empty."""
    starts = [part * total // parts for part in range(parts + 1)]
    return [Columns(start, stop, total) for start, stop in pairwise(starts)]


@dataclass(frozen=True)
class BatchPart:
    """The part of a batch that holds a range of columns: some images, or some rows of the map of a single one.

    Attributes
    ----------
    batch: this part only.
    inside: the range among this part's columns. The other columns' drive may be wrong; their activity is zero.
    """

    batch: Batch
    inside: slice

    @classmethod
    def covering(cls, columns: Columns, batch: Batch) -> BatchPart:
        """The part of a batch that holds `columns`; some image where they are none."""
        positions = batch.patches.positions
        first = min(columns.start // positions, batch.patches.batch_size - 1)
        part = batch.of_images(slice(first, max(first + 1, -(-columns.stop // positions))))
        start = columns.start - first * positions
        if part.patches.batch_size == 1 and columns.count > 0:
            cropped, before = crop(part.patches, start, start + columns.count)
            part, start = Batch(cropped, part.z), start - before
        return cls(part, slice(start, start + columns.count))

    def with_zeros(self, y: Tensor) -> Tensor:
        """Activities [K, n] of the range → of all columns of this part, zero outside the range."""
        return F.pad(y, (self.inside.start, self.batch.columns - self.inside.stop))


def crop(patches: Patches, start: int, stop: int) -> tuple[Patches, int]:
    """Part of a single image's patches that holds columns `start` … `stop` − 1: whole rows of its map.

    Returns
    -------
    The part, and how many columns come before it. On its outermost rows zero padding may stand in for the image, but
    never on a row of the columns asked for.
    """
    config = patches.config
    if patches.matrix is not None:
        return replace(patches, matrix=patches.matrix[start:stop], map_size=(1, stop - start)), start
    if patches.images is None or config.padding >= config.kernel_size:
        return patches, 0
    height, width = patches.map_size
    margin = -(-config.padding // config.stride)
    top, bottom = max(0, start // width - margin), min(height, -(-stop // width) + margin)
    end = patches.images.shape[2]
    if bottom < height:
        end = (bottom - 1) * config.stride + config.kernel_size - 2 * config.padding
    scale = patches.inverse_scale
    part = replace(
        patches,
        images=patches.images[:, :, top * config.stride : end],
        inverse_scale=None if scale is None else scale[:, :, top:bottom],
        map_size=(bottom - top, width),
    )
    return part, top * width
