"""How the owners of one layer share its work: by rows throughout, or by columns between two exchanges.

    RowSharing      an owner solves all columns for its own rows; activities are exchanged within the dynamics
    ColumnSharing   an owner solves a share of the columns for all rows; rows of the weights are exchanged before,
                    sums over columns after, and nothing within (`exchange: gather_state`)

Both leave every owner with the statistics of its own rows over the whole batch. With N columns, T exchanges of the
dynamics, K channels and patches of P values the first moves T K N values an update, the second 2 K (K + P).
One owner runs the same code with nothing to move.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from simmatch.batch import Batch, batch_drive, batch_statistics, with_totals
from simmatch.config import DynamicsConfig
from simmatch.plasticity import Statistics, Weights
from simmatch.sharding.columns import BatchPart, Columns, split_columns
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.faults import LocalFault
from simmatch.sharding.gathered_state import GatheredState, gather_columns
from simmatch.sharding.rows import Rows
from simmatch.solvers.bound import Bound
from simmatch.solvers.dynamics import Dynamics, Solution


@dataclass(frozen=True)
class OwnState:
    """What an owner brings to the solution of a batch.

    Attributes
    ----------
    weights: own rows.
    bound: of λmax(M).
    alpha: α; None where labels do not act on the activities.
    fault: holds the exception that this owner meets on the way.
    """

    weights: Weights
    bound: Bound
    alpha: Tensor | None
    fault: LocalFault


class RowSharing:
    """Every owner holds all columns of its own rows.

    Parameters
    ----------
    alone: whether there will never be other owners, so that `solver: auto` may choose what cannot be shared.

    Attributes
    ----------
    column_exchange: the way to the owners that columns are split over: none but this one.
    """

    column_exchange: Exchange = IDENTITY

    def __init__(self, dynamics: DynamicsConfig, rows: Rows, exchange: Exchange, *, alone: bool = False) -> None:
        self._rows, self._solver, self._alone = rows, Dynamics(dynamics, rows, exchange), alone

    def solve(self, batch: Batch, state: OwnState, *, fixed: bool = False) -> Solution:
        """Columns of all owners: y [K, N], residual [N]. An exception met here reaches all owners."""
        lateral = state.weights.lateral
        drive = lateral.new_zeros(self._rows.count, batch.columns)
        with state.fault:
            drive = batch_drive(batch, state.weights, state.alpha)
        return self._solver.solve(
            drive, lateral, state.bound, fixed=fixed, fault=state.fault, alone=self._alone or None
        )

    def learn(self, batch: Batch, state: OwnState) -> tuple[Solution, Statistics | None]:
        """The columns' solution, and the statistics of own rows; None if the fault now holds why there are none."""
        solution, statistics = self.solve(batch, state), None
        with state.fault:
            statistics = batch_statistics(batch, solution.y, self._rows, state.weights.label.shape[1])
        return solution, statistics


class ColumnSharing:
    """Every owner holds all rows of its own columns while it works, and its own rows in between.

    Attributes
    ----------
    column_exchange: the way to the owners that columns are split over.
    """

    def __init__(
        self,
        dynamics: DynamicsConfig,
        rows: Rows,
        exchange: Exchange,
        filters: tuple[int, int, int],
        num_classes: int,
    ) -> None:
        self.column_exchange = exchange
        self._all_rows, self._num_classes = Rows.all(rows.total), num_classes
        self._solver = Dynamics(dynamics, self._all_rows)
        self._state = GatheredState(rows, exchange, filters, num_classes)

    def solve(self, batch: Batch, state: OwnState, *, fixed: bool = False) -> Solution:
        """Columns of all owners: y [K, N], residual [N]; they are gathered, which learning does not need."""
        weights = self._weights(state)
        shares = split_columns(batch.columns, self.column_exchange.world_size)
        columns = shares[self.column_exchange.rank]
        own = _unsolved(weights, columns)
        if columns.total == 0:
            return own
        with state.fault:
            own = self._solve(BatchPart.covering(columns, batch), weights, state, fixed=fixed)
        values = torch.cat([own.y, own.residual.unsqueeze(0)])
        counts = [share.count for share in shares]
        joined, singles = gather_columns(values, [own.num_iters], counts, self.column_exchange, state.fault)
        return Solution(joined[:-1], int(singles.amax()), joined[-1])

    def learn(self, batch: Batch, state: OwnState) -> tuple[Solution, Statistics | None]:
        """Own columns' solution, y [K, n] and residual [n], and the statistics of own rows over all columns.

        An exception met here is raised here by all owners.
        """
        weights = self._weights(state)
        columns = split_columns(batch.columns, self.column_exchange.world_size)[self.column_exchange.rank]
        solution, sums = _unsolved(weights, columns), None
        with state.fault:
            part = BatchPart.covering(columns, batch)
            solution = self._solve(part, weights, state)
            sums = batch_statistics(part.batch, part.with_zeros(solution.y), self._all_rows, self._num_classes)
            sums = with_totals(sums, batch)
        return solution, self._state.statistics(sums, weights.lateral, state.fault)

    def _weights(self, state: OwnState) -> Weights:
        return self._state.weights(state.weights, label=state.alpha is not None)

    def _solve(self, part: BatchPart, weights: Weights, state: OwnState, *, fixed: bool = False) -> Solution:
        """Own columns: y [K, n], residual [n]."""
        drive = batch_drive(part.batch, weights, state.alpha)[:, part.inside]
        if drive.shape[1] == 0:
            return Solution(drive, 0, drive.new_zeros(0))
        return self._solver.solve(drive, weights.lateral, state.bound, fixed=fixed, alone=True)


def _unsolved(weights: Weights, columns: Columns) -> Solution:
    """Stands in for the solution of an owner that failed to find one: it is sent along, and then all raise."""
    zeros = weights.lateral.new_zeros(weights.lateral.shape[1] + 1, columns.count)
    return Solution(zeros[:-1], 0, zeros[-1])


Sharing = RowSharing | ColumnSharing
