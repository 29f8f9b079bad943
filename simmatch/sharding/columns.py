"""The part of a batch that one rank solves: a range of its columns (images × positions), and images that contain it.

Columns are in the order 'b h w'. Where columns are split, ranges may start and end inside an image, so that work is
balanced even if a batch has fewer images than there are ranks. Replicas whose owners split rows have whole images. With
fewer columns than ranks, some ranks have none. A rank reads and prepares only the images of its part.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


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
