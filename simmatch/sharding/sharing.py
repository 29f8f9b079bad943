"""Two ways for the ranks of one layer to share the work of a batch: by rows or by columns.

    RowSharing      an owner solves all columns of its replica for its own rows; activities are exchanged within the
                    dynamics. Replicas split the images of a batch
    ColumnSharing   a rank solves a share of the columns for all rows; rows of the weights are exchanged before the
                    dynamics, and sums over columns after them (`exchange: gather_state`). All owners of all replicas
                    split the columns of a batch

In both, every owner ends with the statistics of its own rows over the whole batch. With N columns, T exchanges in the
dynamics, K channels and patches of P values, the first moves T K N values per update and the second 2 K (K + P);
replicas add their sums besides (`simmatch.sharding.sums`). A single rank runs the same code, with nothing to move.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from simmatch.batch import Batch, batch_drive, batch_statistics, with_totals
from simmatch.config import DynamicsConfig
from simmatch.parts import timed
from simmatch.plasticity import Statistics, Weights
from simmatch.sharding.columns import Part
from simmatch.sharding.covering import covering
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.faults import LocalFault
from simmatch.sharding.gathered_state import GatheredState, gather_columns
from simmatch.sharding.mesh import Mesh
from simmatch.sharding.rows import Rows
from simmatch.sharding.sums import sum_over_replicas
from simmatch.solvers.bound import Bound
from simmatch.solvers.dynamics import Dynamics, Solution


@dataclass(frozen=True)
class OwnState:
    """The state of an owner with which a batch is solved.

    Attributes
    ----------
    weights: the rows held by this owner.
    bound: certified bound of λmax(M).
    alpha: α, the weight of the label term; None if labels do not drive the activities.
    fault: holds an exception of this owner until the next exchange.

    >>> from simmatch.solvers.bound import certify_afresh
    >>> weights, rows = Weights(torch.ones(4, 1, 3, 3), torch.eye(4), torch.zeros(4, 0)), Rows.all(4)
    >>> bound = certify_afresh(weights.lateral, rows, ridge=0.0)
    >>> OwnState(weights, bound, alpha=None, fault=LocalFault(IDENTITY)).weights.lateral.shape
    torch.Size([4, 4])
    """

    weights: Weights
    bound: Bound
    alpha: Tensor | None
    fault: LocalFault


class RowSharing:
    """Every owner solves all columns of its replica's images for its own rows.

    Parameters
    ----------
    dynamics: configuration of the solver.
    rows: the channels held here.
    mesh: connects to the owners of the other channels, and to the replicas.
    alone: whether there are no other ranks, so that `solver: auto` may select a solver that needs all channels.

    Attributes
    ----------
    splits: connects the ranks over which the columns of a batch are split: the replicas.
    shares: connects the ranks that have the same part of a batch: the owners.
    solves: connects the ranks that `solve` a batch together: the owners.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> from simmatch.solvers.bound import certify_afresh
    >>> weights, rows = Weights(torch.ones(4, 1, 3, 3), torch.eye(4), torch.zeros(4, 0)), Rows.all(4)
    >>> state = OwnState(weights, certify_afresh(weights.lateral, rows, ridge=0.0), None, LocalFault(IDENTITY))
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> solution, statistics = RowSharing(DynamicsConfig(), rows, Mesh()).learn(batch, state)
    >>> solution.y.shape, statistics.count
    (torch.Size([4, 72]), 72)
    """

    def __init__(self, dynamics: DynamicsConfig, rows: Rows, mesh: Mesh, *, alone: bool = False) -> None:
        self.splits, self.shares, self.solves = mesh.replicas, mesh.owners, mesh.owners
        self._rows, self._solver = rows, Dynamics(dynamics, rows, mesh.owners, alone=alone)

    def block(self, images: int, positions: int) -> int | None:
        """Images of the blocks in which a batch is computed; None: it is not cut into blocks."""
        return None

    def part(self, images: int, positions: int, *, rank: int | None = None) -> Part:
        """The part of a rank of `splits`, this one by default, of a batch of images with as many columns each."""
        ranks = self.splits.world_size
        return Part.of_images(images, positions, ranks=ranks, rank=self.splits.rank if rank is None else rank)

    def by_kernel(self, like: Tensor) -> bool:
        """See `Dynamics.by_kernel`."""
        return self._solver.by_kernel(like)

    def solve(self, batch: Batch, state: OwnState, *, fixed: bool = False) -> Solution:
        """Solve a whole batch: y [K, N] and residual [N]. All owners of a replica raise an exception of any of them."""
        everything = Part.of_images(batch.images, batch.patches.positions, ranks=1, rank=0)
        return self._solve(batch, everything, state, state.fault, fixed=fixed)[1]

    def learn(
        self, batch: Batch, state: OwnState, solution: Solution | None = None
    ) -> tuple[Solution, Statistics | None]:
        """Solve this replica's part of a batch, y [K, n] and residual [n], and sum statistics of this owner's rows over
        all columns; with a `solution` of all columns of the batch, from `solve`, only sum.

        All ranks raise an exception of any of them; where one is held or recorded, its owner has no statistics.
        """
        part = self.part(batch.images, batch.patches.positions)
        known, statistics = solution, None
        with state.fault.apart(self.shares) as fault:
            if known is None:
                own, solution = self._solve(batch, part, state, fault)
            else:
                own, solution = batch.own(part), columns_of(known, part, batch)
            with timed("statistics"), fault:
                if own is not None:
                    sums = batch_statistics(own, solution.y, self._rows, state.weights.label.shape[1])
                    statistics = with_totals(sums, batch)
        return solution or unsolved(self._rows, part, state), _added(statistics, self.splits, state)

    def _solve(
        self, batch: Batch, part: Part, state: OwnState, fault: LocalFault, *, fixed: bool = False
    ) -> tuple[Batch | None, Solution]:
        """The images of a part, None if `fault` holds an exception, and their solution."""
        lateral, own, drive = state.weights.lateral, None, None
        with timed("drive"), fault:
            own = batch.own(part)
            drive = batch_drive(own, state.weights, state.alpha)
        if drive is None:  # a fault: zeros, so that the exchange keeps its shape
            drive = lateral.new_zeros(self._rows.count, len(part.columns))
        with timed("dynamics"):
            return own, self._solver.solve(drive, lateral, state.bound, fixed=fixed, fault=fault)


class ColumnSharing:
    """Every rank solves a share of the columns for all rows, which it gathers for the time of a batch.

    Parameters
    ----------
    dynamics: configuration of the solver.
    rows: the channels held here.
    mesh: connects to the owners of the other channels, and to the replicas.
    filters: (C, k, k), the shape of a row of W.
    num_classes: number of columns of V.

    Attributes
    ----------
    splits: connects the ranks over which the columns of a batch are split: all owners of all replicas.
    shares: connects the ranks that have the same part of a batch: only this one.
    solves: connects the ranks that `solve` a batch together: all.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> from simmatch.solvers.bound import certify_afresh
    >>> weights, rows = Weights(torch.ones(4, 1, 3, 3), torch.eye(4), torch.zeros(4, 0)), Rows.all(4)
    >>> state = OwnState(weights, certify_afresh(weights.lateral, rows, ridge=0.0), None, LocalFault(IDENTITY))
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> sharing = ColumnSharing(DynamicsConfig(), rows, Mesh(), filters=(1, 3, 3), num_classes=0)
    >>> sharing.solve(batch, state).y.shape
    torch.Size([4, 72])
    """

    shares: Exchange = IDENTITY

    def __init__(
        self, dynamics: DynamicsConfig, rows: Rows, mesh: Mesh, filters: tuple[int, int, int], num_classes: int
    ) -> None:
        self.splits, self.solves, self._mesh = mesh.columns, mesh.columns, mesh
        self._all_rows, self._num_classes = Rows.all(rows.total), num_classes
        self._solver = Dynamics(dynamics, self._all_rows, alone=True)
        self._state = GatheredState(rows, mesh.owners, filters, num_classes)

    def block(self, images: int, positions: int) -> int | None:
        """Images of the blocks in which a batch is computed; None: it is not cut into blocks."""
        return None

    def part(self, images: int, positions: int, *, rank: int | None = None) -> Part:
        """The part of a rank of `splits`, this one by default, of a batch of images with as many columns each."""
        ranks = self.splits.world_size
        return Part.of_columns(images, positions, ranks=ranks, rank=self.splits.rank if rank is None else rank)

    def by_kernel(self, like: Tensor) -> bool:
        """See `Dynamics.by_kernel`."""
        return self._solver.by_kernel(like)

    def solve(self, batch: Batch, state: OwnState, *, fixed: bool = False) -> Solution:
        """Solve a batch and gather the columns of all ranks: y [K, N] and residual [N]."""
        shape = batch.images, batch.patches.positions
        part, own = self.part(*shape), None
        with state.fault.apart(self._mesh.owners) as fault:
            weights = self._weights(state, fault)
            with fault.apart(IDENTITY) as alone:
                own = self._solve_part(batch, part, weights, state, alone, fixed=fixed)
        own = own or unsolved(self._all_rows, part, state)
        if batch.columns == 0:
            return own
        values = torch.cat([own.y, own.residual.unsqueeze(0)])
        counts = [len(self.part(*shape, rank=rank).columns) for rank in range(self.splits.world_size)]
        with timed("exchange"):
            joined, singles = gather_columns(values, [own.num_iters], counts, self.splits, state.fault)
        return Solution(joined[:-1], int(singles.amax()), joined[-1])

    def learn(
        self, batch: Batch, state: OwnState, solution: Solution | None = None
    ) -> tuple[Solution, Statistics | None]:
        """Solve this rank's columns, y [K, n] and residual [n], and sum statistics of its rows over all columns; with a
        `solution` of all columns of the batch, from `solve`, only sum.

        All ranks raise an exception of any of them; where one is held or recorded, its owner has no statistics.
        """
        part = self.part(batch.images, batch.patches.positions)
        known, sums, statistics = solution, None, None
        with state.fault.apart(self._mesh.owners) as fault:
            weights = self._weights(state, fault) if known is None else None
            with fault.apart(IDENTITY) as alone:
                own, inside = covering(part.columns, batch.own(part))
                if known is None:
                    assert weights is not None
                    solution = self._solve(own, inside, weights, state, alone)
                else:
                    solution = columns_of(known, part, batch)
                with timed("statistics"):
                    y = F.pad(solution.y, (inside.start, own.columns - inside.stop))  # zero in the other columns
                    sums = with_totals(batch_statistics(own, y, self._all_rows, self._num_classes), batch)
            with timed("exchange"):
                statistics = self._state.statistics(sums, state.weights.lateral, fault)
        return solution or unsolved(self._all_rows, part, state), _added(statistics, self._mesh.replicas, state)

    def _weights(self, state: OwnState, fault: LocalFault) -> Weights:
        with timed("exchange"):
            return self._state.weights(state.weights, fault, label=state.alpha is not None)

    def _solve_part(
        self, batch: Batch, part: Part, weights: Weights, state: OwnState, fault: LocalFault, *, fixed: bool
    ) -> Solution:
        """Solve the columns of a part: y [K, n] and residual [n]."""
        own, inside = covering(part.columns, batch.own(part))
        return self._solve(own, inside, weights, state, fault, fixed=fixed)

    def _solve(
        self, own: Batch, inside: slice, weights: Weights, state: OwnState, fault: LocalFault, *, fixed: bool = False
    ) -> Solution:
        """Solve this rank's columns: y [K, n] and residual [n]."""
        with timed("drive"):
            drive = batch_drive(own, weights, state.alpha)[:, inside]
        with timed("dynamics"):
            return self._solver.solve(drive, weights.lateral, state.bound, fixed=fixed, fault=fault)


def _added(own: Statistics | None, replicas: Exchange, state: OwnState) -> Statistics | None:
    """Statistics of the parts of all replicas, added."""
    weights = state.weights
    with timed("exchange") if replicas.world_size > 1 else nullcontext():
        return sum_over_replicas(own, (weights.feedforward, weights.lateral, weights.label), replicas)


def columns_of(solution: Solution, part: Part, batch: Batch) -> Solution:
    """Of the solution of a whole batch, y [K, N] and residual [N], the columns of a part.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> whole, part = Solution(torch.ones(4, 72), 5, torch.zeros(72)), Part.of_columns(2, 36, ranks=2, rank=1)
    >>> columns_of(whole, part, batch).y.shape
    torch.Size([4, 36])
    """
    first = part.images.start * batch.patches.positions + part.columns.start
    chosen = slice(first, first + len(part.columns))
    return Solution(solution.y[:, chosen].contiguous(), solution.iterations, solution.residual[chosen])


def unsolved(rows: Rows, part: Part, state: OwnState) -> Solution:
    """Zeros in place of the solution of an owner with a fault, or of no columns.

    >>> from simmatch.solvers.bound import certify_afresh
    >>> weights, rows = Weights(torch.ones(4, 1, 3, 3), torch.eye(4), torch.zeros(4, 0)), Rows.all(4)
    >>> state = OwnState(weights, certify_afresh(weights.lateral, rows, ridge=0.0), None, LocalFault(IDENTITY))
    >>> unsolved(rows, Part.of_columns(2, 36, ranks=1, rank=0), state).y.shape
    torch.Size([4, 72])
    """
    zeros = state.weights.lateral.new_zeros(rows.total + 1, len(part.columns))
    return Solution(zeros[:-1], 0, zeros[-1])


Sharing = RowSharing | ColumnSharing
"""Either way of sharing."""
