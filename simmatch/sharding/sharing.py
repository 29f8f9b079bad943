"""How the owners of one layer share its work: by rows throughout, or by columns between two exchanges.

    RowSharing      an owner solves all columns for its own rows; activities are exchanged within the dynamics
    ColumnSharing   an owner solves a share of the columns for all rows; rows of the weights are exchanged before,
                    sums over columns after, and nothing within (`exchange: gather_state`)

Both leave every owner with the statistics of its own rows over the whole batch. With N columns, T exchanges of the
dynamics, K channels and patches of P values the first moves T K N values an update, the second 2 K (K + P).
One owner runs the same code with nothing to move.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.geometry import Patches
from simmatch.plasticity import Statistics, Weights
from simmatch.sharding.columns import Columns, Touched, split_columns
from simmatch.sharding.exchange import IDENTITY, Exchange
from simmatch.sharding.gathered_state import GatheredState, gather_columns
from simmatch.sharding.rows import Rows
from simmatch.solvers.bound import Bound
from simmatch.solvers.dynamics import Dynamics, Solution

if TYPE_CHECKING:
    from simmatch.layer import SimilarityMatchingConv2d


class RowSharing:
    """Every owner holds all columns of its own rows.

    Attributes
    ----------
    across: the owners that columns are split over: none but this one.

    alone: whether there will never be other owners, so that `solver: auto` may choose what cannot be shared.
    """

    across: Exchange = IDENTITY

    def __init__(self, dynamics: DynamicsConfig, rows: Rows, exchange: Exchange, *, alone: bool = False) -> None:
        self._rows, self._solver, self._alone = rows, Dynamics(dynamics, rows, exchange), alone

    def solve(
        self, layer: SimilarityMatchingConv2d, patches: Patches, labels: Tensor | None, *, fixed: bool = False
    ) -> Solution:
        """Columns of all owners: y [K, N], residual [N]. An exception met here reaches all owners."""
        own_drive = layer.lateral.new_zeros(self._rows.count, patches.batch_size * patches.positions)
        fault: Exception | None = None
        try:
            layer.check_batch(patches.batch_size, labels)
            own_drive = layer.drive(patches, labels)
        except Exception as error:
            fault = error
        return self._solver.solve(
            own_drive, layer.lateral, layer.bound, fixed=fixed, fault=fault, alone=self._alone or None
        )

    def learn(
        self, layer: SimilarityMatchingConv2d, patches: Patches, labels: Tensor | None
    ) -> tuple[Solution, Statistics | None, Exception | None]:
        """The columns' solution, and the statistics of own rows or the exception that kept this owner from them."""
        solution = self.solve(layer, patches, labels)
        try:
            return solution, layer._statistics(patches, solution.y, labels, self._rows), None
        except Exception as error:
            return solution, None, error


class ColumnSharing:
    """Every owner holds all rows of its own columns while it works, and its own rows in between.

    Attributes
    ----------
    across: the owners that columns are split over.
    """

    def __init__(
        self,
        dynamics: DynamicsConfig,
        rows: Rows,
        exchange: Exchange,
        filters: tuple[int, int, int],
        num_classes: int,
    ) -> None:
        self.across = exchange
        self._all_rows = Rows.all(rows.total)
        self._solver = Dynamics(dynamics, self._all_rows)
        self._state = GatheredState(rows, exchange, filters, num_classes)

    def solve(
        self, layer: SimilarityMatchingConv2d, patches: Patches, labels: Tensor | None, *, fixed: bool = False
    ) -> Solution:
        """Columns of all owners: y [K, N], residual [N]; they are gathered, which learning does not need."""
        bound, weights = layer.bound, self._weights(layer)
        columns = self._columns(patches)
        own, fault = _unsolved(layer, columns), None
        if columns.total == 0:
            return own
        try:
            layer.check_batch(patches.batch_size, labels)
            own = self._solve(layer, Touched.by(columns, patches, layer.patch), labels, weights, bound, fixed=fixed)
        except Exception as error:
            fault = error
        values = torch.cat([own.y, own.residual.unsqueeze(0)])
        counts = [part.count for part in split_columns(columns.total, self.across.world_size)]
        joined, singles = gather_columns(values, [own.num_iters], counts, self.across, fault)
        return Solution(joined[:-1], int(singles.amax()), joined[-1])

    def learn(
        self, layer: SimilarityMatchingConv2d, patches: Patches, labels: Tensor | None
    ) -> tuple[Solution, Statistics | None, Exception | None]:
        """Own columns' solution, y [K, n] and residual [n], and the statistics of own rows over all columns.

        What goes wrong on an owner is raised here by all of them.
        """
        bound, weights = layer.bound, self._weights(layer)
        columns = self._columns(patches)
        solution, sums, fault = _unsolved(layer, columns), None, None
        try:
            layer.check_batch(patches.batch_size, labels)
            touched = Touched.by(columns, patches, layer.patch)
            solution = self._solve(layer, touched, labels, weights, bound)
            y, own_labels = touched.with_zeros(solution.y), _of(labels, touched)
            sums = layer._statistics(touched.patches, y, own_labels, self._all_rows)
            zz, count = layer._totals(patches, labels)
            sums = replace(sums, zz=zz, count=count)
        except Exception as error:
            fault = error
        return solution, self._state.statistics(sums, layer.lateral, fault), None

    def _weights(self, layer: SimilarityMatchingConv2d) -> Weights:
        return self._state.weights(layer.weights, label=layer.label_gain > 0)

    def _columns(self, patches: Patches) -> Columns:
        total = patches.batch_size * patches.positions
        return split_columns(total, self.across.world_size)[self.across.rank]

    def _solve(
        self,
        layer: SimilarityMatchingConv2d,
        touched: Touched,
        labels: Tensor | None,
        weights: Weights,
        bound: Bound,
        *,
        fixed: bool = False,
    ) -> Solution:
        """Own columns: y [K, n], residual [n]."""
        drive = layer.drive(touched.patches, _of(labels, touched), weights)[:, touched.inside]
        if drive.shape[1] == 0:
            return Solution(drive, 0, drive.new_zeros(0))
        return self._solver.solve(drive, weights.lateral, bound, fixed=fixed, alone=True)


def _of(labels: Tensor | None, touched: Touched) -> Tensor | None:
    return None if labels is None else labels[touched.images]


def _unsolved(layer: SimilarityMatchingConv2d, columns: Columns) -> Solution:
    """Stands in for the solution of an owner that could not find one: it is sent along, and then all raise."""
    zeros = layer.lateral.new_zeros(layer.out_channels + 1, columns.count)
    return Solution(zeros[:-1], 0, zeros[-1])


Sharing = RowSharing | ColumnSharing
