"""Which output channels an owner holds: contiguous row ranges, as even as they can be.

>>> [rows.count for rows in split_rows(10, 3)]
[4, 3, 3]
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Rows start … stop − 1 of `total`; every exchange pads them to `padded` rows so that all slices are alike."""

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
        Fewer rows than parts.
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
    gathered: [G, …], slice g holding the padded rows of owner g along its dimension `dim`.
    total: K, the rows in all.

    Returns
    -------
    […, K at `dim`, …]
    """
    parts = split_rows(total, gathered.shape[0])
    return torch.cat([part.narrow(dim, 0, rows.count) for part, rows in zip(gathered, parts, strict=True)], dim=dim)
