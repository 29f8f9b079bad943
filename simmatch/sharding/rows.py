"""Partition of output channels into contiguous, nearly equal ranges of rows, one per owner."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows start … stop − 1 of `total`. Exchanges pad them to `padded` rows, so that all slices have equal shapes.

    >>> Rows.all(64).count
    64
    """

    start: int
    stop: int
    total: int
    padded: int

    @property
    def count(self) -> int:
        return self.stop - self.start

    @classmethod
    def all(cls, total: int) -> Rows:
        """The rows of a single owner."""
        return cls(0, total, total, total)


def split_rows(total: int, parts: int) -> list[Rows]:
    """Split `total` rows into `parts` contiguous ranges whose sizes differ by at most one.

    Raises
    ------
    ValueError
        There are fewer rows than parts.

    >>> [rows.count for rows in split_rows(10, 3)]
    [4, 3, 3]
    """
    if not 1 <= parts <= total:
        raise ValueError(f"expected between 1 and {total} shards for {total} channels, got {parts}")
    size, larger = divmod(total, parts)
    starts = [part * size + min(part, larger) for part in range(parts + 1)]
    padded = size + (larger > 0)
    return [Rows(start, stop, total, padded) for start, stop in pairwise(starts)]


def join_rows(gathered: Tensor, total: int, dim: int = 0) -> Tensor:
    """Concatenate gathered, padded row ranges and drop the padding.

    Parameters
    ----------
    gathered: [G, …]; slice g holds the padded rows of owner g along its dimension `dim`.
    total: K, the number of rows of all owners.
    dim: dimension of a slice that runs over rows.

    Returns
    -------
    The shape of a slice, with K rows along `dim`.

    >>> join_rows(torch.zeros(3, 4, 7), total=10).shape
    torch.Size([10, 7])
    """
    parts = split_rows(total, gathered.shape[0])
    return torch.cat([part.narrow(dim, 0, rows.count) for part, rows in zip(gathered, parts, strict=True)], dim=dim)
