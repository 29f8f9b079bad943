"""First-order dynamics of one tile of columns: buffers, arithmetic of an iteration, exchanges and decisions.

The solvers in `SOLVERS` differ only in their step and their momentum. See `simmatch.solvers.dynamics` for the problem
and the exchange between iterations.
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
"""Rows exchanged after an owner's activities: [0] residual, or max|d| at the first exchange; [1] restart test.
Row 0 is also the owner's status, see `simmatch.sharding.faults`."""

NOT_FINITE_INPUT = "values in the drive or the lateral weights"
"""Name, in messages, of the values checked at the first exchange."""

NOT_FINITE_RESULT = "activities"
"""Name, in messages, of the values checked at later exchanges."""

Steps = Generator[Handle, None, tuple[int, Tensor]]
"""The steps of one tile: yields every exchange that it starts, and returns (iterations, residual [n])."""


@dataclass(frozen=True)
class Solver:
    """A first-order method.

    Attributes
    ----------
    step: function from (configuration, λ̂) to the step s; λ̂ and s are numbers, or tensors of a graph.
    momentum: function of (k, out) that writes β into `out` [n]; k [n] counts iterations since the last restart of each
        column. None: no momentum.

    >>> SOLVERS["accelerated"].step(DynamicsConfig(), 2.0)
    0.5
    """

    step: Callable[[DynamicsConfig, Any], Any]
    momentum: Callable[[Tensor, Tensor], Tensor] | None


def nesterov(k: Tensor, out: Tensor) -> Tensor:
    """Nesterov's momentum β = k / (k + 3).

    >>> nesterov(torch.tensor([0.0, 3.0]), out=torch.empty(2))
    tensor([0.0000, 0.5000])
    """
    return torch.div(k, torch.add(k, 3.0, out=out), out=out)


SOLVERS = {
    "projected_gradient": Solver(step=lambda config, bound: config.step or 1.9 / bound, momentum=None),
    "accelerated": Solver(step=lambda config, bound: 1.0 / bound, momentum=nesterov),
}
"""First-order methods by their name in `DynamicsConfig.solver`."""


@dataclass(frozen=True)
class Folded:
    """The lateral matrix combined with the step, so that w = A Y + s d.

    Attributes
    ----------
    matrix: [K_g, G · (K_pad + TAIL) − TAIL], rows of A = I − s(M + εI), with zero columns for padding and tails.
    diagonal: [K_g, 1], s · M_ii.
    step: s.
    solver: the method that the step belongs to.

    >>> from simmatch.solvers.bound import certify_afresh
    >>> lateral, rows = torch.eye(4), Rows.all(4)
    >>> bound = certify_afresh(lateral, rows, ridge=0.0)
    >>> Folded.from_lateral(lateral, bound, DynamicsConfig(solver="accelerated"), rows).matrix.shape
    torch.Size([4, 4])
    """

    matrix: Tensor
    diagonal: Tensor
    step: float
    solver: Solver

    @classmethod
    def from_lateral(
        cls, lateral: Tensor, bound: Bound, config: DynamicsConfig, rows: Rows, world_size: int = 1
    ) -> Folded:
        """Combine rows [K_g, K] of M with the step, in their dtype (bfloat16 would change the diagonal by 13 %)."""
        solver = SOLVERS[config.solver]
        step = solver.step(config, bound.value)
        own = lateral * -step
        own.diagonal(offset=rows.start).add_(1.0 - step * bound.ridge)
        diagonal = lateral.diagonal(offset=rows.start).mul(step).unsqueeze(1)
        return cls(with_gaps(own, rows, world_size, TAIL), diagonal, step, solver)


def with_gaps(matrix: Tensor, rows: Rows, world_size: int, tail: int) -> Tensor:
    """Insert zero columns into a matrix [K_g, K] where the slices of an exchange have padding and tails.

    >>> with_gaps(torch.ones(2, 3), Rows(0, 2, total=3, padded=2), world_size=2, tail=1)
    tensor([[1., 1., 0., 1., 0.],
            [1., 1., 0., 1., 0.]])
    """
    slices = matrix.new_zeros(rows.count, world_size, rows.padded + tail)
    for rank, part in enumerate(split_rows(rows.total, world_size)):
        slices[:, rank, : part.count] = matrix[:, part.start : part.stop]
    return slices.flatten(1)[:, :-tail]


class Tile:
    """Buffers and arithmetic for n columns; the buffers are reused by later tiles of the same width.

    If `exchange_dtype` is shorter than the computing format, owners send increments y_next − y, and all owners add the
    same rounded increments to their copies of y. The copies remain equal bit by bit, the residual is that of the copy,
    and rounding errors shrink with the increments.

    Attributes
    ----------
    gathered: [G, K_pad + TAIL, n], activities and tails of all owners.
    y: [K_g, n], activities of this owner, a view of `gathered`.
    tails: [G, TAIL, n], tails of all owners.

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> Tile(Rows.all(4), 10, IDENTITY, like=torch.zeros(()), config=DynamicsConfig()).gathered.shape
    torch.Size([1, 6, 10])
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
        """Compute the first iterate from y [K_g, n], or 0; its tail is max|d|, or NaN if d or M is not finite."""
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
        """Write this owner's part of s · residual into `out` [n], given w = A Y + s d; leaves y − w in `scratch`."""
        torch.sub(self.y, self.w, out=self.scratch)
        torch.mul(self.y, folded.diagonal, out=self.other)
        torch.minimum(self.other, self.scratch, out=self.other)
        torch.amax(self.other.abs_(), dim=0, out=out)

    def update(self, folded: Folded, frozen: Tensor | None, checking: bool) -> None:
        """y ← relu(w + β(w − w_prev)), except in frozen columns; if `checking`, first the residual and restart test."""
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
        """Write this owner's rows of the next iterate into the slice to send, or as a rounded increment."""
        if self.packing is None:
            self.y.copy_(y)
        else:
            self.packing.pack(self.rank, y.sub_(self.y))

    def send(self, exchange: Exchange) -> Handle:
        """Start the exchange of the iterate and the tails."""
        return exchange.all_gather(self.gathered if self.packing is None else self.packing.buffer)

    def receive(self) -> None:
        """Update `gathered` after an exchange: all owners, the sender included, add the same increments."""
        if self.packing is not None:
            self.activities.add_(self.packing.body).clamp_(min=0.0)


def iterate(tile: Tile, folded: Folded, config: DynamicsConfig, exchange: Exchange) -> Steps:
    """The dynamics of a tile whose first iterate has been exchanged.

    Yields every exchange that it starts, and returns (iterations, residual [n]).

    >>> from simmatch.sharding.exchange import IDENTITY
    >>> from simmatch.solvers.bound import certify_afresh
    >>> lateral, rows, config = torch.eye(4), Rows.all(4), DynamicsConfig(solver="accelerated")
    >>> folded = Folded.from_lateral(lateral, certify_afresh(lateral, rows, ridge=0.0), config, rows)
    >>> tile = Tile(rows, 10, IDENTITY, like=lateral, config=config)
    >>> tile.start(torch.ones(4, 10), folded)
    >>> tile.send(IDENTITY).wait()
    >>> for handle in iterate(tile, folded, config, IDENTITY):
    ...     handle.wait()
    >>> tile.y.shape
    torch.Size([4, 10])
    """
    tile.receive()
    scale = tile.tails[:, 0].amax(dim=0) * folded.step
    scale.masked_fill_(scale == 0, 1.0)  # no drive: y = 0 is exact, 0/0 = 0

    # with a fixed number of iterations and no momentum there is nothing to decide
    decides = config.tolerance > 0 or folded.solver.momentum is not None
    iteration, checked, frozen = 1, False, None
    while True:
        if checked:  # the tails received with this y are those of the previous y
            residual, uphill = read_tails(tile.tails, scale)
            tile.k.masked_fill_(uphill, 0.0)
            frozen = _freeze(residual, frozen, tile.k, config.tolerance)
        torch.addmm(tile.bias, folded.matrix, tile.all_rows, out=tile.w)
        settled = frozen is not None and bool(frozen.all())
        if settled or iteration == config.max_iterations:
            tile.measure(folded, tile.last_tails[exchange.rank, 0])
            yield exchange.all_gather(tile.last_tails)
            residual, _ = read_tails(tile.last_tails, scale)
            # all columns are frozen, so nothing changes before the next check: skip to it
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


def read_tails(tails: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Relative residual [n], and whether the energy rose [n], from the first two rows of gathered tails [G, TAIL, n].

    >>> read_tails(torch.tensor([[[0.5], [0.1]]]), scale=torch.tensor([2.0]))
    (tensor([0.2500]), tensor([True]))
    """
    raise_shared(tails[:, 0], NOT_FINITE_RESULT)
    return tails[:, 0].amax(dim=0) / scale, tails[:, 1].sum(dim=0) > 0


def _freeze(residual: Tensor, frozen: Tensor | None, k: Tensor, tolerance: float) -> Tensor | None:
    """Freeze columns at the tolerance. A frozen column that is above it after all continues without momentum."""
    if tolerance == 0.0:
        return None
    below = residual <= tolerance
    if frozen is not None:
        k.masked_fill_(frozen & ~below, 0.0)
    return below if frozen is not None or bool(below.any()) else None
