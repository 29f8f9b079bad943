"""Fast dynamics: lateral inhibition as a nonnegative quadratic program, solved for many columns at once.

    y* = argmin over y ≥ 0 of ½ yᵀ(M + εI) y − yᵀd                (design: drive d, lateral M)

All columns (images × positions) share M, so the problem separates over columns and couples channels only. An
owner holds K_g of the K channels: its rows of M, of d and of y. One iteration on a tile of n columns is

    exchange   Y ← all owners' y                    [K, n]     one all-gather
    compute    w = y − s((M + εI) y − d)            [K_g, n]   one GEMM, with A = I − s(M + εI) and b = s d folded
    update     y ← relu(w + β (w − w_prev))         [K_g, n]   in place

which is projected gradient for β = 0 and Nesterov's accelerated projected gradient otherwise: w + β(w − w_prev)
is the gradient step at z = y + β(y − y_prev), because w is affine in y. What is exchanged is y itself, so the
reported residual belongs to the returned y.

Two rows ride at the end of every slice exchanged: the owner's part of the residual, and of the restart test.
Every decision (stop, restart, error) is a function of gathered bytes only, so owners cannot disagree. Columns
stop and restart one by one: a code never depends on its batch mates.

Residual of a column: max_i |min(M_ii y_i, (M y − d)_i)| / max|d|, zero exactly at y*, unchanged under x → c x.

Sources: Pehlevan & Chklovskii, "Neuroscience-inspired online unsupervised learning algorithms" (2019), for the
dynamics; Nesterov (1983); O'Donoghue & Candès, "Adaptive restart for accelerated gradient schemes" (2015).
A new first-order solver is a step rule and a momentum rule: see `simmatch.solvers.tile.SOLVERS`. Where one process
holds all channels and nothing has to be exchanged, `simmatch.solvers.coordinate` solves columns one by one instead.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from simmatch import kernels
from simmatch.config import DynamicsConfig
from simmatch.sharding.exchange import IDENTITY, Exchange, Handle
from simmatch.sharding.faults import LocalFault, SharedFault, raise_shared, status_of
from simmatch.sharding.rows import Rows, join_rows
from simmatch.solvers.block import Blocks, BlockTile, iterate_block
from simmatch.solvers.bound import Bound
from simmatch.solvers.pool import Pool
from simmatch.solvers.tile import NOT_FINITE_INPUT, NOT_FINITE_RESULT, SOLVERS, Folded, Steps, Tile, iterate

if TYPE_CHECKING:
    from simmatch.solvers.coordinate import CoordinateDescent

TileT = TypeVar("TileT", Tile, BlockTile)

Begin = Callable[[Tensor, Tensor | None], tuple[Tile | BlockTile, Steps]]
"""(own drive [K_g, n], own start or None) → a started tile, and its steps after the first exchange."""


@dataclass(frozen=True)
class Solution:
    """What a solver returns.

    Attributes
    ----------
    y: [K, N] activities of all channels, or [B, K, H, W] from a layer.
    num_iters: iterations run on the slowest column.
    residual: [N] relative residual of each column, or [B, H, W] from a layer; it belongs to the returned y.
    """

    y: Tensor
    num_iters: int
    residual: Tensor


class Dynamics:
    """Solves tiles of columns with buffers that last from call to call; calls may come from several threads.

    Parameters
    ----------
    config: solver, tolerance, tile width.
    rows: the channels held here.
    exchange: how the other channels are reached.
    """

    def __init__(self, config: DynamicsConfig, rows: Rows, exchange: Exchange = IDENTITY) -> None:
        if config.solver == "coordinate_descent" and exchange.world_size > 1:
            raise ValueError(
                f"solver: expected accelerated with exchange: {config.exchange} and {exchange.world_size} shards, "
                "got coordinate_descent, which needs all channels in one place (exchange: gather_state)"
            )
        self.config, self.rows, self.exchange = config, rows, exchange
        self._coordinates: CoordinateDescent | None = None
        self._tiles = Pool()

    def solve(
        self,
        drive: Tensor,
        lateral: Tensor,
        bound: Bound,
        *,
        fixed: bool = False,
        fault: LocalFault | None = None,
        start: Tensor | None = None,
        alone: bool | None = None,
    ) -> Solution:
        """Solve all columns.

        Parameters
        ----------
        drive: [K_g, N], own rows of the drive d.
        lateral: [K_g, K], own rows of M.
        bound: certified bound of λmax(M), the same on all owners.
        fixed: run exactly `encode_iterations` iterations, as in evaluation.
        fault: holds this owner's exception, if it has one; the drive then means nothing.
        start: [K, N], y ≥ 0 of all channels to start from, such as the activities of the same images before an
            update. None: y = 0.
        alone: whether nothing is ever exchanged here, whatever the number of shards, so that `solver: auto` may
            choose what needs no exchange. None: as `exchange` of the configuration says.

        Returns
        -------
        Solution with y [K, N] of all channels on every owner and residual [N].

        Raises
        ------
        SharedFault
            On all owners alike, when one of them has a fault or meets a non-finite value.
        """
        config = self.config.encoding() if fixed else self.config
        if alone is None:
            alone = config.exchange == "gather_state"
        if alone and (kernel := kernels.select(config, drive)) is not None:
            return self._by_kernel(kernel, drive, lateral, bound, config, start)
        solver = config.solver_on(drive.device.type, alone=alone)
        if solver == "coordinate_descent":
            return self._by_column(drive, lateral, bound, start)
        config = config.model_copy(update={"solver": solver})
        columns = drive.shape[1]
        y = drive.new_empty(self.rows.total, columns)
        residual = drive.new_zeros(columns)
        num_iters = 0
        fault = fault or LocalFault(self.exchange)
        begin = self._stepper(lateral, bound, config)
        for where, gathered, (iterations, reached) in self._run(begin, drive, config, fault, start):
            y[:, where] = join_rows(gathered, self.rows.total)
            residual[where] = reached
            num_iters = max(num_iters, iterations)
        return Solution(y, num_iters, residual)

    def _by_column(self, drive: Tensor, lateral: Tensor, bound: Bound, start: Tensor | None) -> Solution:
        """Coordinate descent, all channels being here."""
        if drive.device.type != "cpu":
            missing = kernels.supports("coordinate_descent", self.rows.total, drive.dtype, self.config.tolerance)
            why = missing or "no kernel for this device"
            raise ValueError(f"solver: expected accelerated on {drive.device.type}, got coordinate_descent ({why})")
        if drive.shape[1] == 0:
            return Solution(drive.clone(), 0, drive.new_zeros(0))
        raise_shared(status_of(drive, lateral), NOT_FINITE_INPUT)
        if self._coordinates is None:
            from simmatch.solvers.coordinate import CoordinateDescent  # imports numba, which the other solvers need not

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
        start: Tensor | None,
    ) -> Solution:
        """A kernel of the device, all channels being here; waits for the device once, at the end."""
        if drive.shape[1] == 0:
            return Solution(drive.clone(), 0, drive.new_zeros(0))
        drive, system = drive.contiguous(), kernels.System(lateral, bound.ridge, bound.value)
        result = kernels.solve(kernel, drive.T, system, config, None if start is None else start.T)
        worst, num_iters = torch.stack([result.residual.amax(), result.iterations.amax().to(drive.dtype)]).tolist()
        if not math.isfinite(worst):
            raise_shared(status_of(drive, lateral), NOT_FINITE_INPUT)
            raise SharedFault(f"non-finite {NOT_FINITE_RESULT}", [0])
        return Solution(result.y.T, int(num_iters), result.residual)

    def _run(
        self, begin: Begin, drive: Tensor, config: DynamicsConfig, fault: LocalFault, start: Tensor | None
    ) -> Iterator[tuple[slice, Tensor, tuple[int, Tensor]]]:
        """(columns, their activities [G, K_pad, n], (iterations, residual)) of one tile after the other.

        A few tiles advance in turn, so that one computes while another's exchange is under way. Which tile advances
        when depends on gathered bytes only, so all owners start the same exchanges in the same order.
        """
        width = config.columns_per_tile(self.rows.total, drive.device.type)
        waiting = deque(slice(first, min(first + width, drive.shape[1])) for first in range(0, drive.shape[1], width))
        in_flight = config.tiles_in_flight if self.exchange.asynchronous else 1
        running: deque[tuple[slice, Tile | BlockTile, Steps, Handle]] = deque()
        while waiting or running:
            while waiting and len(running) < in_flight:
                where = waiting.popleft()
                own = None if start is None else start[self.rows.start : self.rows.stop, where]
                tile, steps = begin(drive[:, where], own)
                steps = course(tile, steps, self.exchange, fault)
                running.append((where, tile, steps, next(steps)))
            where, tile, steps, handle = running.popleft()
            handle.wait()
            try:
                running.append((where, tile, steps, next(steps)))
            except StopIteration as stop:
                yield where, tile.gathered, stop.value
                self._tiles.give(self._key(type(tile), tile.drive, config), tile)

    def _stepper(self, lateral: Tensor, bound: Bound, config: DynamicsConfig) -> Begin:
        """What starts a tile, by the configuration."""
        rows, exchange = self.rows, self.exchange
        if config.exchange == "block":
            blocks = Blocks.from_lateral(lateral, bound, rows, exchange.world_size)

            def begin_block(drive: Tensor, start: Tensor | None) -> tuple[BlockTile, Steps]:
                tile = self._borrow(BlockTile, drive, config)
                tile.start(drive, blocks, config, start)
                return tile, iterate_block(tile, blocks, config, exchange)

            return begin_block
        folded = Folded.from_lateral(lateral, bound, config, rows, exchange.world_size)

        def begin(drive: Tensor, start: Tensor | None) -> tuple[Tile, Steps]:
            tile = self._borrow(Tile, drive, config)
            tile.start(drive, folded, start)
            return tile, iterate(tile, folded, config, exchange)

        return begin

    def _borrow(self, kind: type[TileT], like: Tensor, config: DynamicsConfig) -> TileT:
        key = self._key(kind, like, config)
        tile: TileT = self._tiles.take(key, lambda: kind(self.rows, like.shape[1], self.exchange, like, config))
        return tile

    @staticmethod
    def _key(kind: type, like: Tensor, config: DynamicsConfig) -> tuple[Any, ...]:
        """What tiles have in common that may stand in for each other."""
        return kind, config.exchange_dtype, like.shape[1], like.dtype, like.device


def course(tile: Tile | BlockTile, steps: Steps, exchange: Exchange, fault: LocalFault) -> Steps:
    """The first exchange of a started tile, by which all owners learn of each other's faults, and then its steps."""
    fault.mark(tile.tails[exchange.rank, 0])
    yield tile.send(exchange)
    fault.raise_shared(tile.tails[:, 0], NOT_FINITE_INPUT)
    return (yield from steps)


def unrolled(
    drive: Tensor, lateral: Tensor, config: DynamicsConfig, *, bound: float | Tensor, ridge: float | Tensor
) -> Tensor:
    """The `encode_iterations` iterations of evaluation as one plain graph, for export.

    Same arithmetic and same decisions as `Dynamics.solve(..., fixed=True)` on a single owner, without tiles or
    in-place updates: drive [K, N], lateral [K, K] → y [K, N].

    Parameters
    ----------
    bound, ridge: as in `Bound`, or in the graph itself (`traced_bound`).
    """
    config = config.encoding()
    solver = SOLVERS[config.solver]
    step = solver.step(config, bound)
    identity = torch.eye(lateral.shape[0], dtype=lateral.dtype, device=lateral.device)
    matrix = lateral * -step + identity * (1.0 - step * ridge)  # A = I − s(M + εI), as `Folded` has it
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
