"""The part of a batch that one rank solves: a range of its columns (images × positions), and images that contain it.

Columns are in the order 'b h w'. Where columns are split, ranges may start and end inside an image, so that work is
balanced even if a batch has fewer images than there are ranks. Replicas whose owners split rows have whole images. With
fewer columns than ranks, some ranks have none. A rank reads and prepares only the images of its part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from simmatch.batch import Batch
    from simmatch.geometry import Patches


def split_columns(total: int, parts: int) -> list[range]:
    """Split columns 0 … total − 1 into contiguous ranges whose sizes differ by at most one; some may be empty.

    >>> split_columns(10, 3)
    [range(0, 3), range(3, 6), range(6, 10)]
    """
    return [range(*ends) for ends in pairwise(part * total // parts for part in range(parts + 1))]


@dataclass(frozen=True)
class Part:
    """One rank's part of a batch.

    Attributes
    ----------
    whole: number of images of the batch.
    images: the images that contain the part; empty if the part is.
    columns: the part, as a range of the columns of `images`.

    Three ranks share 4 images of 5 columns:

    >>> [part.columns for part in (Part.of_columns(4, 5, ranks=3, rank=rank) for rank in range(3))]
    [range(0, 6), range(1, 8), range(3, 10)]
    >>> Part.of_columns(4, 5, ranks=3, rank=1).images
    slice(1, 3, None)
    """

    whole: int
    images: slice
    columns: range

    @property
    def count(self) -> int:
        """Number of images that contain the part."""
        return int(self.images.stop - self.images.start)

    @classmethod
    def of_columns(cls, images: int, positions: int, *, ranks: int, rank: int) -> Part:
        """The part of one of `ranks` that split the columns of a batch."""
        columns = split_columns(images * positions, ranks)[rank]
        first = columns.start // positions
        last = -(-columns.stop // positions) if columns else first
        start = columns.start - first * positions
        return cls(images, slice(first, last), range(start, start + len(columns)))

    @classmethod
    def of_images(cls, images: int, positions: int, *, ranks: int, rank: int) -> Part:
        """The part of one of `ranks` that split the images of a batch.

        >>> [Part.of_images(4, 5, ranks=3, rank=rank).images for rank in range(3)]
        [slice(0, 1, None), slice(1, 2, None), slice(2, 4, None)]
        """
        own = split_columns(images, ranks)[rank]
        return cls(images, slice(own.start, own.stop), range(len(own) * positions))


def covering(columns: range, batch: Batch) -> tuple[Batch, slice]:
    """The smallest part of a batch that contains a range of columns: some images, or some rows of one image's map.

    Returns
    -------
    The part, no images if the range is empty, and the range within the columns of the part. The drive of other columns
    may be wrong.

    >>> from simmatch.batch import Batch
    >>> from simmatch.geometry import PatchConfig, prepare
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> part, inside = covering(range(0, 10), batch)
    >>> part.columns, inside
    (12, slice(0, 10, None))
    """
    positions = batch.patches.positions
    if len(columns) == 0:
        return batch.of_images(slice(0)), slice(0, 0)
    first = columns.start // positions
    part = batch.of_images(slice(first, -(-columns.stop // positions)))
    start = columns.start - first * positions
    if part.patches.batch_size == 1:
        cropped, before = crop(part.patches, start, start + len(columns))
        part, start = replace(part, patches=cropped), start - before
    return part, slice(start, start + len(columns))


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
    convolution = config.convolution
    (tall, _), (down, _), (margin, _) = convolution.kernel, convolution.strides, convolution.margins
    if patches.images is None or margin >= tall:
        return patches, 0
    height, width = patches.map_size
    outermost = -(-margin // down)
    top, bottom = max(0, start // width - outermost), min(height, -(-stop // width) + outermost)
    end = patches.images.shape[2]
    if bottom < height:
        end = (bottom - 1) * down + tall - 2 * margin
    scale = patches.inverse_scale
    part = replace(
        patches,
        images=patches.images[:, :, top * down : end],
        inverse_scale=None if scale is None else scale[:, :, top:bottom],
        map_size=(bottom - top, width),
    )
    return part, top * width
