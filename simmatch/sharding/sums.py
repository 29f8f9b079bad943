"""Sums over ranks, added in the order of ranks: the same bytes on all of them, in every run.

Replicas hold the same rows of the weights, and each solves its part of a batch. Their statistics are added: then they
make the same update, and stay equal to the bit. With R replicas, a rank receives 2 (R − 1) / R times the sums of its
rows: K_g (K + P) values, and those of V.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from simmatch.plasticity import Statistics
from simmatch.sharding.exchange import Exchange


def sum_over_ranks(tensor: Tensor, exchange: Exchange) -> Tensor:
    """The sum of one tensor per rank, all of one shape, added in the order of ranks, on every rank.

    Each rank adds a part of the values and sends its sums to the others: the same bits in every run, 2 (G − 1) / G
    tensors received, and two more in memory, whatever the number of ranks.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> sum_over_ranks(torch.ones(3), IDENTITY)
    tensor([1., 1., 1.])
    """
    ranks, count = exchange.world_size, tensor.numel()
    parts = tensor.new_zeros(ranks, -(-count // ranks))
    parts.view(-1)[:count] = tensor.flatten()
    received = torch.empty_like(parts)
    exchange.all_to_all(received, parts).wait()
    total = parts[exchange.rank].copy_(received[0])
    for other in received[1:]:
        total += other
    exchange.all_gather(parts).wait()
    return parts.view(-1)[:count].view_as(tensor)


class OrderedSum:
    """A sum of terms that come one after the other, of all ranks; equal on every rank, and for any number of ranks.

    Term n of all is rank n mod R's term n // R, and terms are added in the order of their numbers, so that no bit
    depends on R. Every `add` is an exchange, in which a rank receives (R − 1) / R of a term. The ranks add equally
    often; a rank without a term left adds zeros.

    Parameters
    ----------
    like: a tensor with the shape, dtype and device of a term.
    exchange: connects the ranks.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> total = OrderedSum(torch.zeros(3), IDENTITY)
    >>> for term in (torch.ones(3), torch.full((3,), 2.0)):
    ...     total.add(term)
    >>> total.result()
    tensor([3., 3., 3.])
    """

    def __init__(self, like: Tensor, exchange: Exchange) -> None:
        self._exchange, self._shape = exchange, like.shape
        self._total = like.new_zeros(-(-like.numel() // exchange.world_size))
        self._sent = like.new_zeros(exchange.world_size, len(self._total))

    def add(self, term: Tensor) -> None:
        """Add a term of this rank."""
        self._sent.view(-1)[: term.numel()] = term.flatten()
        received = torch.empty_like(self._sent)
        self._exchange.all_to_all(received, self._sent).wait()
        for part in received:
            self._total += part

    def result(self) -> Tensor:
        """The sum; all ranks call this together."""
        parts = self._sent
        parts[self._exchange.rank] = self._total
        self._exchange.all_gather(parts).wait()
        return parts.view(-1)[: self._shape.numel()].view(self._shape)


def sum_over_replicas(
    own: Statistics | None, like: tuple[Tensor, Tensor, Tensor], exchange: Exchange
) -> Statistics | None:
    """Add Σ y xᵀ, Σ y yᵀ and Σ y zᵀ of all replicas; the rest of `own` is that of the whole batch already.

    A fault of a replica reaches the others with the bound of the new M (`simmatch.solvers.bound`), before anything is
    changed. What it has added, zeros or values that are not finite, is then not used.

    Parameters
    ----------
    own: sums over this replica's part of the batch. None if it has a fault.
    like: tensors with the shapes, dtype and device of yx, yy and yz: W, M and V.
    exchange: connects to the other replicas.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> sums = Statistics(torch.ones(4, 1, 3, 3), torch.ones(4, 4), torch.ones(4, 0), torch.eye(0), count=36)
    >>> sum_over_replicas(sums, (sums.yx, sums.yy, sums.yz), IDENTITY) is sums
    True
    """
    if exchange.world_size == 1:
        return own
    parts = [torch.zeros_like(tensor) for tensor in like] if own is None else [own.yx, own.yy, own.yz]
    total = sum_over_ranks(torch.cat([part.flatten() for part in parts]), exchange)
    if own is None:
        return None
    sums = torch.split(total, [part.numel() for part in parts])
    yx, yy, yz = (flat.view_as(part) for flat, part in zip(sums, parts, strict=True))
    return replace(own, yx=yx, yy=yy, yz=yz)
