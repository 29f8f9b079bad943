"""Packed buffers for exchanges: activities in a short format and tails in full precision.

The buffer is a tensor of the computing format, so that any exchange can send it. The slice of an owner holds:

    body    [rows, n] in the format of the exchange, such as bfloat16, padded to a whole word
    tails   [tails, n] in the computing format
"""

from __future__ import annotations

import torch
from torch import Tensor


class Packing:
    """The buffer of one exchange, allocated once.

    Parameters
    ----------
    owners: G, the number of slices in the buffer.
    rows, tails: number of rows of activities and of tails in a slice.
    columns: n.
    like: a tensor of the computing format and device.
    dtype: format of the body.

    Attributes
    ----------
    buffer: [G, words], the tensor to exchange.
    body: [G, rows, n] of `dtype`, a view of the buffer.
    tails: [G, tails, n] of the computing format, a view of the buffer.

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
        """The buffer for a format of the exchange, or None if it is not shorter than the computing format."""
        body = like.dtype if dtype is None else getattr(torch, dtype)
        return cls(owners, rows, tails, columns, like, body) if body.itemsize < like.dtype.itemsize else None

    def pack(self, rank: int, values: Tensor) -> None:
        """Round values [K_g, n] into the body of one owner's slice; padding rows stay zero."""
        self.body[rank, : values.shape[0]].copy_(values)

    def unpack(self, out: Tensor) -> None:
        """Copy the bodies of all owners into `out` [G, rows, n] of the computing format."""
        out.copy_(self.body)
