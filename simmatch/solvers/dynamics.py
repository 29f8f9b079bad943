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
"""Function from (this owner's drive [K_g, n], its start or None) to a started tile and the iterator of its steps."""


@dataclass(frozen=True)
class Solution:
    """What a solver returns.

    Attributes
    ----------
    y: [K, N], activities of all channels; [B, K, H', W'] from `SimilarityMatchingConv2d.solve`.
    num_iters: number of iterations of the slowest column.
    residual: [N], relative residual of each column of y; [B, H', W'] from `SimilarityMatchingConv2d.solve`.

    >>> Solution(y=torch.zeros(64, 1000), num_iters=12, residual=torch.zeros(1000)).y.shape
    torch.Size([64, 1000])
    """

    y: Tensor
    num_iters: int
    residual: Tensor


class Dynamics:
    """Solves columns, tile by tile, with buffers that are kept from call to call; several threads may call it.

    Parameters
    ----------
    config: solver, tolerance, width of a tile.
    rows: the channels held here.
    exchange: connects to the owners of the other channels.

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
        drive: [K_g, N], this owner's rows of the drive d.
        lateral: [K_g, K], this owner's rows of M.
        bound: certified bound of λmax(M), equal on all owners.
        fixed: run exactly `encode_iterations` iterations, as in evaluation.
        fault: holds the exception of this owner, if any; the drive is then ignored.
        start: [K, N], y ≥ 0 of all channels to start from, such as the activities of the same images before an
            update. None: zero.
        alone: whether nothing is exchanged, whatever the number of shards, so that `solver: auto` may select a solver
            that needs all channels. None: true for `exchange: gather_state`.

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
        """Coordinate descent, with all channels in this process."""
        if drive.device.type != "cpu":
            missing = kernels.supports("coordinate_descent", self.rows.total, drive.dtype, self.config.tolerance)
            why = missing or "there is no kernel for this device"
            raise ValueError(f"solver: expected accelerated on {drive.device.type}, got coordinate_descent ({why})")
        if drive.shape[1] == 0:
            return Solution(drive.clone(), 0, drive.new_zeros(0))
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
        start: Tensor | None,
    ) -> Solution:
        """A kernel on the device, with all channels there; waits for the device once, at the end."""
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
        """Solve all tiles; yields (columns, activities [G, K_pad, n], (iterations, residual)) of each.

        Several tiles take turns, so that one computes while the exchange of another is in progress. Their order depends
        on gathered bytes only, so all owners start the same exchanges in the same order.
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
                steps = exchange_then_run(tile, steps, self.exchange, fault)
                running.append((where, tile, steps, next(steps)))
            where, tile, steps, handle = running.popleft()
            handle.wait()
            try:
                running.append((where, tile, steps, next(steps)))
            except StopIteration as stop:
                yield where, tile.gathered, stop.value
                self._tiles.give(self._key(type(tile), tile.drive, config), tile)

    def _stepper(self, lateral: Tensor, bound: Bound, config: DynamicsConfig) -> Begin:
        """The function that starts a tile, for the configured exchange."""
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
        """Key under which tiles of equal shape and format share buffers."""
        return kind, config.exchange_dtype, like.shape[1], like.dtype, like.device


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
