"""Blocks of whole images: what is computed from a block is computed by one call, on whichever rank.

A product of matrices, or a convolution, may have other last bits where it has another number of columns. So with
`reduce: exact` every product that feeds a weight is computed block by block. How a batch is cut into blocks depends on
the batch alone, not on the number of ranks; a rank has a run of whole blocks. Inputs of a block begin at an
aligned address everywhere, or are copied there.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from simmatch.sharding.columns import Part, split_columns

ALIGNMENT = 64
"""Bytes: the cache line to which torch aligns new tensors on a CPU, and the widest vector."""

MOST_BLOCKS = 128
"""Of one batch: more ranks than this have nothing to solve."""

LEAST_BLOCKS, LEAST_IMAGES = 4, 8
"""Of one batch: so many blocks, if they have so many images each, however few columns these have."""

COLUMNS = 256
"""Of a block, if a batch has more: every block costs some dozens of calls, and its K (K + P) sums are rounded to
integers."""


def images_per_block(images: int, positions: int) -> int:
    """Images of every block of a batch but the last, which may have fewer.

    Parameters
    ----------
    images: B, of the whole batch.
    positions: columns per image.

    >>> images_per_block(100, positions=784), images_per_block(100, positions=32), images_per_block(100, positions=1)
    (1, 8, 25)
    """
    least = min(LEAST_BLOCKS, -(-images // LEAST_IMAGES))
    blocks = max(1, least, min(-(-images * positions // COLUMNS), MOST_BLOCKS))
    return max(1, -(-images // blocks))


def split_blocks(images: int, per_block: int, parts: int) -> list[range]:
    """Images of every part, each a run of whole blocks: numbers of blocks differ by at most one, some may be 0.

    >>> split_blocks(10, per_block=3, parts=3)
    [range(0, 3), range(3, 6), range(6, 10)]
    """
    runs = split_columns(-(-images // per_block), parts)
    return [range(min(run.start * per_block, images), min(run.stop * per_block, images)) for run in runs]


def part_of_blocks(images: int, positions: int, *, ranks: int, rank: int) -> Part:
    """The part of one of `ranks` that split the blocks of a batch.

    >>> [part_of_blocks(100, 784, ranks=3, rank=rank).images for rank in range(3)]
    [slice(0, 33, None), slice(33, 66, None), slice(66, 100, None)]
    """
    own = split_blocks(images, images_per_block(images, positions), ranks)[rank]
    return Part(images, slice(own.start, own.stop), range(len(own) * positions))


def cut(images: int, per_block: int) -> list[slice]:
    """The blocks of a part that begins with a block.

    >>> cut(7, per_block=3)
    [slice(0, 3, None), slice(3, 6, None), slice(6, 7, None)]
    """
    return [slice(start, min(start + per_block, images)) for start in range(0, images, per_block)]


def by_blocks(function: Callable[[Tensor], Tensor], images: Tensor, per_block: int | None) -> Tensor:
    """Apply a function of images [B, …] → [B, …] to each block by itself; None: to all at once.

    >>> by_blocks(lambda x: x - x.mean(), torch.tensor([1.0, 3.0, 5.0]), per_block=2)
    tensor([-1.,  1.,  0.])
    """
    if per_block is None or len(images) == 0:
        return function(images)
    return torch.cat([function(aligned(images[block])) for block in cut(len(images), per_block)])


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and beginning at an address like that of any new tensor; copied, if it does not.

    >>> whole = torch.ones(4, 3)
    >>> aligned(whole) is whole, aligned(whole[1:]) is whole[1:]
    (True, False)
    """
    fits = tensor.is_contiguous() and tensor.data_ptr() % ALIGNMENT == 0
    return tensor if fits else tensor.clone(memory_format=torch.contiguous_format)
