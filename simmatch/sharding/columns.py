"""Partition of columns (images × positions) into contiguous, nearly equal ranges, one per owner.

Ranges are in the order 'b h w' and may start and end inside an image, so that work is balanced even if a batch has
fewer images than there are owners. With fewer columns than owners, some owners have none.
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
    """Columns start … stop − 1 of `total`.

    >>> Columns(0, 36, total=72).count
    36
    """

    start: int
    stop: int
    total: int

    @property
    def count(self) -> int:
        return self.stop - self.start


def split_columns(total: int, parts: int) -> list[Columns]:
    """Split `total` columns into `parts` contiguous ranges whose sizes differ by at most one; some may be empty.

    >>> [columns.count for columns in split_columns(10, 3)]
    [3, 3, 4]
    """
    starts = [part * total // parts for part in range(parts + 1)]
    return [Columns(start, stop, total) for start, stop in pairwise(starts)]


@dataclass(frozen=True)
class BatchPart:
    """The smallest part of a batch that contains a range of columns: some images, or some rows of one image's map.

    Attributes
    ----------
    batch: the part.
    inside: the range within the columns of the part. The drive of other columns may be wrong; their activity is zero.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> part = BatchPart.covering(Columns(0, 10, total=72), batch)
    >>> part.batch.columns, part.inside
    (12, slice(0, 10, None))
    """

    batch: Batch
    inside: slice

    @classmethod
    def covering(cls, columns: Columns, batch: Batch) -> BatchPart:
        """The part of a batch that contains `columns`; any image if the range is empty."""
        positions = batch.patches.positions
        first = min(columns.start // positions, batch.patches.batch_size - 1)
        part = batch.of_images(slice(first, max(first + 1, -(-columns.stop // positions))))
        start = columns.start - first * positions
        if part.patches.batch_size == 1 and columns.count > 0:
            cropped, before = crop(part.patches, start, start + columns.count)
            part, start = Batch(cropped, part.z), start - before
        return cls(part, slice(start, start + columns.count))

    def with_zeros(self, y: Tensor) -> Tensor:
        """Pad activities [K, n] of the range with zeros to all columns of the part."""
        return F.pad(y, (self.inside.start, self.batch.columns - self.inside.stop))


def crop(patches: Patches, start: int, stop: int) -> tuple[Patches, int]:
    """The rows of a single image's map that contain columns `start` … `stop` − 1.

    Returns
    -------
    The patches of these rows, and the number of columns before them. The outermost rows may be wrong, because zero
    padding replaces the neighbouring rows of the image; rows of the requested columns are always correct.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> part, before = crop(prepare(torch.ones(1, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)), 13, 18)
    >>> part.map_size, before
    ((1, 6), 12)
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
