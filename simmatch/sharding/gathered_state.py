"""Weights, statistics and solutions on their way between owners of rows and owners of columns.

Where columns are split, an update moves two buffers of equal slices, one slice an owner:

    weights     rows of W, M and, where labels act, V    all-gather: every owner holds all rows
    statistics  rows of Σ y xᵀ, Σ y yᵀ, Σ y zᵀ           all-to-all, then summed by the rows' owner in the order of
                                                         ranks: a reduce-scatter whose result repeats bit by bit

Together 2 K (K + P) values, a little more with labels and padding. Behind every slice rides its owner's status: a
fault of one owner is raised by all, at the same exchange (`simmatch.sharding.faults`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from simmatch.plasticity import Statistics, Weights
from simmatch.sharding.exchange import Exchange
from simmatch.sharding.faults import LocalFault, raise_shared, status_of
from simmatch.sharding.rows import Rows, join_rows, split_rows


class Slices:
    """A flat buffer [G, …] of equal slices: a table [height, width] each, and behind it single values.

    Attributes
    ----------
    flat: [G, height · width + singles], what is exchanged.
    table: [G, height, width], singles: [G, singles]; views of it.
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
    """Moves the state of one layer between its owners.

    Parameters
    ----------
    rows: the rows held here.
    exchange: the way to the other owners.
    filters: (C, k, k), shape of a row of W.
    num_classes: columns of V.
    """

    def __init__(self, rows: Rows, exchange: Exchange, filters: tuple[int, int, int], num_classes: int) -> None:
        self.rows, self.exchange, self.filters = rows, exchange, filters
        self.widths = [math.prod(filters), rows.total, num_classes]
        self._parts = split_rows(rows.total, exchange.world_size)

    def weights(self, own: Weights, *, label: bool) -> Weights:
        """Own rows of W [K_g, C, k, k], M [K_g, K] and, if asked for, V [K_g, num_classes] → all rows, everywhere.

        Raises
        ------
        SharedFault
            On all owners, where the rows of one are not finite.
        """
        widths = self.widths[: 3 if label else 2]
        buffer, rank = self._slices(sum(widths), own.lateral), self.exchange.rank
        _fill(buffer.table[rank], [own.feedforward.flatten(1), own.lateral, own.label], widths)
        buffer.statuses[rank] = status_of(buffer.table[rank])
        self.exchange.all_gather(buffer.flat).wait()
        raise_shared(buffer.statuses, "weights")
        feedforward, lateral, *rest = (
            join_rows(part, self.rows.total) for part in torch.split(buffer.table, widths, dim=2)
        )
        whole_label = rest[0] if label else lateral.new_zeros(self.rows.total, self.widths[2])
        return Weights(feedforward.view(-1, *self.filters), lateral, whole_label)

    def statistics(self, sums: Statistics | None, like: Tensor, fault: LocalFault) -> Statistics:
        """Sums over own columns for all K rows → sums over all columns for own rows.

        Parameters
        ----------
        sums: yx [K, C, k, k], yy [K, K], yz [K, num_classes] over own columns; zz and count, which take no activities,
            over the whole batch already: every owner knows them. None where the fault holds an exception.
        like: a tensor of their dtype and device.
        fault: holds this owner's exception, if it has one.

        Raises
        ------
        SharedFault
            On all owners, where one has a fault or sums that are not finite.
        """
        sent, received = (self._slices(sum(self.widths), like) for _ in range(2))
        if sums is not None:
            tensors = [sums.yx.flatten(1), sums.yy, sums.yz]
            for table, part in zip(sent.table, self._parts, strict=True):
                _fill(table, [tensor[part.start : part.stop] for tensor in tensors], self.widths)
            sent.statuses.copy_(status_of(sent.table))  # every owner learns of what any of them would get
        fault.mark(sent.statuses)
        self.exchange.all_to_all(received.flat, sent.flat).wait()
        fault.raise_shared(received.statuses, "activities or statistics")
        assert sums is not None  # else this owner's own status has been raised
        total = received.table[0, : self.rows.count]
        for other in received.table[1:, : self.rows.count]:
            total += other
        yx, yy, yz = torch.split(total, self.widths, dim=1)
        return Statistics(yx.view(-1, *self.filters), yy, yz, sums.zz, sums.count)

    def _slices(self, width: int, like: Tensor) -> Slices:
        """Slices of the padded rows with a status."""
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
    """Columns of every owner side by side, and single values of every owner.

    Parameters
    ----------
    values: [h, n], own columns.
    singles: s numbers of this owner.
    counts: n of every owner.
    fault: holds this owner's exception, if it has one.

    Returns
    -------
    ([h, Σ n], [G, s]), the same on all owners.

    Raises
    ------
    SharedFault
        On all owners, where one has a fault.
    """
    slices = Slices(exchange.world_size, values.shape[0], max(counts), len(singles) + 1, values)
    slices.table[exchange.rank, :, : values.shape[1]] = values
    slices.singles[exchange.rank] = values.new_tensor([*singles, 0.0])
    fault.mark(slices.statuses[exchange.rank])
    exchange.all_gather(slices.flat).wait()
    fault.raise_shared(slices.statuses, "activities")
    joined = torch.cat([table[:, :count] for table, count in zip(slices.table, counts, strict=True)], dim=1)
    return joined, slices.singles[:, :-1]
