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
A new first-order solver is a step rule and a momentum rule: see `simmatch.tile.SOLVERS`.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.exchange import IDENTITY, Exchange, Handle
from simmatch.lateral import Bound, certify_afresh, raise_shared
from simmatch.rows import Rows, join_rows
from simmatch.tile import Folded, Tile


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


class ConvergenceWarning(UserWarning):
    """The dynamics ended above the requested residual."""


def _iterate(
    tile: Tile, folded: Folded, config: DynamicsConfig, exchange: Exchange, fault: Exception | None
) -> Generator[Handle, None, tuple[int, Tensor]]:
    """The dynamics of one tile; yields every exchange it starts, returns (iterations, residual [n])."""
    yield exchange.all_gather(tile.gathered)
    raise_shared((tile.tails[:, 1] > 0).any(dim=1), "exception", fault)
    raise_shared(~tile.tails[:, 0].isfinite().all(dim=1), "non-finite values in the drive or the lateral weights")
    scale = tile.tails[:, 0].amax(dim=0) * folded.step
    scale.masked_fill_(scale == 0, 1.0)  # no drive: y = 0 is exact, 0/0 = 0

    iteration, checked, frozen = 1, False, None
    while True:
        if checked:  # the tails that came with this y tell of the one before
            residual, uphill = _read_tails(tile.tails, scale)
            tile.k.masked_fill_(uphill, 0.0)
            frozen = _freeze(residual, frozen, tile.k, config.tolerance)
        torch.addmm(tile.bias, folded.matrix, tile.all_rows, out=tile.w)
        settled = frozen is not None and bool(frozen.all())
        if settled or iteration == config.max_iterations:
            tile.measure(folded, tile.last_tails[exchange.rank, 0])
            yield exchange.all_gather(tile.last_tails)
            residual, _ = _read_tails(tile.last_tails, scale)
            # frozen columns would be looked at again at the next check: nothing moves until then, so go there
            following = -(-iteration // config.check_every) * config.check_every + 1
            frozen = _freeze(residual, frozen, tile.k, config.tolerance)
            if not settled or following >= config.max_iterations or (frozen is not None and bool(frozen.all())):
                return iteration, residual
            iteration = following
        checked = iteration % config.check_every == 0
        tile.update(folded, frozen, checked)
        iteration += 1
        yield exchange.all_gather(tile.gathered)


def _read_tails(tails: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gathered tails [G, TAIL, n] → relative residual [n] and, per column, whether momentum led uphill."""
    raise_shared(~tails[:, 0].isfinite().all(dim=1), "non-finite activities")
    return tails[:, 0].amax(dim=0) / scale, tails[:, 1].sum(dim=0) > 0


def _freeze(residual: Tensor, frozen: Tensor | None, k: Tensor, tolerance: float) -> Tensor | None:
    """Columns at the tolerance stop. One that stopped and turns out above it starts again without momentum."""
    if tolerance == 0.0:
        return None
    below = residual <= tolerance
    if frozen is not None:
        k.masked_fill_(frozen & ~below, 0.0)
    return below if frozen is not None or bool(below.any()) else None


class Dynamics:
    """Solves tiles of columns with buffers that last from call to call.

    Parameters
    ----------
    config: solver, tolerance, tile width.
    rows: the channels held here.
    exchange: how the other channels are reached.
    """

    def __init__(self, config: DynamicsConfig, rows: Rows, exchange: Exchange = IDENTITY) -> None:
        self.config, self.rows, self.exchange = config, rows, exchange
        self._tiles: dict[tuple[int, torch.dtype, torch.device], list[Tile]] = {}

    def solve(
        self, drive: Tensor, lateral: Tensor, bound: Bound, *, fixed: bool = False, fault: Exception | None = None
    ) -> Solution:
        """Solve all columns.

        Parameters
        ----------
        drive: [K_g, N], own rows of the drive d.
        lateral: [K_g, K], own rows of M.
        bound: certified bound of λmax(M), the same on all owners.
        fixed: run exactly `encode_iterations` iterations, as in evaluation.
        fault: this owner's exception, if it has one; then all owners raise.

        Returns
        -------
        Solution with y [K, N] of all channels on every owner and residual [N].

        Raises
        ------
        SharedFault
            On all owners alike, when one of them has a fault or meets a non-finite value.
        """
        config = self.config.encoding() if fixed else self.config
        folded = Folded.from_lateral(lateral, bound, config, self.rows, self.exchange.world_size)
        columns = drive.shape[1]
        y = drive.new_empty(self.rows.total, columns)
        residual = drive.new_zeros(columns)
        num_iters = 0
        for where, tile, (iterations, reached) in self._run(drive, folded, config, fault):
            y[:, where] = join_rows(tile.gathered, self.rows.total)
            residual[where] = reached
            num_iters = max(num_iters, iterations)
        return Solution(y, num_iters, residual)

    def _run(
        self, drive: Tensor, folded: Folded, config: DynamicsConfig, fault: Exception | None
    ) -> Iterator[tuple[slice, Tile, tuple[int, Tensor]]]:
        """Advance a few tiles in turn, so that one computes while another's exchange is under way.

        Which tile advances when depends on gathered bytes only, so all owners start the same exchanges in the
        same order.
        """
        width = self.config.tile_columns
        waiting = deque(slice(start, min(start + width, drive.shape[1])) for start in range(0, drive.shape[1], width))
        in_flight = config.tiles_in_flight if self.exchange.asynchronous else 1
        running: deque[tuple[slice, Tile, Generator[Handle, None, tuple[int, Tensor]], Handle]] = deque()
        while waiting or running:
            while waiting and len(running) < in_flight:
                where = waiting.popleft()
                tile = self._borrow(where.stop - where.start, drive)
                tile.start(drive[:, where], folded, fault)
                steps = _iterate(tile, folded, config, self.exchange, fault)
                running.append((where, tile, steps, next(steps)))
            where, tile, steps, handle = running.popleft()
            handle.wait()
            try:
                running.append((where, tile, steps, next(steps)))
            except StopIteration as stop:
                yield where, tile, stop.value
                self._tiles[self._key(tile.bias)].append(tile)

    @staticmethod
    def _key(like: Tensor) -> tuple[int, torch.dtype, torch.device]:
        return like.shape[1], like.dtype, like.device

    def _borrow(self, columns: int, like: Tensor) -> Tile:
        free = self._tiles.setdefault((columns, like.dtype, like.device), [])
        return free.pop() if free else Tile(self.rows, columns, self.exchange, like)


def unrolled(drive: Tensor, lateral: Tensor, bound: Bound, config: DynamicsConfig) -> Tensor:
    """The `encode_iterations` iterations of evaluation as one plain graph, for export.

    Same arithmetic and same decisions as `Dynamics.solve(..., fixed=True)` on a single owner, without tiles or
    in-place updates: drive [K, N], lateral [K, K] → y [K, N].
    """
    config = config.encoding()
    folded = Folded.from_lateral(lateral, bound, config, Rows.all(lateral.shape[0]))
    bias = drive * folded.step
    w_prev, y = bias, bias.clamp(min=0.0)
    k = torch.ones_like(drive[0])
    uphill: Tensor | None = None
    for iteration in range(1, config.max_iterations):
        if uphill is not None:
            k = torch.where(uphill, torch.zeros_like(k), k)
        w = torch.addmm(bias, folded.matrix, y)
        following = w
        if folded.solver.momentum is not None:
            following = torch.lerp(w_prev, w, folded.solver.momentum(k, torch.empty_like(k)) + 1.0)
            k = k + 1.0
        following = following.clamp(min=0.0)
        checked = iteration % config.check_every == 0
        uphill = ((y - w) * (following - y)).sum(dim=0) > 0 if checked else None
        w_prev, y = w, following
    return y


def solve(drive: Tensor, lateral: Tensor, config: DynamicsConfig | None = None) -> Solution:
    """Solve y* = argmin over y ≥ 0 of ½ yᵀ M y − yᵀ d for every column of the drive.

    Parameters
    ----------
    drive: [K, N], floating point, finite.
    lateral: [K, K], symmetric positive semidefinite, finite; entries may have any sign.
    config: solver, tolerance, iterations. Default: `DynamicsConfig()`.

    Returns
    -------
    Solution(y [K, N], num_iters, residual [N]).

    Raises
    ------
    ValueError
        Shapes or dtypes that do not fit, values that are not finite, M not symmetric or not positive semidefinite.

    Warns
    -----
    ConvergenceWarning
        Some column ended above `config.tolerance`.

    Examples
    --------
    >>> solve(torch.tensor([[2.0], [-1.0]]), torch.eye(2)).y.flatten().tolist()
    [2.0, 0.0]
    """
    config = config or DynamicsConfig()
    _validate(drive, lateral)
    if drive.shape[1] == 0:
        return Solution(drive.clone(), 0, drive.new_zeros(0))
    # exact powers of two bring M and every column of d near 1, so that no finite input overflows on the way
    drive_scale, lateral_scale = _power_of_two(drive.abs().amax(dim=0)), _power_of_two(lateral.diagonal().amax())
    rows = Rows.all(lateral.shape[0])
    scaled = (lateral / lateral_scale).to(lateral.dtype)
    _check_semidefinite(scaled)
    bound = certify_afresh(scaled, rows, ridge=config.ridge)
    if config.step is not None:
        config = config.model_copy(update={"step": config.step * float(lateral_scale)})
    solution = Dynamics(config, rows).solve((drive / drive_scale).to(drive.dtype), scaled, bound)
    unscaled = torch.where(solution.y > 0, solution.y * (drive_scale / lateral_scale), 0.0)
    y = unscaled.clamp(max=torch.finfo(drive.dtype).max).to(drive.dtype)
    worst = float(solution.residual.amax()) if solution.residual.numel() else 0.0
    if config.tolerance > 0 and not worst <= config.tolerance:
        warnings.warn(
            f"the dynamics reached a residual of {worst:.2e} after {solution.num_iters} iterations, "
            f"above the tolerance {config.tolerance:.2e}; raise max_iterations (now {config.max_iterations})",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Solution(y, solution.num_iters, solution.residual)


def _power_of_two(values: Tensor) -> Tensor:
    """Largest power of two at most each value, in float64; 1 for 0."""
    return torch.where(values > 0, torch.exp2(torch.floor(torch.log2(values.double()))), 1.0)


def _validate(drive: Tensor, lateral: Tensor) -> None:
    if drive.ndim != 2 or lateral.ndim != 2 or lateral.shape != (drive.shape[0],) * 2:
        raise ValueError(
            f"expected drive [K, N] and lateral [K, K], got drive {list(drive.shape)} and lateral {list(lateral.shape)}"
        )
    if not drive.is_floating_point() or drive.dtype != lateral.dtype:
        raise ValueError(f"expected drive and lateral in one floating dtype, got {drive.dtype} and {lateral.dtype}")
    for name, values in (("drive", drive), ("lateral", lateral)):
        if not bool(values.isfinite().all()):
            raise ValueError(f"{name}: expected finite values, got NaN or infinity")
    largest = lateral.abs().amax() if lateral.numel() else lateral.new_zeros(())
    asymmetry = (lateral - lateral.T).abs().amax() if lateral.numel() else largest
    if asymmetry > 100 * torch.finfo(lateral.dtype).eps * largest:
        raise ValueError(f"lateral: expected a symmetric matrix, got |M - Mᵀ| up to {float(asymmetry):.2e}")


def _check_semidefinite(lateral: Tensor) -> None:
    """Cholesky of M with a shift for rounding; M is scaled so that its largest diagonal entry is in [1, 2)."""
    size = lateral.shape[0]
    shift = 10 * size * torch.finfo(lateral.dtype).eps
    if not lateral.diagonal().amax() > 0:
        raise ValueError("lateral: expected a positive diagonal entry, got none: the problem has no minimum")
    shifted = lateral + shift * torch.eye(size, dtype=lateral.dtype, device=lateral.device)
    _, info = torch.linalg.cholesky_ex(shifted)
    if int(info) > 0:
        lowest = float(torch.linalg.eigvalsh(lateral)[0])
        raise ValueError(
            f"lateral: expected a positive semidefinite matrix, got a smallest eigenvalue of {lowest:.2e} "
            f"relative to the largest diagonal entry"
        )
