"""One tile of columns: the folded lateral matrix, the buffers, and the arithmetic of one iteration, in place.

The solvers differ in their step and their momentum only; `SOLVERS` names them. See `simmatch.dynamics` for the
problem, the exchange between iterations and the decisions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from simmatch.config import DynamicsConfig
from simmatch.exchange import Exchange
from simmatch.lateral import Bound
from simmatch.rows import Rows, split_rows

TAIL = 2
"""Rows that ride behind an owner's activities: [0] residual, or max|d| at the first exchange; [1] restart test,
or 1 for an exception at the first exchange."""


@dataclass(frozen=True)
class Solver:
    """A first-order scheme.

    Attributes
    ----------
    step: (configuration, λ̂) → step s.
    momentum: (k, out) writes β into `out` [n], k [n] being the iterations since a column's last restart.
    """

    step: Callable[[DynamicsConfig, float], float]
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
    """Buffers for n columns, allocated once and reused by every tile of that width."""

    def __init__(self, rows: Rows, columns: int, exchange: Exchange, like: Tensor) -> None:
        slice_rows = rows.padded + TAIL
        self.gathered = like.new_zeros(exchange.world_size, slice_rows, columns)
        self.all_rows = self.gathered.view(exchange.world_size * slice_rows, columns)[:-TAIL]
        self.tails = self.gathered[:, rows.padded :]
        own = self.gathered[exchange.rank]
        self.y, self.tail = own[: rows.count], own[rows.padded :]
        self.bias, self.w, self.w_prev, self.scratch, self.other = like.new_empty(5, rows.count, columns)
        self.last_tails = like.new_zeros(exchange.world_size, TAIL, columns)
        self.k, self.weight = like.new_empty(2, columns)

    def start(self, drive: Tensor, folded: Folded, fault: Exception | None) -> None:
        """First iterate from y = 0, and in the tail max|d|, or NaN where own values are not finite."""
        torch.mul(drive, folded.step, out=self.bias)
        torch.clamp(self.bias, min=0.0, out=self.y)
        self.w_prev.copy_(self.bias)
        self.k.fill_(1.0)
        torch.amax(torch.abs(drive, out=self.scratch), dim=0, out=self.tail[0])
        self.tail[0].add_(folded.matrix.sum() * 0.0)
        self.tail[1] = float(fault is not None)

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
        target = self.other if checking or frozen is not None else self.y
        if folded.solver.momentum is None:
            torch.clamp(self.w, min=0.0, out=target)
        else:
            folded.solver.momentum(self.k, self.weight).add_(1.0)
            torch.lerp(self.w_prev, self.w, self.weight, out=target).clamp_(min=0.0)
            self.k.add_(1.0)
        if target is not self.y:
            if frozen is not None:
                torch.where(frozen, self.y, target, out=target)
            if checking:
                # uphill if s∇(y)·(y_next − y) > 0; the products are summed over the owners' parts
                moved = torch.sub(target, self.y, out=self.y)
                torch.sum(self.scratch.mul_(moved), dim=0, out=self.tail[1]).nan_to_num_(0.0)
            self.y.copy_(target)
        self.w, self.w_prev = self.w_prev, self.w
