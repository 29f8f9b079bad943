"""Exchange of weights, statistics and solutions between owners of rows and owners of columns.

Where columns are split, an update moves two buffers of equal slices, one slice per owner:

    weights     rows of W, M and, where labels act, V    all-gather: every owner holds all rows
    statistics  rows of Σ y xᵀ, Σ y yᵀ, Σ y zᵀ           all-to-all, then summed by the owner of the rows in the order
                                                         of ranks: a reduce-scatter that is reproducible bit by bit

Together these are 2 K (K + P) values, slightly more with labels and padding. Every slice ends with the status of its
owner, so that a fault of one owner is raised by all, at the same exchange (`simmatch.sharding.faults`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from simmatch.plasticity import Statistics, Weights
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.faults import EXCEPTION, LocalFault, status_of
from simmatch.sharding.rows import Rows, join_rows, split_rows


class Slices:
    """A flat buffer of equal slices, each with a table [height, width] followed by single values.

    Attributes
    ----------
    flat: [G, height · width + singles], the tensor to exchange.
    table: [G, height, width], a view of it.
    singles: [G, singles], a view of it.

    >>> slices = Slices(owners=2, height=3, width=4, singles=1, like=torch.zeros(()))
    >>> slices.flat.shape, slices.table.shape, slices.statuses.shape
    (torch.Size([2, 13]), torch.Size([2, 3, 4]), torch.Size([2]))
    """

    def __init__(self, owners: int, height: int, width: int, singles: int, like: Tensor) -> None:
        self.flat = like.new_zeros(owners, height * width + singles)
        self.table = self.flat[:, : height * width].view(owners, height, width)
        self.singles = self.flat[:, height * width :]

    @property
    def statuses(self) -> Tensor:
        """[G], the last single value of every slice."""
        return self.singles[:, -1]


class GatheredState:
    """Exchanges the weights and statistics of one layer between its owners.

    Parameters
    ----------
    rows: the rows held here.
    exchange: connects to the other owners.
    filters: (C, k, k), the shape of a row of W.
    num_classes: number of columns of V.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> state = GatheredState(Rows.all(4), IDENTITY, filters=(1, 3, 3), num_classes=0)
    >>> own = Weights(torch.ones(4, 1, 3, 3), torch.eye(4), torch.zeros(4, 0))
    >>> state.weights(own, LocalFault(IDENTITY), label=False).feedforward.shape
    torch.Size([4, 1, 3, 3])
    """

    def __init__(self, rows: Rows, exchange: Exchange, filters: tuple[int, int, int], num_classes: int) -> None:
        self.rows, self.exchange, self.filters = rows, exchange, filters
        self.widths = [math.prod(filters), rows.total, num_classes]
        self._parts = split_rows(rows.total, exchange.world_size)

    def weights(self, own: Weights, fault: LocalFault, *, label: bool) -> Weights:
        """Gather all rows of W, M and, with `label`, V on every owner.

        Parameters
        ----------
        own: rows held here: W [K_g, C, k, k], M [K_g, K], V [K_g, num_classes].
        fault: raises or records faults; what it holds is left to the next exchange.

        Raises
        ------
        SharedFault
            On all owners, if the rows of one of them are not finite.
        """
        widths = self.widths[: 3 if label else 2]
        buffer, rank = self._slices(sum(widths), own.lateral), self.exchange.rank
        _fill(buffer.table[rank], [own.feedforward.flatten(1), own.lateral, own.label], widths)
        buffer.statuses[rank] = status_of(buffer.table[rank])
        self.exchange.all_gather(buffer.flat).wait()
        fault.raise_shared(buffer.statuses, "weights")
        feedforward, lateral, *rest = (
            join_rows(part, self.rows.total) for part in torch.split(buffer.table, widths, dim=2)
        )
        whole_label = rest[0] if label else lateral.new_zeros(self.rows.total, self.widths[2])
        return Weights(feedforward.view(-1, *self.filters), lateral, whole_label)

    def statistics(self, sums: Statistics | None, like: Tensor, fault: LocalFault) -> Statistics | None:
        """Turn sums over this owner's columns for all rows into sums over all columns for this owner's rows.

        Parameters
        ----------
        sums: yx [K, C, k, k], yy [K, K], yz [K, num_classes] over this owner's columns. zz and count are those of the
            whole batch, which every owner can compute. None if `fault` holds an exception.
        like: a tensor with their dtype and device.
        fault: holds the exception of this owner, if any.

        Raises
        ------
        SharedFault
            On all owners, if one of them has a fault or sums that are not finite.
        """
        sent, received = (self._slices(sum(self.widths), like) for _ in range(2))
        if sums is not None:
            tensors = [sums.yx.flatten(1), sums.yy, sums.yz]
            for table, part in zip(sent.table, self._parts, strict=True):
                _fill(table, [tensor[part.start : part.stop] for tensor in tensors], self.widths)
            sent.statuses.copy_(status_of(sent.table))  # a fault in any slice is reported to every owner
        fault.mark(sent.statuses)
        self.exchange.all_to_all(received.flat, sent.flat).wait()
        fault.raise_shared(received.statuses, "activities or statistics")
        if sums is None:
            return None
        total = received.table[0, : self.rows.count]
        for other in received.table[1:, : self.rows.count]:
            total += other
        yx, yy, yz = torch.split(total, self.widths, dim=1)
        return replace(sums, yx=yx.view(-1, *self.filters), yy=yy, yz=yz)

    def fixed_sums(self, table: Tensor | None, width: int, like: Tensor, fault: LocalFault) -> Tensor | None:
        """Sums over this owner's columns for all rows, [K, width], to sums over all columns for its rows, [K_g, width].

        Parameters
        ----------
        table: int64. None if `fault` holds an exception.
        like: a tensor with the dtype of statuses, and the device.
        fault: as for `statistics`, which raises the same.
        """
        sent, received = (self._slices(width, like.new_zeros((), dtype=torch.int64)) for _ in range(2))
        if table is not None:
            for target, part in zip(sent.table, self._parts, strict=True):
                target[: part.count] = table[part.start : part.stop]
        status = like.new_zeros(1)
        fault.mark(status)
        sent.statuses.copy_((status != 0).long() + (status == EXCEPTION))  # NaN differs from 0 too
        self.exchange.all_to_all(received.flat, sent.flat).wait()
        held = received.statuses
        statuses = torch.where(held == 2, EXCEPTION, torch.where(held == 1, math.nan, 0.0))
        fault.raise_shared(statuses, "activities or statistics")
        return None if table is None else received.table[:, : self.rows.count].sum(dim=0)

    def _slices(self, width: int, like: Tensor) -> Slices:
        """Slices of padded rows, each with a status."""
        return Slices(self.exchange.world_size, self.rows.padded, width, 1, like)


def _fill(table: Tensor, tensors: Sequence[Tensor], widths: Sequence[int]) -> None:
    """Write rows of tensors side by side into the first rows of a table [padded, Σ widths]."""
    for target, tensor in zip(torch.split(table, list(widths), dim=1), tensors, strict=False):
        target[: tensor.shape[0]] = tensor


def gather_columns(
    values: Tensor,
    singles: Sequence[float],
    counts: Sequence[int],
    exchange: Exchange,
    fault: LocalFault,
) -> tuple[Tensor, Tensor]:
    """Gather the columns and some single values of every owner.

    Parameters
    ----------
    values: [h, n], the columns of this owner.
    singles: s numbers of this owner.
    counts: n of every owner.
    exchange: connects to the other owners.
    fault: holds the exception of this owner, if any.

    Returns
    -------
    Columns [h, Σ n] and single values [G, s], equal on all owners.

    Raises
    ------
    SharedFault
        On all owners, if one of them has a fault.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> columns, singles = gather_columns(torch.zeros(4, 10), [0.5], [10], IDENTITY, LocalFault(IDENTITY))
    >>> columns.shape, singles
    (torch.Size([4, 10]), tensor([[0.5000]]))
    """
    slices = Slices(exchange.world_size, values.shape[0], max(counts), len(singles) + 1, values)
    slices.table[exchange.rank, :, : values.shape[1]] = values
    slices.singles[exchange.rank] = values.new_tensor([*singles, 0.0])
    fault.mark(slices.statuses[exchange.rank])
    exchange.all_gather(slices.flat).wait()
    fault.raise_shared(slices.statuses, "activities")
    joined = torch.cat([table[:, :count] for table, count in zip(slices.table, counts, strict=True)], dim=1)
    return joined, slices.singles[:, :-1]
