"""What owners exchange, packed: activities in a short format and tails in full precision, in one buffer.

Whole numbers of the computing format make up the buffer, so that any exchange can carry it. An owner's slice:

    body    [rows, n] in the format of the exchange, bfloat16 say; the last word is filled up
    tails   [tails, n] in the computing format
"""

from __future__ import annotations

import torch
from torch import Tensor


class Packing:
    """The buffer of one exchange, allocated once.

    Parameters
    ----------
    owners: G, slices in the buffer.
    rows, tails: rows of activities and of tails in a slice.
    columns: n.
    like: a tensor of the computing format and device.
    dtype: format of the body.

    Attributes
    ----------
    buffer: [G, words], what is exchanged.
    body: [G, rows, n] of `dtype`, tails: [G, tails, n] of the computing format; views of it.

    Examples
    --------
    >>> packing = Packing(2, 3, 1, 5, torch.zeros(()), torch.bfloat16)
    >>> packing.buffer.shape, packing.body.shape, packing.tails.shape
    (torch.Size([2, 13]), torch.Size([2, 3, 5]), torch.Size([2, 1, 5]))
    """

    def __init__(self, owners: int, rows: int, tails: int, columns: int, like: Tensor, dtype: torch.dtype) -> None:
        words = -(-rows * columns * dtype.itemsize // like.dtype.itemsize)
        self.buffer = like.new_zeros(owners, words + tails * columns)
        body = self.buffer[:, :words].view(dtype)
        self.body = body[:, : rows * columns].view(owners, rows, columns)
        self.tails = self.buffer[:, words:].view(owners, tails, columns)

    @classmethod
    def of(cls, dtype: str | None, owners: int, rows: int, tails: int, columns: int, like: Tensor) -> Packing | None:
        """The buffer for a format of the exchange, or None where it is no shorter than the computing one."""
        body = like.dtype if dtype is None else getattr(torch, dtype)
        return cls(owners, rows, tails, columns, like, body) if body.itemsize < like.dtype.itemsize else None

    def pack(self, rank: int, values: Tensor) -> None:
        """Round [K_g, n] into the body of one owner's slice; rows of padding stay zero."""
        self.body[rank, : values.shape[0]].copy_(values)

    def unpack(self, out: Tensor) -> None:
        """All owners' bodies into `out` [G, rows, n] of the computing format."""
        out.copy_(self.body)
