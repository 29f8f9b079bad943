"""The fast dynamics: lateral inhibition as a nonnegative quadratic program, solved for many columns at once.

    y* = argmin over y ≥ 0 of ½ yᵀ(M + εI) y − yᵀd                (drive d, lateral M)

All columns (images × positions) share M. The problem separates over columns and couples channels only. An owner
holds K_g of the K channels, that is its rows of M, d and y. One iteration on a tile of n columns is

    exchange   Y ← all owners' y                    [K, n]     one all-gather
    compute    w = y − s((M + εI) y − d)            [K_g, n]   one GEMM, with A = I − s(M + εI) and b = s d folded
    update     y ← relu(w + β (w − w_prev))         [K_g, n]   in place

which is projected gradient for β = 0, and Nesterov's accelerated projected gradient otherwise: w + β(w − w_prev) is
the gradient step at z = y + β(y − y_prev), because w is affine in y. y itself is exchanged, so the reported residual is
that of the returned y.

Every exchanged slice ends with two more rows: the owner's parts of the residual and of the restart test. Every
decision (stop, restart, error) is a function of gathered bytes only, so owners cannot disagree. Each column stops and
restarts by itself: a code does not depend on the other columns of its batch.

Residual of a column: max_i |min(M_ii y_i, (M y − d)_i)| / max|d|, zero exactly at y*, unchanged under x → c x.

Sources: Pehlevan & Chklovskii, "Neuroscience-inspired online unsupervised learning algorithms" (2019), for the
dynamics; Nesterov (1983); O'Donoghue & Candès, "Adaptive restart for accelerated gradient schemes" (2015).
To add a first-order solver, add its step and momentum to `simmatch.solvers.tile.SOLVERS`. Where one process holds all
channels, `simmatch.solvers.coordinate` solves columns one by one instead.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from simmatch import kernels
from simmatch.config import DynamicsConfig
from simmatch.sharding.exchange import IDENTITY, Exchange, Handle
from simmatch.sharding.faults import LocalFault, raise_shared, status_of
from simmatch.sharding.rows import Rows, join_rows
from simmatch.solvers.block import Blocks, BlockTile, iterate_block
from simmatch.solvers.bound import Bound
from simmatch.solvers.pool import Pool
from simmatch.solvers.tile import NOT_FINITE_INPUT, NOT_FINITE_RESULT, SOLVERS, Folded, Steps, Tile, iterate

if TYPE_CHECKING:
    from simmatch.solvers.coordinate import CoordinateDescent


@dataclass(frozen=True)
class Solution:
    """What a solver returns.

    Attributes
    ----------
    y: [K, N], activities of all channels; [B, K, H', W'] from `SimilarityMatchingConv2d.solve`.
    iterations: number of iterations of the slowest column, a number or a 0-d tensor on the device.
    residual: [N], relative residual of each column of y; [B, H', W'] from `SimilarityMatchingConv2d.solve`.

    >>> Solution(torch.zeros(64, 1000), 12, residual=torch.zeros(1000)).num_iters
    12
    """

    y: Tensor
    iterations: int | Tensor
    residual: Tensor

    @property
    def num_iters(self) -> int:
        """Number of iterations of the slowest column; waits for the device, if it is there."""
        return int(self.iterations)


class Dynamics:
    """Solves columns, tile by tile, with buffers that are kept from call to call; several threads may call it.

    Parameters
    ----------
    config: solver, tolerance, width of a tile.
    rows: the channels held here.
    exchange: connects to the owners of the other channels.
    alone: whether nothing is exchanged, whatever the number of shards, so that `solver: auto` may select a solver that
        needs all channels.

    Raises
    ------
    ValueError
        `coordinate_descent` with several owners: it needs all channels in one place.

    >>> from simmatch.solvers.bound import certify_afresh
    >>> lateral, rows = torch.eye(4), Rows.all(4)
    >>> solver = Dynamics(DynamicsConfig(), rows)
    >>> solver.solve(torch.ones(4, 10), lateral, certify_afresh(lateral, rows, ridge=0.0)).y.shape
    torch.Size([4, 10])
    """

    def __init__(
        self, config: DynamicsConfig, rows: Rows, exchange: Exchange = IDENTITY, *, alone: bool = False
    ) -> None:
        if config.solver == "coordinate_descent" and exchange.world_size > 1:
            raise ValueError(
                f"solver: expected accelerated with exchange: {config.exchange} and {exchange.world_size} shards, "
                "got coordinate_descent, which needs all channels in one place (exchange: gather_state)"
            )
        self.config, self.rows, self.exchange, self.alone = config, rows, exchange, alone
        self._coordinates: CoordinateDescent | None = None
        self._tiles = Pool()

    def by_kernel(self, like: Tensor) -> bool:
        """Whether a kernel solves to the tolerance, for weights `like` these: the host then need not wait for it."""
        return self.alone and kernels.select(self.config, like.new_empty(self.rows.total, 0)) is not None

    def solve(
        self,
        drive: Tensor,
        lateral: Tensor,
        bound: Bound,
        *,
        fixed: bool = False,
        fault: LocalFault | None = None,
        start: Tensor | None = None,
    ) -> Solution:
        """Solve all columns.

        Parameters
        ----------
        drive: [K_g, N], this owner's rows of the drive d.
        lateral: [K_g, K], this owner's rows of M.
        bound: certified bound of λmax(M), equal on all owners.
        fixed: run exactly `encode_iterations` iterations, as in evaluation.
        fault: holds the exception of this owner, if any; the drive is then ignored.
        start: [K, N], y ≥ 0 of all channels to start from, such as the activities of the same images before an
            update. None: zero.

        Returns
        -------
        `Solution`: y [K, N] of all channels, on every owner, and residual [N].

        Raises
        ------
        ValueError
            `coordinate_descent` on a GPU for which there is no kernel.
        SharedFault
            On all owners, if one of them has a fault or values that are not finite.
        """
        config = self.config.encoding() if fixed else self.config
        if drive.shape[1] == 0:
            return Solution(drive.new_empty(self.rows.total, 0), 0, drive.new_zeros(0))
        fault = fault or LocalFault(self.exchange)
        if self.alone and (kernel := kernels.select(config, drive)) is not None:
            return self._by_kernel(kernel, drive, lateral, bound, config, fault=fault, start=start)
        config = config.model_copy(update={"solver": config.solver_on(drive.device.type, alone=self.alone)})
        if config.solver == "coordinate_descent":
            return self._by_column(drive, lateral, bound, start)
        return self._by_tile(drive, lateral, bound, config, fault, start)

    def _by_column(self, drive: Tensor, lateral: Tensor, bound: Bound, start: Tensor | None) -> Solution:
        """Coordinate descent, with all channels in this process."""
        if drive.device.type != "cpu":
            problem = (self.rows.total, drive.dtype, self.config.tolerance, kernels.capability(drive.device))
            why = kernels.supports("coordinate_descent", *problem) or "there is no kernel for this device"
            raise ValueError(f"solver: expected accelerated on {drive.device.type}, got coordinate_descent ({why})")
        raise_shared(status_of(drive, lateral), NOT_FINITE_INPUT)
        if self._coordinates is None:
            from simmatch.solvers.coordinate import CoordinateDescent  # imports numba, which other solvers do not need

            self._coordinates = CoordinateDescent()
        y, num_iters, residual = self._coordinates.solve(
            drive,
            lateral,
            ridge=bound.ridge,
            tolerance=self.config.tolerance,
            max_iterations=self.config.max_iterations,
            start=start,
        )
        raise_shared(status_of(y, residual), NOT_FINITE_RESULT)
        return Solution(y, num_iters, residual)

    @staticmethod
    def _by_kernel(
        kernel: str,
        drive: Tensor,
        lateral: Tensor,
        bound: Bound,
        config: DynamicsConfig,
        *,
        fault: LocalFault,
        start: Tensor | None,
    ) -> Solution:
        """A kernel on the device, with all channels there; if faults are recorded, the host does not wait for it."""
        drive, system = drive.contiguous(), kernels.System(lateral, bound.epsilon, bound.largest)
        result = kernels.solve(kernel, drive.T, system, config, None if start is None else start.T)
        status = status_of(result.residual)
        if fault.recorded or bool(status.isnan()):  # else there is nothing to find in the drive
            fault.raise_shared(status_of(drive, lateral), NOT_FINITE_INPUT)
            fault.raise_shared(status, NOT_FINITE_RESULT)
        return Solution(result.y.T, result.iterations.amax(), result.residual)

    def _by_tile(
        self,
        drive: Tensor,
        lateral: Tensor,
        bound: Bound,
        config: DynamicsConfig,
        fault: LocalFault,
        start: Tensor | None,
    ) -> Solution:
        """A first-order method or block steps, tile by tile.

        Several tiles take turns, so that one computes while the exchange of another is in progress. Their order depends
        on gathered bytes only, so all owners start the same exchanges in the same order.
        """
        rows, exchange, columns = self.rows, self.exchange, drive.shape[1]
        tile_class, matrices, iteration = METHODS[config.exchange == "block"]
        system = matrices.from_lateral(lateral, bound, config, rows, exchange.world_size)
        y, residual, num_iters = drive.new_empty(rows.total, columns), drive.new_empty(columns), 0
        width = config.columns_per_tile(rows.total, drive.device.type)
        waiting = deque(slice(first, min(first + width, columns)) for first in range(0, columns, width))
        in_flight = config.tiles_in_flight if exchange.asynchronous else 1
        running: deque[tuple[slice, Any, Steps, Handle]] = deque()
        while waiting or running:
            while waiting and len(running) < in_flight:
                where = waiting.popleft()
                tile = self._tiles.take(
                    _shape(tile_class, config, drive[:, where]),
                    partial(tile_class, rows, where.stop - where.start, exchange, drive, config),
                )
                tile.start(drive[:, where], system, None if start is None else start[rows.start : rows.stop, where])
                steps = exchange_then_run(tile, iteration(tile, system, config, exchange), exchange, fault)
                running.append((where, tile, steps, next(steps)))
            where, tile, steps, handle = running.popleft()
            handle.wait()
            try:
                running.append((where, tile, steps, next(steps)))
            except StopIteration as stop:
                iterations, residual[where] = stop.value
                y[:, where] = join_rows(tile.gathered, rows.total)
                num_iters = max(num_iters, iterations)
                self._tiles.give(_shape(tile_class, config, drive[:, where]), tile)
        return Solution(y, num_iters, residual)


METHODS: dict[bool, tuple[Any, Any, Any]] = {
    False: (Tile, Folded, iterate),
    True: (BlockTile, Blocks, iterate_block),
}
"""Class of tiles, form of the matrix, and steps: of the first-order methods, and (True) of `exchange: block`."""


def _shape(tile_class: type, config: DynamicsConfig, drive: Tensor) -> tuple[Any, ...]:
    """Tiles of equal shape and format share buffers."""
    return tile_class, config.exchange_dtype, drive.shape[1], drive.dtype, drive.device


def exchange_then_run(tile: Tile | BlockTile, steps: Steps, exchange: Exchange, fault: LocalFault) -> Steps:
    """The first exchange of a started tile, after which all owners raise a fault of any of them, and then its steps.

    >>> from simmatch.solvers.bound import certify_afresh
    >>> lateral, rows, config = torch.eye(4), Rows.all(4), DynamicsConfig(solver="accelerated")
    >>> folded = Folded.from_lateral(lateral, certify_afresh(lateral, rows, ridge=0.0), config, rows)
    >>> tile = Tile(rows, 10, IDENTITY, like=lateral, config=config)
    >>> tile.start(torch.ones(4, 10), folded)
    >>> for handle in exchange_then_run(tile, iterate(tile, folded, config, IDENTITY), IDENTITY, LocalFault(IDENTITY)):
    ...     handle.wait()
    >>> tile.y.shape
    torch.Size([4, 10])
    """
    fault.mark(tile.tails[exchange.rank, 0])
    yield tile.send(exchange)
    fault.raise_shared(tile.tails[:, 0], NOT_FINITE_INPUT)
    return (yield from steps)


def unrolled(
    drive: Tensor, lateral: Tensor, config: DynamicsConfig, *, bound: float | Tensor, ridge: float | Tensor
) -> Tensor:
    """The `encode_iterations` iterations of evaluation as a graph without tiles or in-place updates, for export.

    Arithmetic and decisions are those of `Dynamics.solve(..., fixed=True)` on a single owner.

    Parameters
    ----------
    drive: [K, N], d.
    lateral: [K, K], M.
    config: solver and number of iterations.
    bound: λ̂ ≥ λmax(M) + ε, as in `Bound`, or a tensor of the graph (`traced_bound`).
    ridge: ε, likewise.

    Returns
    -------
    [K, N], y.

    >>> unrolled(torch.ones(4, 10), torch.eye(4), DynamicsConfig(), bound=1.0, ridge=0.0).shape
    torch.Size([4, 10])
    """
    config = config.encoding()
    solver = SOLVERS[config.solver]
    step = solver.step(config, bound)
    identity = torch.eye(lateral.shape[0], dtype=lateral.dtype, device=lateral.device)
    matrix = lateral * -step + identity * (1.0 - step * ridge)  # A = I − s(M + εI), as in `Folded`
    bias: Tensor = drive * step
    w_prev, y = bias, bias.clamp(min=0.0)
    k = torch.ones_like(drive[0])
    uphill: Tensor | None = None
    for iteration in range(1, config.max_iterations):
        if uphill is not None:
            k = torch.where(uphill, torch.zeros_like(k), k)
        w = torch.addmm(bias, matrix, y)
        following = w
        if solver.momentum is not None:
            following = torch.lerp(w_prev, w, solver.momentum(k, torch.empty_like(k)) + 1.0)
            k = k + 1.0
        following = following.clamp(min=0.0)
        checked = iteration % config.check_every == 0
        uphill = ((y - w) * (following - y)).sum(dim=0) > 0 if checked else None
        w_prev, y = w, following
    return y
