"""One tile of columns: the folded lateral matrix, the buffers, the arithmetic of one iteration, and their course.

The solvers differ in their step and their momentum only; `SOLVERS` names them. See `simmatch.solvers.dynamics` for the
problem, the exchange between iterations and the decisions.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.sharding.exchange import Exchange, Handle
from simmatch.sharding.faults import raise_shared
from simmatch.sharding.packing import Packing
from simmatch.sharding.rows import Rows, split_rows
from simmatch.solvers.bound import Bound

TAIL = 2
"""Rows that ride behind an owner's activities: [0] residual, or max|d| at the first exchange; [1] restart test.
[0] is also the owner's status, see `simmatch.sharding.faults`."""

NOT_FINITE_INPUT = "values in the drive or the lateral weights"
NOT_FINITE_RESULT = "activities"

Steps = Generator[Handle, None, tuple[int, Tensor]]
"""The course of one tile: every exchange that it starts, and in the end (iterations, residual [n])."""


@dataclass(frozen=True)
class Solver:
    """A first-order scheme.

    Attributes
    ----------
    step: (configuration, λ̂) → step s; numbers, or tensors of a graph.
    momentum: (k, out) writes β into `out` [n], k [n] being the iterations since a column's last restart.
    """

    step: Callable[[DynamicsConfig, Any], Any]
    momentum: Callable[[Tensor, Tensor], Tensor] | None


def nesterov(k: Tensor, out: Tensor) -> Tensor:
    """β = k / (k + 3)."""
    return torch.div(k, torch.add(k, 3.0, out=out), out=out)


SOLVERS = {
    "projected_gradient": Solver(step=lambda config, bound: config.step or 1.9 / bound, momentum=None),
    "accelerated": Solver(step=lambda config, bound: 1.0 / bound, momentum=nesterov),
}


@dataclass(frozen=True)
class Folded:
    """The lateral matrix folded with the step, so that w = A Y + s d.

    Attributes
    ----------
    matrix: [K_g, G · (K_pad + TAIL) − TAIL], A = I − s(M + εI): own rows, zero columns for padding and tails.
    diagonal: [K_g, 1], s · M_ii.
    step: s.
    solver: the scheme it was folded for.
    """

    matrix: Tensor
    diagonal: Tensor
    step: float
    solver: Solver

    @classmethod
    def from_lateral(
        cls, lateral: Tensor, bound: Bound, config: DynamicsConfig, rows: Rows, world_size: int = 1
    ) -> Folded:
        """Fold own rows [K_g, K] of M in their own precision (in bfloat16 the diagonal would move by up to 13 %)."""
        solver = SOLVERS[config.solver]
        step = solver.step(config, bound.value)
        own = lateral * -step
        own.diagonal(offset=rows.start).add_(1.0 - step * bound.ridge)
        slices = lateral.new_zeros(rows.count, world_size, rows.padded + TAIL)
        for rank, part in enumerate(split_rows(rows.total, world_size)):
            slices[:, rank, : part.count] = own[:, part.start : part.stop]
        diagonal = lateral.diagonal(offset=rows.start).mul(step).unsqueeze(1)
        return cls(slices.flatten(1)[:, :-TAIL], diagonal, step, solver)


class Tile:
    """Buffers for n columns, allocated once and reused by every tile of that width.

    Where `exchange_dtype` is shorter than the computing one, owners send increments y_next − y, and all of them add
    the same rounded increment to their copy of y: the copies stay equal bit by bit, the residual belongs to the copy,
    and the rounding shrinks with the increments.
    """

    def __init__(self, rows: Rows, columns: int, exchange: Exchange, like: Tensor, config: DynamicsConfig) -> None:
        self.rank = exchange.rank
        slice_rows = rows.padded + TAIL
        self.gathered = like.new_zeros(exchange.world_size, slice_rows, columns)
        self.activities = self.gathered[:, : rows.padded]
        self.all_rows = self.gathered.view(exchange.world_size * slice_rows, columns)[:-TAIL]
        self.packing = Packing.of(config.exchange_dtype, exchange.world_size, rows.padded, TAIL, columns, like)
        self.tails = self.gathered[:, rows.padded :] if self.packing is None else self.packing.tails
        self.y, self.tail = self.gathered[self.rank, : rows.count], self.tails[self.rank]
        self.drive = self.bias = like.new_empty(rows.count, columns)
        self.w, self.w_prev, self.scratch, self.other = like.new_empty(4, rows.count, columns)
        self.last_tails = like.new_zeros(exchange.world_size, TAIL, columns)
        self.k, self.weight = like.new_empty(2, columns)

    def start(self, drive: Tensor, folded: Folded, y: Tensor | None = None) -> None:
        """First iterate, from own y [K_g, n] or from 0, and in the tail max|d|, or NaN where d or M is not finite."""
        torch.mul(drive, folded.step, out=self.bias)
        if y is None:
            torch.clamp(self.bias, min=0.0, out=self.other)  # the step from 0
            self.w_prev.copy_(self.bias)
        else:
            self.other.copy_(y)
            self.w_prev.copy_(y)
        if self.packing is not None:
            self.activities.zero_()
        self._next(self.other)
        self.k.fill_(1.0)
        torch.amax(torch.abs(drive, out=self.scratch), dim=0, out=self.tail[0])
        self.tail[0].add_(folded.matrix.sum() * 0.0)

    def measure(self, folded: Folded, out: Tensor) -> None:
        """Own part of s · residual of y into `out` [n], given w = A Y + s d; leaves y − w in `scratch`."""
        torch.sub(self.y, self.w, out=self.scratch)
        torch.mul(self.y, folded.diagonal, out=self.other)
        torch.minimum(self.other, self.scratch, out=self.other)
        torch.amax(self.other.abs_(), dim=0, out=out)

    def update(self, folded: Folded, frozen: Tensor | None, checking: bool) -> None:
        """y ← relu(w + β(w − w_prev)) outside frozen columns; when checking, residual and restart test of y first."""
        if checking:
            self.measure(folded, self.tail[0])
        in_place = not checking and frozen is None and self.packing is None
        target = self.y if in_place else self.other
        if folded.solver.momentum is None:
            torch.clamp(self.w, min=0.0, out=target)
        else:
            folded.solver.momentum(self.k, self.weight).add_(1.0)
            torch.lerp(self.w_prev, self.w, self.weight, out=target).clamp_(min=0.0)
            self.k.add_(1.0)
        if frozen is not None:
            torch.where(frozen, self.y, target, out=target)
        if checking:
            # uphill if s∇(y)·(y_next − y) > 0; the products are summed over the owners' parts
            moved = torch.sub(target, self.y, out=self.w_prev)
            torch.sum(self.scratch.mul_(moved), dim=0, out=self.tail[1]).nan_to_num_(0.0)
        if not in_place:
            self._next(target)
        self.w, self.w_prev = self.w_prev, self.w

    def _next(self, y: Tensor) -> None:
        """Own rows of the next iterate: into the slice that is sent, or as a rounded increment to the shared copy."""
        if self.packing is None:
            self.y.copy_(y)
        else:
            self.packing.pack(self.rank, y.sub_(self.y))

    def send(self, exchange: Exchange) -> Handle:
        """Start to exchange the iterate and the tails."""
        return exchange.all_gather(self.gathered if self.packing is None else self.packing.buffer)

    def receive(self) -> None:
        """Let `gathered` hold what has arrived. Increments are added by all owners alike, the sender too."""
        if self.packing is not None:
            self.activities.add_(self.packing.body).clamp_(min=0.0)


def iterate(tile: Tile, folded: Folded, config: DynamicsConfig, exchange: Exchange) -> Steps:
    """The dynamics of one tile whose first iterate has been exchanged.

    Yields every exchange that it starts, returns (iterations, residual [n]).
    """
    tile.receive()
    scale = tile.tails[:, 0].amax(dim=0) * folded.step
    scale.masked_fill_(scale == 0, 1.0)  # no drive: y = 0 is exact, 0/0 = 0

    # a fixed number of iterations without momentum leaves nothing to decide on the way
    decides = config.tolerance > 0 or folded.solver.momentum is not None
    iteration, checked, frozen = 1, False, None
    while True:
        if checked:  # the tails that came with this y belong to the one before
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
        checked = decides and iteration % config.check_every == 0
        tile.update(folded, frozen, checked)
        iteration += 1
        yield tile.send(exchange)
        tile.receive()


def _read_tails(tails: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Gathered tails [G, TAIL, n] → relative residual [n] and, per column, whether momentum led uphill."""
    raise_shared(tails[:, 0], NOT_FINITE_RESULT)
    return tails[:, 0].amax(dim=0) / scale, tails[:, 1].sum(dim=0) > 0


def _freeze(residual: Tensor, frozen: Tensor | None, k: Tensor, tolerance: float) -> Tensor | None:
    """Columns at the tolerance stop. One that stopped and turns out above it starts again without momentum."""
    if tolerance == 0.0:
        return None
    below = residual <= tolerance
    if frozen is not None:
        k.masked_fill_(frozen & ~below, 0.0)
    return below if frozen is not None or bool(below.any()) else None
