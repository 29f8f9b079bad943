"""Two ways for the owners of one layer to share the work of a batch: by rows or by columns.

    RowSharing      an owner solves all columns for its own rows; activities are exchanged within the dynamics
    ColumnSharing   an owner solves a share of the columns for all rows; rows of the weights are exchanged before the
                    dynamics, and sums over columns after them (`exchange: gather_state`)

In both, every owner ends with the statistics of its own rows over the whole batch. With N columns, T exchanges in the
dynamics, K channels and patches of P values, the first moves T K N values per update and the second 2 K (K + P). A
single owner runs the same code, with nothing to move.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from simmatch.batch import Batch, batch_drive, batch_statistics, with_totals
from simmatch.config import DynamicsConfig
from simmatch.parts import timed
from simmatch.plasticity import Statistics, Weights
from simmatch.sharding.columns import covering, split_columns
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.faults import LocalFault
from simmatch.sharding.gathered_state import GatheredState, gather_columns
from simmatch.sharding.rows import Rows
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
    """Every owner solves all columns for its own rows.

    Parameters
    ----------
    dynamics: configuration of the solver.
    rows: the channels held here.
    exchange: connects to the owners of the other channels.
    alone: whether there are no other owners, so that `solver: auto` may select a solver that needs all channels.

    Attributes
    ----------
    column_exchange: connects the owners over which columns are split: only this one.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> from simmatch.solvers.bound import certify_afresh
    >>> weights, rows = Weights(torch.ones(4, 1, 3, 3), torch.eye(4), torch.zeros(4, 0)), Rows.all(4)
    >>> state = OwnState(weights, certify_afresh(weights.lateral, rows, ridge=0.0), None, LocalFault(IDENTITY))
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> solution, statistics = RowSharing(DynamicsConfig(), rows, IDENTITY).learn(batch, state)
    >>> solution.y.shape, statistics.count
    (torch.Size([4, 72]), 72)
    """

    column_exchange: Exchange = IDENTITY

    def __init__(self, dynamics: DynamicsConfig, rows: Rows, exchange: Exchange, *, alone: bool = False) -> None:
        self._rows, self._solver = rows, Dynamics(dynamics, rows, exchange, alone=alone)

    def by_kernel(self, like: Tensor) -> bool:
        """See `Dynamics.by_kernel`."""
        return self._solver.by_kernel(like)

    def solve(self, batch: Batch, state: OwnState, *, fixed: bool = False) -> Solution:
        """Solve a batch: y [K, N] and residual [N]. All owners raise an exception of any of them."""
        lateral = state.weights.lateral
        drive = None
        with timed("drive"), state.fault:
            drive = batch_drive(batch, state.weights, state.alpha)
        if drive is None:  # a fault: zeros, so that the exchange keeps its shape
            drive = lateral.new_zeros(self._rows.count, batch.columns)
        with timed("dynamics"):
            return self._solver.solve(drive, lateral, state.bound, fixed=fixed, fault=state.fault)

    def learn(self, batch: Batch, state: OwnState) -> tuple[Solution, Statistics | None]:
        """Solve a batch, and compute the statistics of this owner's rows; None if `state.fault` holds an exception."""
        solution, statistics = self.solve(batch, state), None
        with timed("statistics"), state.fault:
            statistics = batch_statistics(batch, solution.y, self._rows, state.weights.label.shape[1])
        return solution, statistics


class ColumnSharing:
    """Every owner solves a share of the columns for all rows, which it gathers for the time of a batch.

    Parameters
    ----------
    dynamics: configuration of the solver.
    rows: the channels held here.
    exchange: connects to the owners of the other channels.
    filters: (C, k, k), the shape of a row of W.
    num_classes: number of columns of V.

    Attributes
    ----------
    column_exchange: connects the owners over which columns are split.

    >>> from simmatch.geometry import PatchConfig, prepare
    >>> from simmatch.solvers.bound import certify_afresh
    >>> weights, rows = Weights(torch.ones(4, 1, 3, 3), torch.eye(4), torch.zeros(4, 0)), Rows.all(4)
    >>> state = OwnState(weights, certify_afresh(weights.lateral, rows, ridge=0.0), None, LocalFault(IDENTITY))
    >>> batch = Batch(prepare(torch.ones(2, 1, 8, 8), PatchConfig(in_channels=1, kernel_size=3)))
    >>> sharing = ColumnSharing(DynamicsConfig(), rows, IDENTITY, filters=(1, 3, 3), num_classes=0)
    >>> sharing.solve(batch, state).y.shape
    torch.Size([4, 72])
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
        self._solver = Dynamics(dynamics, self._all_rows, alone=True)
        self._state = GatheredState(rows, exchange, filters, num_classes)

    def by_kernel(self, like: Tensor) -> bool:
        """See `Dynamics.by_kernel`."""
        return self._solver.by_kernel(like)

    def solve(self, batch: Batch, state: OwnState, *, fixed: bool = False) -> Solution:
        """Solve a batch and gather the columns of all owners: y [K, N] and residual [N]."""
        weights = self._weights(state)
        shares = split_columns(batch.columns, self.column_exchange.world_size)
        columns = shares[self.column_exchange.rank]
        if batch.columns == 0:
            return _unsolved(weights, columns)
        own = None
        with state.fault:
            own = self._solve(*covering(columns, batch), weights, state, fixed=fixed)
        own = own or _unsolved(weights, columns)
        values = torch.cat([own.y, own.residual.unsqueeze(0)])
        counts = [len(share) for share in shares]
        with timed("exchange"):
            joined, singles = gather_columns(values, [own.num_iters], counts, self.column_exchange, state.fault)
        return Solution(joined[:-1], int(singles.amax()), joined[-1])

    def learn(self, batch: Batch, state: OwnState) -> tuple[Solution, Statistics | None]:
        """Solve this owner's columns, y [K, n] and residual [n], and sum statistics of its rows over all columns.

        All owners raise an exception of any of them; where it is recorded, its owner has no statistics.
        """
        weights = self._weights(state)
        columns = split_columns(batch.columns, self.column_exchange.world_size)[self.column_exchange.rank]
        solution, sums = None, None
        with state.fault:
            part, inside = covering(columns, batch)
            solution = self._solve(part, inside, weights, state)
            with timed("statistics"):
                y = F.pad(solution.y, (inside.start, part.columns - inside.stop))  # zero in the other columns
                sums = with_totals(batch_statistics(part, y, self._all_rows, self._num_classes), batch)
        with timed("exchange"):
            statistics = self._state.statistics(sums, weights.lateral, state.fault)
        return solution or _unsolved(weights, columns), statistics

    def _weights(self, state: OwnState) -> Weights:
        with timed("exchange"):
            return self._state.weights(state.weights, state.fault, label=state.alpha is not None)

    def _solve(self, part: Batch, inside: slice, weights: Weights, state: OwnState, *, fixed: bool = False) -> Solution:
        """Solve this owner's columns: y [K, n] and residual [n]."""
        with timed("drive"):
            drive = batch_drive(part, weights, state.alpha)[:, inside]
        with timed("dynamics"):
            fault = state.fault.alone()
            return self._solver.solve(drive, weights.lateral, state.bound, fixed=fixed, fault=fault)


def _unsolved(weights: Weights, columns: range) -> Solution:
    """Zeros: of no columns, or a placeholder for an owner with a fault, so that the exchange keeps its shape."""
    zeros = weights.lateral.new_zeros(weights.lateral.shape[1] + 1, len(columns))
    return Solution(zeros[:-1], 0, zeros[-1])


Sharing = RowSharing | ColumnSharing
"""Either way of sharing."""
